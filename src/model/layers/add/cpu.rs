use super::Activation;
use crate::error::Result;
use crate::model::simd::vectorized;
use crate::model::{Backward, Forward, Layer, Pass};
use rayon::prelude::*;

pub struct Add {
    pub activation: Activation,
}

/// Values of a task: the sum stays in the nearest cache while input after input is added.
const CHUNK: usize = 4096;

impl Layer for Add {
    fn forward(&mut self, _: &Pass, mut io: Forward<'_>) -> Result<()> {
        let (first, others) = io.inputs.split_first().expect("two inputs or more");
        io.output.f32().par_chunks_mut(CHUNK).enumerate().for_each(|(number, y)| {
            let here = number * CHUNK..number * CHUNK + y.len();
            y.copy_from_slice(&first.f32()[here.clone()]);
            others.iter().for_each(|x| add(y, &x.f32()[here.clone()]));
            self.activation.apply(y);
        });
        Ok(())
    }

    fn backward(&mut self, _: &Pass, mut io: Backward<'_>) -> Result<()> {
        self.activation.backward(io.output.f32(), io.grad_output.f32());
        let dy = io.grad_output.f32();
        for dx in io.grad_inputs.iter_mut().filter(|dx| dx.bytes() > 0) {
            dx.f32().par_chunks_mut(CHUNK).zip(dy.par_chunks(CHUNK)).for_each(|(dx, dy)| dx.copy_from_slice(dy));
        }
        Ok(())
    }
}

/// y += x
fn add(y: &mut [f32], x: &[f32]) {
    vectorized(
        #[inline(always)]
        || {
            for (y, x) in y.iter_mut().zip(x) {
                *y += x;
            }
        },
    );
}
