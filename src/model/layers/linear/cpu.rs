//! A linear layer's three products, each 2 * batch * inputs * units FLOP:
//!
//! ```text
//! forward            y^T (units, batch)  = W (units, inputs)  x^T (inputs, batch)
//! backward, weight   dW (units, inputs)  = dy^T (units, batch)  x (batch, inputs)
//! backward, data     dx (batch, inputs)  = dy (batch, units)  W (units, inputs)
//! ```
//!
//! The weight is the largest of the matrices: with few samples its way through memory takes as long as the products, so
//! each product moves it once. Forward and backward-data read it where it lies (on the left, and on the right by
//! `multiply_in_place`); backward-weight writes it once, tile by tile. Forward's output comes out transposed, which is cheap
//! to undo. The floor of each is the greater of 2 * batch * inputs * units FLOP and 4 * inputs * units bytes. Every sum
//! has the same order for any number of threads.

use super::super::super::kernels::gemm::{self, Kernel, Left, Out, Right, Store, strided};
use super::super::super::{Backward, Build, Forward, Layer, Pass};
use super::super::Activation;
use crate::device::SliceMut;
use crate::error::Result;
use rayon::prelude::*;

/// Units of a task of forward and of backward-weight.
const TASK_UNITS: usize = 48;
pub struct Linear {
    kernel: &'static Kernel,
    inputs: usize,
    units: usize,
    bias: bool,
    activation: Activation,
    /// What backward has to undo of it.
    undo: Activation,
    threads: usize,
    batch: usize,
    /// Tables of offsets: consecutive ones, and those of rows of (.., inputs), (.., units) and (.., batch).
    consecutive: Vec<u32>,
    by_inputs: Vec<u32>,
    by_units: Vec<u32>,
    by_batch: Vec<u32>,
}

impl Linear {
    pub fn new(inputs: usize, units: usize, bias: bool, activation: Activation, build: &Build<'_>) -> Linear {
        let batch = build.batch;
        Linear {
            kernel: Kernel::best(),
            inputs,
            units,
            bias,
            activation,
            undo: activation.to_undo(build),
            threads: build.threads.max(1),
            batch,
            consecutive: strided(inputs.max(units).max(batch), 1),
            by_inputs: strided(batch.max(units), inputs),
            by_units: strided(batch, units),
            by_batch: strided(units, batch),
        }
    }

    /// x^T and x, packed.
    fn packed_inputs_len(&self) -> usize {
        gemm::packed_len(self.kernel, self.inputs, self.batch)
    }
    fn packed_samples_len(&self) -> usize {
        gemm::packed_len(self.kernel, self.batch, self.inputs)
    }
    fn panel_buffers_len(&self) -> usize {
        self.threads * gemm::panel_buffer_len(self.kernel)
    }
    /// y^T or dy^T: (units, batch), rows `self.batch` long even if the batch is short.
    fn transposed_len(&self) -> usize {
        self.units * self.batch
    }
}

impl Layer for Linear {
    fn scratch_bytes(&self) -> usize {
        let forward = self.packed_inputs_len();
        let backward = self.packed_samples_len().max(self.panel_buffers_len());
        4 * (self.transposed_len() + forward.max(backward))
    }

    fn forward(&mut self, pass: &Pass, io: Forward<'_>) -> Result<()> {
        let (x, weight, y) = (io.inputs[0].f32(), io.params[0].f32(), io.output.into_f32());
        let (packed, transposed) = io.scratch.into_f32().split_at_mut(self.packed_inputs_len());
        let transposed = &mut transposed[..self.transposed_len()];
        let taps = &self.consecutive[..self.inputs];
        gemm::pack_parallel(self.kernel, Right { data: x, rows: taps, step: self.inputs, n: pass.batch }, None, packed);
        transposed
            .par_chunks_mut(TASK_UNITS * self.batch)
            .zip(self.by_inputs[..self.units].par_chunks(TASK_UNITS))
            .for_each(|(y, rows)| {
                let left = Left { data: weight, rows, cols: taps };
                let out = Out { data: y, rows: &self.by_batch[..rows.len()] };
                gemm::multiply(self.kernel, left, packed, pass.batch, out, Store::default());
            });
        transpose(transposed, self.batch, y, self.units);
        if self.bias {
            let bias = io.params[1].f32();
            y.chunks_exact_mut(self.units).for_each(|row| add(row, bias));
        }
        self.activation.apply(y);
        Ok(())
    }

