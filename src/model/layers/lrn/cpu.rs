//! A block of channels at a time, with its neighbours on both sides, in arrays on the stack: the sum over neighbours is
//! 2r + 1 shifted adds of whole vectors. Nothing is saved for backward: to compute s again costs 2r + 1 adds a value, to
//! save it would cost another activation (148 MB for AlexNet's first layer at batch 128) and its way through memory.

use super::super::rows_per_task;
use super::Lrn;
use crate::error::Result;
use crate::model::simd::vectorized;
use crate::model::{Backward, Forward, Layer, Pass};
use rayon::prelude::*;

pub const MAX_RADIUS: usize = 16;
/// Channels of a block.
const BLOCK: usize = 96;
/// A block with the neighbours of its neighbours.
const WIDE: usize = BLOCK + 4 * MAX_RADIUS;

pub struct Cpu {
    pub keys: Lrn,
    pub channels: usize,
}

impl Layer for Cpu {
    fn forward(&mut self, _: &Pass, mut io: Forward<'_>) -> Result<()> {
        let (keys, c) = (self.keys, self.channels);
        let pixels = rows_per_task(c * 16) * c;
        (io.output.f32().par_chunks_mut(pixels), io.inputs[0].f32().par_chunks(pixels)).into_par_iter().for_each(
            |(y, x)| {
                vectorized(
                    #[inline(always)]
                    || {
                        for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
                            forward_pixel(&keys, x, y);
                        }
                    },
                );
            },
        );
        Ok(())
    }

    fn backward(&mut self, _: &Pass, mut io: Backward<'_>) -> Result<()> {
        let (keys, c) = (self.keys, self.channels);
        let pixels = rows_per_task(c * 32) * c;
        let (x, dy) = (io.inputs[0].f32(), io.grad_output.f32());
        (io.grad_inputs[0].f32().par_chunks_mut(pixels), x.par_chunks(pixels), dy.par_chunks(pixels))
            .into_par_iter()
            .for_each(|(dx, x, dy)| {
                vectorized(
                    #[inline(always)]
                    || {
                        for ((dx, x), dy) in dx.chunks_exact_mut(c).zip(x.chunks_exact(c)).zip(dy.chunks_exact(c)) {
                            backward_pixel(&keys, x, dy, dx);
                        }
                    },
                );
            });
        Ok(())
    }
}

/// x (C), y (C): y_i = x_i * s_i^-beta.
#[inline(always)]
fn forward_pixel(keys: &Lrn, x: &[f32], y: &mut [f32]) {
    let r = keys.depth_radius;
    for (block, y) in y.chunks_mut(BLOCK).enumerate() {
        let start = block * BLOCK;
        let mut squares = [0f32; WIDE];
        load(x, start, r, &mut squares[..y.len() + 2 * r], |x| x * x);
        let mut s = [0f32; WIDE];
        scales(keys, &squares, &mut s[..y.len()]);
        powers(keys.beta, &mut s[..y.len()]);
        for ((y, x), power) in y.iter_mut().zip(&x[start..]).zip(&s) {
            *y = x * power;
        }
    }
}

/// x (C), dy (C), dx (C): dx_i = dy_i s_i^-beta - 2 alpha beta x_i * sum over |j - i| <= r of dy_j x_j s_j^(-beta - 1).
#[inline(always)]
fn backward_pixel(keys: &Lrn, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    let r = keys.depth_radius;
    for (block, dx) in dx.chunks_mut(BLOCK).enumerate() {
        let start = block * BLOCK;
        // The block's neighbours have shares in its gradient: they need their own s, and it their neighbours.
        let near = dx.len() + 2 * r;
        let mut squares = [0f32; WIDE];
        load(x, start, 2 * r, &mut squares[..near + 2 * r], |x| x * x);
        let mut s = [0f32; WIDE];
        scales(keys, &squares, &mut s[..near]);
        let (mut xs, mut dys) = ([0f32; WIDE], [0f32; WIDE]);
        load(x, start, r, &mut xs[..near], |x| x);
        load(dy, start, r, &mut dys[..near], |dy| dy);

        let mut powers_of_s = s;
        powers(keys.beta, &mut powers_of_s[..near]);
        let mut shares = [0f32; WIDE];
        for ((((share, dy), x), s), power) in shares[..near].iter_mut().zip(&mut dys).zip(&xs).zip(&s).zip(&powers_of_s)
        {
            *dy *= power;
            *share = *dy * x / s;
        }
        let mut sums = [0f32; WIDE];
        add_neighbours(r, &shares, &mut sums[..dx.len()]);
        let factor = 2.0 * keys.alpha * keys.beta;
        for (((dx, direct), x), sum) in dx.iter_mut().zip(&dys[r..]).zip(&xs[r..]).zip(&sums) {
            *dx = direct - factor * x * sum;
        }
    }
}

/// `padded` = f of the channels from `start - halo` on; 0 beyond the ends.
#[inline(always)]
fn load(x: &[f32], start: usize, halo: usize, padded: &mut [f32], f: impl Fn(f32) -> f32) {
    let before = halo.saturating_sub(start);
    for (padded, x) in padded[before..].iter_mut().zip(&x[(start + before) - halo..]) {
        *padded = f(*x);
    }
}

/// s_i = bias + alpha * (squares_i + ... + squares_(i + 2r)).
#[inline(always)]
fn scales(keys: &Lrn, squares: &[f32; WIDE], s: &mut [f32]) {
    add_neighbours(keys.depth_radius, squares, s);
    for s in s {
        *s = keys.bias + keys.alpha * *s;
    }
}

/// sums_i += values_i + ... + values_(i + 2r).
#[inline(always)]
fn add_neighbours(r: usize, values: &[f32; WIDE], sums: &mut [f32]) {
    for shift in 0..=2 * r {
        for (sum, value) in sums.iter_mut().zip(&values[shift..]) {
            *sum += value;
        }
    }
}

/// s = s^-beta; the usual 0.75 by two square roots, which are vector instructions.
#[inline(always)]
fn powers(beta: f32, s: &mut [f32]) {
    if beta == 0.75 {
        for s in s {
            let root = s.sqrt();
            *s = 1.0 / (root * root.sqrt());
        }
    } else {
        for s in s {
            *s = s.powf(-beta);
        }
    }
}
