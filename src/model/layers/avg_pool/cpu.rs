use super::super::{Window, rows_per_task};
use crate::error::Result;
use crate::model::simd::vectorized;
use crate::model::{Backward, Forward, Layer, Pass};
use rayon::prelude::*;

pub struct AvgPool {
    pub window: Window,
    pub channels: usize,
}

impl Layer for AvgPool {
    fn forward(&mut self, _: &Pass, mut io: Forward<'_>) -> Result<()> {
        let (window, c) = (self.window, self.channels);
        let image = window.rows.input * window.columns.input * c;
        let row = window.columns.output * c;
        let x = io.inputs[0].f32();
        io.output
            .f32()
            .par_chunks_exact_mut(row)
            .with_min_len(rows_per_task(row * window.rows.size * window.columns.size))
            .enumerate()
            .for_each(|(number, y)| {
                let (sample, oh) = (number / window.rows.output, number % window.rows.output);
                let x = &x[sample * image..][..image];
                vectorized(
                    #[inline(always)]
                    || forward_row(&window, oh, c, x, y),
                );
            });
        Ok(())
    }

    fn backward(&mut self, _: &Pass, mut io: Backward<'_>) -> Result<()> {
        let (window, c) = (self.window, self.channels);
        let image = window.rows.input * window.columns.input * c;
        let output = window.rows.output * window.columns.output * c;
        let dx = io.grad_inputs[0].f32();
        (dx.par_chunks_exact_mut(image), io.grad_output.f32().par_chunks_exact(output)).into_par_iter().for_each(
            |(dx, dy)| {
                vectorized(
                    #[inline(always)]
                    || backward_sample(&window, c, dy, dx),
                );
            },
        );
        Ok(())
    }
}

/// One row of the output: x (H, W, C), y (OW, C).
#[inline(always)]
fn forward_row(window: &Window, oh: usize, c: usize, x: &[f32], y: &mut [f32]) {
    let scale = 1.0 / (window.rows.size * window.columns.size) as f32;
    for (ow, y) in y.chunks_exact_mut(c).enumerate() {
        y.fill(0.0);
        window.each_tap(oh, ow, |_, pixel| {
            for (y, x) in y.iter_mut().zip(&x[pixel * c..][..c]) {
                *y += x;
            }
        });
        y.iter_mut().for_each(|y| *y *= scale);
    }
}

/// dy (OH, OW, C), dx (H, W, C): every value under a window gets its share.
#[inline(always)]
fn backward_sample(window: &Window, c: usize, dy: &[f32], dx: &mut [f32]) {
    let scale = 1.0 / (window.rows.size * window.columns.size) as f32;
    dx.fill(0.0);
    for (number, dy) in dy.chunks_exact(c).enumerate() {
        let (oh, ow) = (number / window.columns.output, number % window.columns.output);
        window.each_tap(oh, ow, |_, pixel| {
            for (dx, dy) in dx[pixel * c..][..c].iter_mut().zip(dy) {
                *dx += dy * scale;
            }
        });
    }
}
