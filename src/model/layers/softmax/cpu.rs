use super::super::rows_per_task;
use crate::error::Result;
use crate::model::{Backward, Forward, Layer, Pass};
use rayon::prelude::*;

pub struct Softmax {
    pub channels: usize,
}

impl Layer for Softmax {
    fn forward(&mut self, _: &Pass, mut io: Forward<'_>) -> Result<()> {
        let c = self.channels;
        (io.output.f32().par_chunks_exact_mut(c), io.inputs[0].f32().par_chunks_exact(c))
            .into_par_iter()
            .with_min_len(rows_per_task(c * 8))
            .for_each(|(y, x)| {
                y.copy_from_slice(x);
                softmax(y);
            });
        Ok(())
    }

    fn backward(&mut self, _: &Pass, mut io: Backward<'_>) -> Result<()> {
        let c = self.channels;
        let (y, dy) = (io.output.f32(), io.grad_output.f32());
        (io.grad_inputs[0].f32().par_chunks_exact_mut(c), y.par_chunks_exact(c), dy.par_chunks_exact(c))
            .into_par_iter()
            .with_min_len(rows_per_task(c * 2))
            .for_each(|(dx, y, dy)| backward_row(y, dy, dx));
        Ok(())
    }
}

/// row (C) in place: exp(x_i) / sum of exp(x_j), shifted by the largest so that nothing overflows.
fn softmax(row: &mut [f32]) {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter_mut().for_each(|x| *x = (*x - largest).exp());
    let sum: f32 = row.iter().sum();
    row.iter_mut().for_each(|x| *x /= sum);
}

/// y (C), dy (C), dx (C): dx_i = y_i * (dy_i - sum of y_j dy_j).
fn backward_row(y: &[f32], dy: &[f32], dx: &mut [f32]) {
    let mean: f32 = y.iter().zip(dy).map(|(y, dy)| y * dy).sum();
    for ((dx, y), dy) in dx.iter_mut().zip(y).zip(dy) {
        *dx = y * (dy - mean);
    }
}
