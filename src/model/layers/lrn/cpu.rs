//! A block of channels at a time, with its neighbours on both sides, in lines on the stack: the sum over neighbours is
//! 2r + 1 shifted adds in a register. Nothing is saved for backward: to compute s again costs 2r + 1 adds a value, to save
//! it would cost another activation (37 MB for AlexNet's first layer at batch 128) and its way through memory.
//! Forward reads and writes 4 bytes a value, backward reads 8 and writes 4.
//!
//! Powers: with s^(1/2) and s^(1/4) from two square roots, which are vector instructions, s^-0.75 = 1 / (s^(1/2) s^(1/4)).

use super::super::rows_per_task;
use super::Lrn;
use crate::error::Result;
use crate::model::simd::vectorized;
use crate::model::{Backward, Forward, Layer, Pass};
use rayon::prelude::*;

pub const MAX_RADIUS: usize = 16;
/// Channels of a block.
const BLOCK: usize = 256;
/// Sums that are in registers together.
const TOGETHER: usize = 16;
/// A block with the neighbours of its neighbours, and as much as the last sums read beyond.
const WIDE: usize = BLOCK + 4 * MAX_RADIUS + TOGETHER;
type Line = [f32; WIDE];

pub struct Cpu {
    pub keys: Lrn,
    pub channels: usize,
    /// Whether the input comes from a ReLU whose backward is done here.
    pub masks_input: bool,
}

impl Layer for Cpu {
    fn forward(&mut self, _: &Pass, io: Forward<'_>) -> Result<()> {
        let beta = self.keys.beta;
        if beta == 0.75 {
            self.forward_by(three_quarters, io)
        } else {
            self.forward_by(|s| s.powf(-beta), io)
        }
        Ok(())
    }

    fn backward(&mut self, _: &Pass, io: Backward<'_>) -> Result<()> {
        let beta = self.keys.beta;
        if beta == 0.75 {
            self.backward_by(three_quarters, io)
        } else {
            self.backward_by(|s| s.powf(-beta), io)
        }
        Ok(())
    }
}

/// s^-0.75
#[inline(always)]
fn three_quarters(s: f32) -> f32 {
    let root = s.sqrt();
    1.0 / (root * root.sqrt())
}

/// With s^-beta as a function: as a choice inside the loops it would be made by computing both.
impl Cpu {
    fn forward_by(&self, power: impl Fn(f32) -> f32 + Copy + Sync, mut io: Forward<'_>) {
        let (keys, c) = (self.keys, self.channels);
        let pixels = rows_per_task(c * 16) * c;
        (io.output.f32().par_chunks_mut(pixels), io.inputs[0].f32().par_chunks(pixels)).into_par_iter().for_each(
            |(y, x)| {
                let (mut squares, mut s) = ([0.0; WIDE], [0.0; WIDE]);
                vectorized(
                    #[inline(always)]
                    || {
                        for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
                            for (block, y) in y.chunks_mut(BLOCK).enumerate() {
                                forward_block(keys, power, x, block * BLOCK, y, &mut squares, &mut s);
                            }
                        }
                    },
                );
            },
        );
    }

    fn backward_by(&self, power: impl Fn(f32) -> f32 + Copy + Sync, mut io: Backward<'_>) {
        let (keys, c, masks) = (self.keys, self.channels, self.masks_input);
        let pixels = rows_per_task(c * 32) * c;
        let (x, dy) = (io.inputs[0].f32(), io.grad_output.f32());
        (io.grad_inputs[0].f32().par_chunks_mut(pixels), x.par_chunks(pixels), dy.par_chunks(pixels))
            .into_par_iter()
            .for_each(|(dx, x, dy)| {
                let mut lines = [[0.0; WIDE]; 5];
                vectorized(
                    #[inline(always)]
                    || {
                        for ((dx, x), dy) in dx.chunks_exact_mut(c).zip(x.chunks_exact(c)).zip(dy.chunks_exact(c)) {
                            for (block, dx) in dx.chunks_mut(BLOCK).enumerate() {
                                backward_block(keys, power, x, dy, block * BLOCK, dx, &mut lines);
                                if masks {
                                    mask(&x[block * BLOCK..], dx);
                                }
                            }
                        }
                    },
                );
            });
    }
}

