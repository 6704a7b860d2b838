use crate::error::Result;
use crate::model::simd::vectorized;
use crate::model::{Backward, Forward, Layer, Pass, Shape};
use rayon::prelude::*;

pub struct GlobalMaxPool {
    pub input: Shape,
}

impl Layer for GlobalMaxPool {
    fn forward(&mut self, _: &Pass, mut io: Forward<'_>) -> Result<()> {
        let (image, c) = (self.input.len(), self.input.c);
        let y = io.output.f32();
        let winner: &mut [u32] = &mut bytemuck::cast_slice_mut(io.saved.u8())[..y.len()];
        (io.inputs[0].f32().par_chunks_exact(image), y.par_chunks_exact_mut(c), winner.par_chunks_exact_mut(c))
            .into_par_iter()
            .for_each(|(x, y, winner)| {
                vectorized(
                    #[inline(always)]
                    || forward_sample(x, y, winner),
                );
            });
        Ok(())
    }

    fn backward(&mut self, _: &Pass, mut io: Backward<'_>) -> Result<()> {
        let (image, c) = (self.input.len(), self.input.c);
        let winner: &[u32] = bytemuck::cast_slice(io.saved.u8());
        let dx = io.grad_inputs[0].f32().par_chunks_exact_mut(image);
        (dx, io.grad_output.f32().par_chunks_exact(c), winner.par_chunks_exact(c)).into_par_iter().for_each(
            |(dx, dy, winner)| {
                dx.fill(0.0);
                for (channel, (dy, pixel)) in dy.iter().zip(winner).enumerate() {
                    dx[*pixel as usize * c + channel] = *dy;
                }
            },
        );
        Ok(())
    }
}

/// x (HW, C), y (C), winner (C): the first pixel that holds the largest value. NaN wins, as in max_pool.
#[inline(always)]
fn forward_sample(x: &[f32], y: &mut [f32], winner: &mut [u32]) {
    y.fill(f32::NEG_INFINITY);
    winner.fill(0);
    for (pixel, x) in x.chunks_exact(y.len()).enumerate() {
        for ((y, winner), x) in y.iter_mut().zip(winner.iter_mut()).zip(x) {
            let larger = (*x > *y) | x.is_nan();
            *y = if larger { *x } else { *y };
            *winner = if larger { pixel as u32 } else { *winner };
        }
    }
}
