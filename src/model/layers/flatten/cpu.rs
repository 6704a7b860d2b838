use crate::error::Result;
use crate::model::{Backward, Forward, Layer, Pass, Shape};
use rayon::prelude::*;

pub struct Flatten {
    pub input: Shape,
}

impl Flatten {
    /// Transposes every sample from (rows, columns) to (columns, rows).
    fn each_sample(&self, columns: usize, from: &[f32], to: &mut [f32]) {
        let values = self.input.len();
        (to.par_chunks_exact_mut(values), from.par_chunks_exact(values))
            .into_par_iter()
            .for_each(|(to, from)| transpose(columns, from, to));
    }
}

impl Layer for Flatten {
    fn forward(&mut self, _: &Pass, mut io: Forward<'_>) -> Result<()> {
        self.each_sample(self.input.c, io.inputs[0].f32(), io.output.f32());
        Ok(())
    }

    fn backward(&mut self, _: &Pass, mut io: Backward<'_>) -> Result<()> {
        self.each_sample(self.input.h * self.input.w, io.grad_output.f32(), io.grad_inputs[0].f32());
        Ok(())
    }
}

/// from (R, C), to (C, R).
fn transpose(columns: usize, from: &[f32], to: &mut [f32]) {
    let rows = from.len() / columns;
    if rows == 1 || columns == 1 {
        return to.copy_from_slice(from);
    }
    for (column, to) in to.chunks_exact_mut(rows).enumerate() {
        for (to, from) in to.iter_mut().zip(from[column..].iter().step_by(columns)) {
            *to = *from;
        }
    }
}
