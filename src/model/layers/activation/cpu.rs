use super::Activation;
use crate::error::Result;
use crate::model::simd::vectorized;
use crate::model::{Backward, Forward, Layer, Pass};
use rayon::prelude::*;

pub struct Elementwise(pub Activation);

impl Layer for Elementwise {
    fn forward(&mut self, _: &Pass, mut io: Forward<'_>) -> Result<()> {
        let x = io.inputs[0].f32().par_chunks(CHUNK);
        io.output.f32().par_chunks_mut(CHUNK).zip(x).for_each(|(y, x)| {
            y.copy_from_slice(x);
            self.0.apply(y);
        });
        Ok(())
    }

    fn backward(&mut self, _: &Pass, mut io: Backward<'_>) -> Result<()> {
        let (y, dy) = (io.output.f32().par_chunks(CHUNK), io.grad_output.f32().par_chunks_mut(CHUNK));
        (io.grad_inputs[0].f32().par_chunks_mut(CHUNK), y, dy).into_par_iter().for_each(|(dx, y, dy)| {
            self.0.backward(y, dy);
            dx.copy_from_slice(dy);
        });
        Ok(())
    }
}

/// Values of a task: what is read and what is written fit into the nearest cache together. A shorter buffer stays on the
/// calling thread.
const CHUNK: usize = 4096;

impl Activation {
    /// `y = f(y)` in place.
    pub fn apply(self, y: &mut [f32]) {
        if self != Activation::None {
            y.par_chunks_mut(CHUNK).for_each(|y| {
                vectorized(
                    #[inline(always)]
                    || self.apply_chunk(y),
                );
            });
        }
    }

    /// `dy *= f'(x)`, with f'(x) from the output `y = f(x)`.
    pub fn backward(self, y: &[f32], dy: &mut [f32]) {
        if self != Activation::None {
            dy.par_chunks_mut(CHUNK).zip(y.par_chunks(CHUNK)).for_each(|(dy, y)| {
                vectorized(
                    #[inline(always)]
                    || self.backward_chunk(y, dy),
                );
            });
        }
    }

    #[inline(always)]
    fn apply_chunk(self, y: &mut [f32]) {
        match self {
            Activation::None => {}
            // Not `max`, which turns NaN into 0: a broken value must be seen.
            Activation::Relu => each(y, |y| if y < 0.0 { 0.0 } else { y }),
            Activation::Sigmoid => each(y, |y| 1.0 / (1.0 + (-y).exp())),
            Activation::Tanh => each(y, f32::tanh),
        }
    }

    #[inline(always)]
    fn backward_chunk(self, y: &[f32], dy: &mut [f32]) {
        match self {
            Activation::None => {}
            Activation::Relu => each_pair(y, dy, |y, dy| if y > 0.0 { dy } else { 0.0 }),
            Activation::Sigmoid => each_pair(y, dy, |y, dy| dy * y * (1.0 - y)),
            Activation::Tanh => each_pair(y, dy, |y, dy| dy * (1.0 - y * y)),
        }
    }
}

#[inline(always)]
fn each(y: &mut [f32], f: impl Fn(f32) -> f32) {
    for y in y {
        *y = f(*y);
    }
}

#[inline(always)]
fn each_pair(y: &[f32], dy: &mut [f32], f: impl Fn(f32, f32) -> f32) {
    for (dy, y) in dy.iter_mut().zip(y) {
        *dy = f(*y, *dy);
    }
}