/// x (C), y (channels `start..` of C): y_i = x_i * s_i^-beta.
#[inline(always)]
fn forward_block(
    keys: Lrn,
    power: impl Fn(f32) -> f32,
    x: &[f32],
    start: usize,
    y: &mut [f32],
    squares: &mut Line,
    s: &mut Line,
) {
    let r = keys.depth_radius;
    load(x, start, r, y.len(), squares, |x| x * x);
    add_neighbours(r, squares, s, y.len());
    for ((y, x), s) in y.iter_mut().zip(&x[start..]).zip(&*s) {
        *y = x * power(keys.bias + keys.alpha * s);
    }
}

/// x (C), dy (C), dx (channels `start..` of C):
/// dx_i = dy_i s_i^-beta - 2 alpha beta x_i * sum over |j - i| <= r of dy_j x_j s_j^(-beta - 1).
#[inline(always)]
fn backward_block(
    keys: Lrn,
    power: impl Fn(f32) -> f32,
    x: &[f32],
    dy: &[f32],
    start: usize,
    dx: &mut [f32],
    lines: &mut [Line; 5],
) {
    let r = keys.depth_radius;
    let [squares, s, xs, dys, shares] = lines;
    // The block's neighbours have shares in its gradient: they need their own s, and it their neighbours.
    let near = dx.len() + 2 * r;
    load(x, start, 2 * r, dx.len(), squares, |x| x * x);
    add_neighbours(r, squares, s, near);
    load(x, start, r, dx.len(), xs, |x| x);
    load(dy, start, r, dx.len(), dys, |dy| dy);
    let (dys, xs, s) = (&mut dys[..near], &xs[..near], &s[..near]);
    for (((share, dy), x), s) in shares.iter_mut().zip(&mut *dys).zip(xs).zip(s) {
        let s = keys.bias + keys.alpha * s;
        *dy *= power(s);
        *share = *dy * x / s;
    }
    let sums = squares;
    add_neighbours(r, shares, sums, dx.len());
    let factor = 2.0 * keys.alpha * keys.beta;
    for (((dx, direct), x), sum) in dx.iter_mut().zip(&dys[r..]).zip(&xs[r..]).zip(&*sums) {
        *dx = direct - factor * x * sum;
    }
}

/// `line` = f of the `len` channels from `start` on, with `halo` on each side; 0 beyond the ends.
#[inline(always)]
fn load(x: &[f32], start: usize, halo: usize, len: usize, line: &mut Line, f: impl Fn(f32) -> f32) {
    let before = halo.saturating_sub(start);
    let x = &x[start + before - halo..x.len().min(start + len + halo)];
    line[..before].fill(0.0);
    for (value, x) in line[before..].iter_mut().zip(x) {
        *value = f(*x);
    }
    line[before + x.len()..len + 2 * halo].fill(0.0);
}

/// sums_i = values_i + ... + values_(i + 2r) for the first `len`.
#[inline(always)]
fn add_neighbours(r: usize, values: &Line, sums: &mut Line, len: usize) {
    for start in (0..len).step_by(TOGETHER) {
        let mut sum = [0.0; TOGETHER];
        for shift in 0..=2 * r {
            let values: &[f32; TOGETHER] = values[start + shift..][..TOGETHER].try_into().unwrap();
            for i in 0..TOGETHER {
                sum[i] += values[i];
            }
        }
        sums[start..][..TOGETHER].copy_from_slice(&sum);
    }
}

