use crate::error::Result;
use crate::model::simd::vectorized;
use crate::model::{Backward, Forward, Layer, Pass, Shape};
use rayon::prelude::*;

pub struct GlobalAvgPool {
    pub input: Shape,
}

impl Layer for GlobalAvgPool {
    fn forward(&mut self, _: &Pass, mut io: Forward<'_>) -> Result<()> {
        let x = io.inputs[0].f32();
        (io.output.f32().par_chunks_exact_mut(self.input.c), x.par_chunks_exact(self.input.len()))
            .into_par_iter()
            .for_each(|(y, x)| {
                vectorized(
                    #[inline(always)]
                    || forward_sample(x, y),
                );
            });
        Ok(())
    }

    fn backward(&mut self, _: &Pass, mut io: Backward<'_>) -> Result<()> {
        let dx = io.grad_inputs[0].f32();
        (dx.par_chunks_exact_mut(self.input.len()), io.grad_output.f32().par_chunks_exact(self.input.c))
            .into_par_iter()
            .for_each(|(dx, dy)| {
                vectorized(
                    #[inline(always)]
                    || backward_sample(dy, dx),
                );
            });
        Ok(())
    }
}

/// x (HW, C), y (C). Sums in f64: an image may have many pixels.
#[inline(always)]
fn forward_sample(x: &[f32], y: &mut [f32]) {
    const BLOCK: usize = 32;
    let c = y.len();
    let pixels = (x.len() / c) as f64;
    for (block, y) in y.chunks_mut(BLOCK).enumerate() {
        let mut sums = [0f64; BLOCK];
        for x in x.chunks_exact(c) {
            for (sum, x) in sums.iter_mut().zip(&x[block * BLOCK..][..y.len()]) {
                *sum += f64::from(*x);
            }
        }
        for (y, sum) in y.iter_mut().zip(sums) {
            *y = (sum / pixels) as f32;
        }
    }
}

/// dy (C), dx (HW, C).
#[inline(always)]
fn backward_sample(dy: &[f32], dx: &mut [f32]) {
    let scale = 1.0 / (dx.len() / dy.len()) as f32;
    for dx in dx.chunks_exact_mut(dy.len()) {
        for (dx, dy) in dx.iter_mut().zip(dy) {
            *dx = dy * scale;
        }
    }
}
