//! Channels are contiguous, so a block of them is compared at once and stays in registers while the window's taps go by.
//! Forward reads the input once from memory and writes output and winners; backward reads gradient and winners and writes
//! the input's gradient once: 4 (H W + OH OW) + OH OW bytes a channel in each direction.
//!
//! Behind a ReLU, backward does the ReLU's too, at no cost: a window's winner lets its gradient through if it is above 0,
//! which forward knows, so that it notes `NO_TAP` where nothing is.

use super::super::{Window, rows_per_task};
use crate::error::Result;
use crate::model::simd::vectorized;
use crate::model::{Backward, Forward, Layer, Pass};
use rayon::prelude::*;

pub struct MaxPool {
    pub window: Window,
    pub channels: usize,
    /// Whether the input comes from a ReLU whose backward is done here.
    pub masks_input: bool,
}

impl Layer for MaxPool {
    fn forward(&mut self, _: &Pass, mut io: Forward<'_>) -> Result<()> {
        let (window, c, masks) = (self.window, self.channels, self.masks_input);
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
                    || {
                        forward_row(&window, oh, c, x, y, winner);
                        if masks {
                            mask(y, winner);
                        }
                    },
                );
            });
        Ok(())
    }

    fn backward(&mut self, _: &Pass, mut io: Backward<'_>) -> Result<()> {
        let (window, c) = (self.window, self.channels);
        let row = window.columns.input * c;
        let output = window.rows.output * window.columns.output * c;
        let (dy, winner) = (io.grad_output.f32(), io.saved.u8());
        let dx = io.grad_inputs[0].f32().par_chunks_exact_mut(row);
        dx.with_min_len(rows_per_task(row)).enumerate().for_each(|(number, dx)| {
            let (sample, ih) = (number / window.rows.input, number % window.rows.input);
            let (dy, winner) = (&dy[sample * output..][..output], &winner[sample * output..][..output]);
            vectorized(
                #[inline(always)]
                || backward_row(&window, ih, c, dy, winner, dx),
            );
        });
        Ok(())
    }
}

/// In place of a tap: the ReLU in front lets no gradient through to this window.
const NO_TAP: u8 = u8::MAX;

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

/// y (OW, C), winner (OW, C)
#[inline(always)]
fn mask(y: &[f32], winner: &mut [u8]) {
    for (winner, y) in winner.iter_mut().zip(y) {
        *winner = if *y > 0.0 { *winner } else { NO_TAP };
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

/// One row of the input's gradient: dy (OH, OW, C), winner (OH, OW, C), dx (W, C). Each value is gathered from the windows
/// that see it, in their order, and written once.
#[inline(always)]
fn backward_row(window: &Window, ih: usize, c: usize, dy: &[f32], winner: &[u8], dx: &mut [f32]) {
    for (iw, dx) in dx.chunks_exact_mut(c).enumerate() {
        let mut start = 0;
        while start < c {
            start += match c - start {
                32.. => backward_block::<32>(window, (ih, iw), c, &dy[start..], &winner[start..], &mut dx[start..]),
                8.. => backward_block::<8>(window, (ih, iw), c, &dy[start..], &winner[start..], &mut dx[start..]),
                _ => backward_block::<1>(window, (ih, iw), c, &dy[start..], &winner[start..], &mut dx[start..]),
            };
        }
    }
}

/// The first N channels of input pixel (ih, iw).
#[inline(always)]
fn backward_block<const N: usize>(
    window: &Window,
    (ih, iw): (usize, usize),
    c: usize,
    dy: &[f32],
    winner: &[u8],
    dx: &mut [f32],
) -> usize {
    let (rows, columns) = (&window.rows, &window.columns);
    let mut sum = [0f32; N];
    for oh in rows.windows(ih) {
        for ow in columns.windows(iw) {
            let pixel = (oh * columns.output + ow) * c;
            let tap = (rows.tap(oh, ih) * columns.size + columns.tap(ow, iw)) as u8;
            let dy: &[f32; N] = dy[pixel..][..N].try_into().unwrap();
            let winner: &[u8; N] = winner[pixel..][..N].try_into().unwrap();
            for i in 0..N {
                sum[i] += if winner[i] == tap { dy[i] } else { 0.0 };
            }
        }
    }
    dx[..N].copy_from_slice(&sum);
    N
}