/// x (C), dx (C)
#[inline(always)]
fn mask(x: &[f32], dx: &mut [f32]) {
    for (dx, x) in dx.iter_mut().zip(x) {
        *dx = if *x > 0.0 { *dx } else { 0.0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Slice, SliceMut};

    const KEYS: Lrn = Lrn { depth_radius: 5, bias: 1.5, alpha: 0.2, beta: 0.75 };
    const PIXELS: usize = 3;

    /// y and dx of one pixel by the formulas, in f64.
    fn definition(layer: &Cpu, x: &[f32], dy: &[f32]) -> [Vec<f64>; 2] {
        let Lrn { depth_radius, bias, alpha, beta } = layer.keys;
        let [bias, alpha, beta] = [bias, alpha, beta].map(f64::from);
        let [x, dy] = [x, dy].map(|values| values.iter().map(|&value| f64::from(value)).collect::<Vec<_>>());
        let sum = |i: usize, f: &dyn Fn(usize) -> f64| {
            (i.saturating_sub(depth_radius)..x.len().min(i + depth_radius + 1)).map(f).sum::<f64>()
        };
        let s: Vec<f64> = (0..x.len()).map(|i| bias + alpha * sum(i, &|j| x[j] * x[j])).collect();
        let gradient = |i: usize| {
            let shares = sum(i, &|j| dy[j] * x[j] * s[j].powf(-beta - 1.0));
            dy[i] * s[i].powf(-beta) - 2.0 * alpha * beta * x[i] * shares
        };
        let masked = |i: usize| layer.masks_input && x[i] <= 0.0;
        [
            (0..x.len()).map(|i| x[i] * s[i].powf(-beta)).collect(),
            (0..x.len()).map(|i| if masked(i) { 0.0 } else { gradient(i) }).collect(),
        ]
    }

    fn check(mut layer: Cpu) {
        let values = |seed: usize| {
            (0..PIXELS * layer.channels).map(|i| ((i * 37 + seed * 101) % 211) as f32 / 105.0 - 1.0).collect::<Vec<_>>()
        };
        let (x, mut dy) = (values(1), values(2));
        let expected = x.chunks(layer.channels).zip(dy.chunks(layer.channels));
        let expected: Vec<_> = expected.map(|(x, dy)| definition(&layer, x, dy)).collect();

        let (mut y, mut dx) = (vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]);
        let pass = Pass { batch: PIXELS, training: true, first_sample: 0, share: 1.0 };
        let forward = Forward {
            inputs: &[x[..].into()],
            output: (&mut y[..]).into(),
            params: &[],
            params_rounded: &[],
            saved: SliceMut::empty(),
            scratch: SliceMut::empty(),
        };
        layer.forward(&pass, forward).unwrap();
        let backward = Backward {
            inputs: &[x[..].into()],
            output: Slice::empty(),
            grad_output: (&mut dy[..]).into(),
            grad_inputs: &mut [(&mut dx[..]).into()],
            params: &[],
            params_rounded: &[],
            grad_params: &mut [],
            factors: SliceMut::empty(),
            input_sums: SliceMut::empty(),
            saved: Slice::empty(),
            scratch: SliceMut::empty(),
        };
        layer.backward(&pass, backward).unwrap();

        let Cpu { keys, channels, masks_input } = layer;
        for (number, (what, found)) in [("y", y), ("dx", dx)].into_iter().enumerate() {
            let expected = expected.iter().flat_map(|pixel| &pixel[number]);
            for (at, (&found, &expected)) in found.iter().zip(expected).enumerate() {
                assert!(
                    (f64::from(found) - expected).abs() < 2e-6,
                    "{what} of channel {} of {channels} is {found}, expected {expected}, for {keys:?}, masks {masks_input}",
                    at % channels
                );
            }
        }
    }

    #[test]
    fn blocks_of_channels_join() {
        for channels in [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 13] {
            for depth_radius in [0, 5, MAX_RADIUS] {
                check(Cpu { keys: Lrn { depth_radius, ..KEYS }, channels, masks_input: false });
            }
            check(Cpu { keys: Lrn { beta: 0.6, ..KEYS }, channels, masks_input: false });
            check(Cpu { keys: KEYS, channels, masks_input: true });
        }
    }
}
