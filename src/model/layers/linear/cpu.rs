//! A linear layer's three products, each 2 * batch * inputs * units FLOP:
//!
//! ```text
//! forward            y^T (units, batch)  = W (units, inputs)  x^T (inputs, batch)
//! backward, weight   dW (units, inputs)  = dy^T (units, batch)  x (batch, inputs)
//! backward, data     dx (batch, inputs)  = dy (batch, units)  W (units, inputs)
//! ```
//!
//! The weight is the largest of the matrices: where it stands on the left it is read in place, once, and the output
//! comes out transposed, which is cheap to undo. In backward-data it stands on the right and is packed block by block,
//! each as large as stays in L2 until it is used. Every sum has the same order for any number of threads.

use super::super::super::kernels::gemm::{self, Kernel, Left, Out, Right, Store, strided};
use super::super::super::{Backward, Build, Forward, Layer, Pass};
use super::super::Activation;
use crate::error::Result;
use rayon::prelude::*;

/// Units of a task of forward and of backward-weight.
const TASK_UNITS: usize = 48;
/// Inputs and units of a block of the weight in backward-data: 384 * 192 * 4 bytes = 288 KiB of L2.
const BLOCK_INPUTS: usize = 384;
const BLOCK_UNITS: usize = 192;

pub struct Linear {
    kernel: &'static Kernel,
    inputs: usize,
    units: usize,
    bias: bool,
    activation: Activation,
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
    fn packed_block_len(&self) -> usize {
        gemm::packed_len(self.kernel, BLOCK_UNITS.min(self.units), BLOCK_INPUTS.min(self.inputs))
    }
    /// y^T or dy^T: (units, batch), rows `self.batch` long even if the batch is short.
    fn transposed_len(&self) -> usize {
        self.units * self.batch
    }
}

impl Layer for Linear {
    fn scratch_bytes(&self) -> usize {
        let forward = self.packed_inputs_len();
        let backward = self.packed_samples_len().max(self.packed_block_len());
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
        if self.activation != Activation::None {
            self.activation.backward(io.output.f32(), dy);
        }
        let scratch = io.scratch.into_f32();
        match io.grad_params {
            [grad_weight, grad_bias @ ..] => {
                self.backward_weight(pass.batch, x, dy, grad_weight.f32(), scratch);
                for grad_bias in grad_bias {
                    let grad_bias = grad_bias.f32();
                    grad_bias.fill(0.0);
                    dy.chunks_exact(self.units).for_each(|row| add(grad_bias, row));
                }
            }
            [] => unreachable!("infer declares a weight"),
        }
        if io.grad_inputs[0].bytes() > 0 {
            self.backward_data(pass.batch, dy, weight, io.grad_inputs[0].f32(), scratch);
        }
        Ok(())
    }
}

impl Linear {
    /// dW (units, inputs) = dy^T x
    fn backward_weight(&self, batch: usize, x: &[f32], dy: &[f32], grad: &mut [f32], scratch: &mut [f32]) {
        let (packed, transposed) = scratch.split_at_mut(self.packed_samples_len());
        let transposed = &mut transposed[..self.transposed_len()];
        transpose(dy, self.units, transposed, self.batch);
        let right = Right { data: x, rows: &self.by_inputs[..batch], step: 1, n: self.inputs };
        gemm::pack_parallel(self.kernel, right, None, packed);
        grad.par_chunks_mut(TASK_UNITS * self.inputs).zip(self.by_batch.par_chunks(TASK_UNITS)).for_each(
            |(grad, rows)| {
                let left = Left { data: transposed, rows, cols: &self.consecutive[..batch] };
                let out = Out { data: grad, rows: &self.by_inputs[..rows.len()] };
                gemm::multiply(self.kernel, left, packed, self.inputs, out, Store::default());
            },
        );
    }

    /// dx (batch, inputs) = dy W, block by block of W.
    fn backward_data(&self, batch: usize, dy: &[f32], weight: &[f32], grad: &mut [f32], packed: &mut [f32]) {
        let share = batch.div_ceil(self.threads);
        for input in (0..self.inputs).step_by(BLOCK_INPUTS) {
            let n = BLOCK_INPUTS.min(self.inputs - input);
            for unit in (0..self.units).step_by(BLOCK_UNITS) {
                let k = BLOCK_UNITS.min(self.units - unit);
                let block = &weight[unit * self.inputs + input..];
                let right = Right { data: block, rows: &self.by_inputs[..k], step: 1, n };
                gemm::pack_parallel(self.kernel, right, None, packed);
                let store = Store { accumulate: unit > 0, relu: false };
                grad.par_chunks_mut(share * self.inputs).zip(self.by_units[..batch].par_chunks(share)).for_each(
                    |(grad, rows)| {
                        let left = Left { data: &dy[unit..], rows, cols: &self.consecutive[..k] };
                        let out = Out { data: &mut grad[input..], rows: &self.by_inputs[..rows.len()] };
                        gemm::multiply(self.kernel, left, packed, n, out, store);
                    },
                );
            }
        }
    }
}

fn add(sums: &mut [f32], values: &[f32]) {
    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

/// to(j, i) = from(i, j), in squares that fit L1. Rows are `from_row` and `to_row` long; the shorter ones decide.
fn transpose(from: &[f32], from_row: usize, to: &mut [f32], to_row: usize) {
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
