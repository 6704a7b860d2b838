use super::Activation;
use crate::error::Result;
use crate::model::kernels::math;
use crate::model::simd::vectorized;
use crate::model::{Backward, Forward, Layer, Pass};
use rayon::prelude::*;

pub struct Elementwise {
    pub activation: Activation,
    /// What backward has to undo.
    pub undo: Activation,
}

impl Layer for Elementwise {
    fn forward(&mut self, _: &Pass, mut io: Forward<'_>) -> Result<()> {
        self.activation.map(io.inputs[0].f32(), io.output.f32());
        Ok(())
    }

    fn backward(&mut self, _: &Pass, mut io: Backward<'_>) -> Result<()> {
        self.undo.backward_into(io.output.f32(), io.grad_output.f32(), io.grad_inputs[0].f32());
        Ok(())
    }
}

/// Values of a task: what is read and what is written fit into the nearest cache together. A shorter buffer stays on the
/// calling thread.
const CHUNK: usize = 4096;

impl Activation {
    /// `y = f(x)`
    fn map(self, x: &[f32], y: &mut [f32]) {
        y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| {
            vectorized(
                #[inline(always)]
                || match self {
                    Activation::None => y.copy_from_slice(x),
                    Activation::Relu => each(x, y, relu),
                    Activation::Sigmoid => each(x, y, math::sigmoid),
                    Activation::Tanh => each(x, y, math::tanh),
                },
            );
        });
    }

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

    /// `dx = f'(x) dy`, with f'(x) from the output `y = f(x)`; `y` is empty without an activation.
    pub fn backward_into(self, y: &[f32], dy: &[f32], dx: &mut [f32]) {
        dx.par_chunks_mut(CHUNK).zip(dy.par_chunks(CHUNK)).enumerate().for_each(|(number, (dx, dy))| {
            let start = (number * CHUNK).min(y.len());
            let y = &y[start..y.len().min(start + dx.len())];
            vectorized(
                #[inline(always)]
                || match self {
                    Activation::None => dx.copy_from_slice(dy),
                    Activation::Relu => each_pair(y, dy, dx, relu_slope),
                    Activation::Sigmoid => each_pair(y, dy, dx, sigmoid_slope),
                    Activation::Tanh => each_pair(y, dy, dx, tanh_slope),
                },
            );
        });
    }

    /// `y = f(y)`; inlined into the vectorised loops of layers that fuse it.
    #[inline(always)]
    pub fn apply_chunk(self, y: &mut [f32]) {
        match self {
            Activation::None => {}
            Activation::Relu => each_in_place(y, relu),
            Activation::Sigmoid => each_in_place(y, math::sigmoid),
            Activation::Tanh => each_in_place(y, math::tanh),
        }
    }

    #[inline(always)]
    fn backward_chunk(self, y: &[f32], dy: &mut [f32]) {
        match self {
            Activation::None => {}
            Activation::Relu => scale(y, dy, relu_slope),
            Activation::Sigmoid => scale(y, dy, sigmoid_slope),
            Activation::Tanh => scale(y, dy, tanh_slope),
        }
    }
}

/// Not `max`, which turns NaN into 0: a broken value must be seen.
#[inline(always)]
fn relu(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

#[inline(always)]
fn relu_slope(y: f32, dy: f32) -> f32 {
    if y > 0.0 { dy } else { 0.0 }
}

#[inline(always)]
fn sigmoid_slope(y: f32, dy: f32) -> f32 {
    dy * y * (1.0 - y)
}

#[inline(always)]
fn tanh_slope(y: f32, dy: f32) -> f32 {
    dy * (1.0 - y * y)
}

#[inline(always)]
fn each(x: &[f32], y: &mut [f32], f: impl Fn(f32) -> f32) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = f(*x);
    }
}

#[inline(always)]
fn each_in_place(y: &mut [f32], f: impl Fn(f32) -> f32) {
    for y in y {
        *y = f(*y);
    }
}

#[inline(always)]
fn scale(y: &[f32], dy: &mut [f32], f: impl Fn(f32, f32) -> f32) {
    for (dy, y) in dy.iter_mut().zip(y) {
        *dy = f(*y, *dy);
    }
}

#[inline(always)]
fn each_pair(y: &[f32], dy: &[f32], dx: &mut [f32], f: impl Fn(f32, f32) -> f32) {
    for ((dx, y), dy) in dx.iter_mut().zip(y).zip(dy) {
        *dx = f(*y, *dy);
    }
}
