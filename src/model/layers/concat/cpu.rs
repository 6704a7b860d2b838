use super::super::rows_per_task;
use crate::error::Result;
use crate::model::{Backward, Forward, Layer, Pass};
use rayon::prelude::*;

pub struct Concat {
    /// Channels of each input.
    pub inputs: Vec<usize>,
}

impl Layer for Concat {
    fn forward(&mut self, _: &Pass, mut io: Forward<'_>) -> Result<()> {
        let total: usize = self.inputs.iter().sum();
        let y = io.output.f32();
        let mut start = 0;
        for (x, c) in io.inputs.iter().zip(&self.inputs) {
            (y.par_chunks_exact_mut(total), x.f32().par_chunks_exact(*c))
                .into_par_iter()
                .with_min_len(rows_per_task(*c))
                .for_each(|(y, x)| y[start..start + c].copy_from_slice(x));
            start += c;
        }
        Ok(())
    }

    fn backward(&mut self, _: &Pass, mut io: Backward<'_>) -> Result<()> {
        let total: usize = self.inputs.iter().sum();
        let dy = io.grad_output.f32();
        let mut start = 0;
        for (dx, c) in io.grad_inputs.iter_mut().zip(&self.inputs) {
            (dx.f32().par_chunks_exact_mut(*c), dy.par_chunks_exact(total))
                .into_par_iter()
                .with_min_len(rows_per_task(*c))
                .for_each(|(dx, dy)| dx.copy_from_slice(&dy[start..start + c]));
            start += c;
        }
        Ok(())
    }
}