    fn backward(&mut self, pass: &Pass, io: Backward<'_>) -> Result<()> {
        let (x, weight, dy) = (io.inputs[0].f32(), io.params[0].f32(), io.grad_output.into_f32());
        self.undo.backward(io.output.f32(), dy);
        let scratch = io.scratch.into_f32();
        if io.factors.bytes() > 0 {
            let (x_left, dy_left) = io.factors.into_f32().split_at_mut(self.batch * self.inputs);
            x_left[..x.len()].copy_from_slice(x);
            dy_left[..dy.len()].copy_from_slice(dy);
        } else {
            self.backward_params(pass.batch, x, dy, io.grad_params, scratch);
        }
        if io.grad_inputs[0].bytes() > 0 {
            self.backward_data(pass.batch, dy, weight, io.grad_inputs[0].f32(), scratch);
        }
        Ok(())
    }
}

impl Linear {
    fn backward_params(&self, batch: usize, x: &[f32], dy: &[f32], grads: &mut [SliceMut<'_>], scratch: &mut [f32]) {
        let [grad_weight, grad_bias @ ..] = grads else { unreachable!("infer declares a weight") };
        let grad_bias = grad_bias.first_mut().map(|grad| grad.f32());
        self.backward_weight(batch, x, dy, grad_weight.f32(), grad_bias, scratch);
    }

    /// dW (units, inputs) = dy^T x, dbias (units) = the sums of dy^T's rows
    fn backward_weight(
        &self,
        batch: usize,
        x: &[f32],
        dy: &[f32],
        grad_weight: &mut [f32],
        grad_bias: Option<&mut [f32]>,
        scratch: &mut [f32],
    ) {
        let (packed, transposed) = scratch.split_at_mut(self.packed_samples_len());
        let transposed = &mut transposed[..self.transposed_len()];
        transpose(dy, self.units, transposed, self.batch);
        if let Some(grad_bias) = grad_bias {
            let sum = |row: &[f32]| row[..batch].iter().sum();
            grad_bias.iter_mut().zip(transposed.chunks_exact(self.batch)).for_each(|(grad, row)| *grad = sum(row));
        }
        let right = Right { data: x, rows: &self.by_inputs[..batch], step: 1, n: self.inputs };
        gemm::pack_parallel(self.kernel, right, None, packed);
        let tasks = grad_weight.par_chunks_mut(TASK_UNITS * self.inputs).zip(self.by_batch.par_chunks(TASK_UNITS));
        tasks.for_each(|(grad, rows)| {
            let left = Left { data: transposed, rows, cols: &self.consecutive[..batch] };
            let out = Out { data: grad, rows: &self.by_inputs[..rows.len()] };
            gemm::multiply(self.kernel, left, packed, self.inputs, out, Store::default());
        });
    }

    /// dx (batch, inputs) = dy W
    fn backward_data(&self, batch: usize, dy: &[f32], weight: &[f32], grad: &mut [f32], buffers: &mut [f32]) {
        let right = Right { data: weight, rows: &self.by_inputs[..self.units], step: 1, n: self.inputs };
        let left = Left { data: dy, rows: &self.by_units[..batch], cols: &self.consecutive[..self.units] };
        let out = Out { data: grad, rows: &self.by_inputs[..batch] };
        let buffers = &mut buffers[..self.panel_buffers_len()];
        gemm::multiply_in_place(self.kernel, left, right, buffers, out, Store::default());
    }
}

fn add(sums: &mut [f32], values: &[f32]) {
    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

/// to(j, i) = from(i, j), in squares that fit L1. Rows are `from_row` and `to_row` long; the shorter ones decide.
pub fn transpose(from: &[f32], from_row: usize, to: &mut [f32], to_row: usize) {
    const SIDE: usize = 16;
    let (rows, cols) = ((from.len() / from_row).min(to_row), (to.len() / to_row).min(from_row));
    for i in (0..rows).step_by(SIDE) {
        for j in (0..cols).step_by(SIDE) {
            for i in i..rows.min(i + SIDE) {
                for j in j..cols.min(j + SIDE) {
                    to[j * to_row + i] = from[i * from_row + j];
                }
            }
        }
    }
}
