//! Channels are contiguous, so a block of them is compared at once and stays in registers while the window's taps go by.

use super::super::{Window, rows_per_task};
use crate::error::Result;
use crate::model::simd::vectorized;
use crate::model::{Backward, Forward, Layer, Pass};
use rayon::prelude::*;

pub struct MaxPool {
    pub window: Window,
    pub channels: usize,
}

impl Layer for MaxPool {
    fn forward(&mut self, _: &Pass, mut io: Forward<'_>) -> Result<()> {
        let (window, c) = (self.window, self.channels);
        let image = window.rows.input * window.columns.input * c;
        let row = window.columns.output * c;
        let x = io.inputs[0].f32();
        let y = io.output.f32();
        let winner = &mut io.saved.u8()[..y.len()];
        (y.par_chunks_exact_mut(row), winner.par_chunks_exact_mut(row))
            .into_par_iter()
            .with_min_len(rows_per_task(row * window.rows.size * window.columns.size))
            .enumerate()
            .for_each(|(number, (y, winner))| {
                let (sample, oh) = (number / window.rows.output, number % window.rows.output);
                let x = &x[sample * image..][..image];
                vectorized(
                    #[inline(always)]
                    || forward_row(&window, oh, c, x, y, winner),
                );
            });
        Ok(())
    }

    fn backward(&mut self, _: &Pass, mut io: Backward<'_>) -> Result<()> {
        let (window, c) = (self.window, self.channels);
        let image = window.rows.input * window.columns.input * c;
        let output = window.rows.output * window.columns.output * c;
        let (dy, winner) = (io.grad_output.f32(), io.saved.u8());
        let dx = io.grad_inputs[0].f32();
        (dx.par_chunks_exact_mut(image), dy.par_chunks_exact(output), winner.par_chunks_exact(output))
            .into_par_iter()
            .for_each(|(dx, dy, winner)| {
                vectorized(
                    #[inline(always)]
                    || backward_sample(&window, c, dy, winner, dx),
                );
            });
        Ok(())
    }
}

/// One row of the output: x (H, W, C), y (OW, C), winner (OW, C): the tap at which the largest value lies, the first if
/// several are equal. NaN wins, as in PyTorch, so that a broken value is seen rather than dropped.
#[inline(always)]
fn forward_row(window: &Window, oh: usize, c: usize, x: &[f32], y: &mut [f32], winner: &mut [u8]) {
    for (ow, (y, winner)) in y.chunks_exact_mut(c).zip(winner.chunks_exact_mut(c)).enumerate() {
        let mut start = 0;
        while start < c {
            start += match c - start {
                16.. => forward_block::<16>(window, (oh, ow), &x[start..], c, &mut y[start..], &mut winner[start..]),
                8.. => forward_block::<8>(window, (oh, ow), &x[start..], c, &mut y[start..], &mut winner[start..]),
                _ => forward_block::<1>(window, (oh, ow), &x[start..], c, &mut y[start..], &mut winner[start..]),
            };
        }
    }
}

/// The first N channels of output pixel (oh, ow). The loops over taps stand here, not in a closure: the compiler keeps
/// the block in registers only so (four times as fast).
#[inline(always)]
fn forward_block<const N: usize>(
    window: &Window,
    (oh, ow): (usize, usize),
    x: &[f32],
    c: usize,
    y: &mut [f32],
    winner: &mut [u8],
) -> usize {
    let (rows, columns) = (&window.rows, &window.columns);
    let (mut best, mut at) = ([f32::NEG_INFINITY; N], [window.first_tap(oh, ow) as u32; N]);
    for kh in rows.taps(oh) {
        for kw in columns.taps(ow) {
            let pixel = rows.position(oh, kh) * columns.input + columns.position(ow, kw);
            let tap = (kh * columns.size + kw) as u32;
            let x: &[f32; N] = x[pixel * c..][..N].try_into().unwrap();
            for i in 0..N {
                let larger = (x[i] > best[i]) | x[i].is_nan();
                best[i] = if larger { x[i] } else { best[i] };
                at[i] = if larger { tap } else { at[i] };
            }
        }
    }
    y[..N].copy_from_slice(&best);
    for (winner, at) in winner[..N].iter_mut().zip(at) {
        *winner = at as u8;
    }
    N
}

/// dy (OH, OW, C), winner (OH, OW, C), dx (H, W, C): the gradient goes to the winner; windows that share one add up.
#[inline(always)]
fn backward_sample(window: &Window, c: usize, dy: &[f32], winner: &[u8], dx: &mut [f32]) {
    dx.fill(0.0);
    let pixels = dy.chunks_exact(c).zip(winner.chunks_exact(c));
    for (number, (dy, winner)) in pixels.enumerate() {
        let (oh, ow) = (number / window.columns.output, number % window.columns.output);
        window.each_tap(oh, ow, |tap, pixel| {
            let dx = &mut dx[pixel * c..][..c];
            for ((dx, dy), winner) in dx.iter_mut().zip(dy).zip(winner) {
                *dx += if *winner == tap as u8 { *dy } else { 0.0 };
            }
        });
    }
}
