use super::Activation;
use crate::error::Result;
use crate::model::simd::vectorized;
use crate::model::{Backward, Forward, Layer, Pass};
use rayon::prelude::*;

pub struct Add {
    pub activation: Activation,
    /// What backward has to undo of it.
    pub undo: Activation,
}

/// Values of a task: the sum stays in the nearest cache while input after input is added.
const CHUNK: usize = 4096;

impl Layer for Add {
    fn forward(&mut self, _: &Pass, mut io: Forward<'_>) -> Result<()> {
        let [first, second, others @ ..] = io.inputs else { unreachable!("infer takes two inputs or more") };
        io.output.f32().par_chunks_mut(CHUNK).enumerate().for_each(|(number, y)| {
            let start = number * CHUNK;
            vectorized(
                #[inline(always)]
                || {
                    let here = start..start + y.len();
                    for ((y, a), b) in y.iter_mut().zip(&first.f32()[here.clone()]).zip(&second.f32()[here.clone()]) {
                        *y = a + b;
                    }
                    for x in others {
                        for (y, x) in y.iter_mut().zip(&x.f32()[here.clone()]) {
                            *y += x;
                        }
                    }
                    self.activation.apply_chunk(y);
                },
            );
        });
        Ok(())
    }

    fn backward(&mut self, _: &Pass, mut io: Backward<'_>) -> Result<()> {
        let mut wanted = io.grad_inputs.iter_mut().filter(|dx| dx.bytes() > 0).map(|dx| dx.f32());
        let Some(first) = wanted.next() else { return Ok(()) };
        self.undo.backward_into(io.output.f32(), io.grad_output.f32(), first);
        for dx in wanted {
            dx.par_chunks_mut(CHUNK).zip(first.par_chunks(CHUNK)).for_each(|(dx, first)| dx.copy_from_slice(first));
        }
        Ok(())
    }
}
