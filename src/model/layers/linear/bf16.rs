//! The linear layer in bf16, for CPUs that multiply bf16 matrices: 2 * batch * inputs * units FLOP in each of
//!
//! ```text
//! forward            y^T (units, batch)  = W (units, inputs)  x^T (inputs, batch)
//! backward, weight   dW (units, inputs)  = dy^T (units, batch)  x (batch, inputs)
//! backward, data     dx (batch, inputs)  = dy (batch, units)  W (units, inputs)
//! ```
//!
//! With few samples what costs is the weight's way through memory: 2 bytes a value in forward and in backward-data, and 4
//! for its gradient. As in f32 it stands on the left in forward, read in place, and in backward-data it is packed block by
//! block in L2. The sums of y^T and dx are kept in f32 until they are whole, and rounded once. Every sum has the same order
//! for any number of threads.

use super::super::super::kernels::convert::{narrow, nearest, widen};
use super::super::super::kernels::gemm::strided;
use super::super::super::kernels::gemm16::{self, Kernel, Left, Out, Right, Store};
use super::super::super::{Backward, Build, Forward, Layer, Pass};
use super::super::activation::bf16::{add_rows, mask};
use crate::error::Result;
use half::bf16;
use rayon::prelude::*;

/// Inputs and units of a block of the weight in backward-data: 256 * 1024 * 2 bytes = 512 KiB of L2.
const BLOCK_INPUTS: usize = 256;
const BLOCK_UNITS: usize = 1024;

pub struct Linear {
    kernel: &'static Kernel,
    inputs: usize,
    units: usize,
    bias: bool,
    relu: bool,
    threads: usize,
    batch: usize,
    /// Tables of offsets: consecutive ones, and those of rows of (.., inputs), (.., units), (.., batch) and (..,
    /// BLOCK_INPUTS).
    consecutive: Vec<u32>,
    by_inputs: Vec<u32>,
    by_units: Vec<u32>,
    by_batch: Vec<u32>,
    by_block: Vec<u32>,
}

impl Linear {
    pub fn new(
        kernel: &'static Kernel,
        (inputs, units): (usize, usize),
        bias: bool,
        relu: bool,
        build: &Build<'_>,
    ) -> Linear {
        let batch = build.batch;
        Linear {
            kernel,
            inputs,
            units,
            bias,
            relu,
            threads: build.threads.max(1),
            batch,
            consecutive: strided(inputs.max(units), 1),
            by_inputs: strided(batch.max(units), inputs),
            by_units: strided(batch, units),
            by_batch: strided(units, batch),
            by_block: strided(batch, BLOCK_INPUTS),
        }
    }

    /// f32 words of x^T and of x, packed.
    fn packed_inputs_len(&self) -> usize {
        gemm16::packed_len(self.kernel, self.inputs, self.batch)
    }
    fn packed_samples_len(&self) -> usize {
        gemm16::packed_len(self.kernel, self.batch, self.inputs)
    }
    /// Sums of y^T, and of dx block by block.
    fn output_sums_len(&self) -> usize {
        self.units * self.batch
    }
    fn block_sums_len(&self) -> usize {
        self.batch * BLOCK_INPUTS
    }
    fn blocks(&self) -> usize {
        self.inputs.div_ceil(BLOCK_INPUTS)
    }
    /// Scratch of one thread: a packed block of the weight, and what a product needs.
    fn packed_block_len(&self) -> usize {
        gemm16::packed_len(self.kernel, BLOCK_UNITS.min(self.units), BLOCK_INPUTS.min(self.inputs))
    }
    fn worker_len(&self) -> usize {
        self.packed_block_len() + gemm16::scratch_len(self.kernel)
    }

    fn share(&self, count: usize) -> usize {
        count.div_ceil(self.threads).max(1)
    }
}

impl Layer for Linear {
    fn scratch_bytes(&self) -> usize {
        let forward = self.packed_inputs_len() + self.output_sums_len();
        let backward = self.packed_samples_len().max(self.blocks() * self.block_sums_len());
        size_of::<f32>() * (forward.max(backward) + self.threads * self.worker_len())
    }

    fn forward(&mut self, pass: &Pass, io: Forward<'_>) -> Result<()> {
        let (x, weight) = (io.inputs[0].bf16(), io.params_rounded[0].bf16());
        let (workers, scratch) = io.scratch.into_f32().split_at_mut(self.threads * self.worker_len());
        let (packed, sums) = scratch.split_at_mut(self.packed_inputs_len());
        let sums = &mut sums[..self.output_sums_len()];
        let taps = &self.consecutive[..self.inputs];
        gemm16::pack_parallel(
            self.kernel,
            Right { data: x, rows: taps, step: self.inputs, n: pass.batch },
            None,
            packed,
        );
        let (layer, packed, share) = (&*self, &*packed, self.share(self.units));
        let shares = sums.par_chunks_mut(share * self.batch).zip(self.by_inputs[..self.units].par_chunks(share));
        shares.zip(workers.par_chunks_mut(self.worker_len())).for_each(|((sums, rows), worker)| {
            let left = Left { data: weight, rows, cols: taps };
            let out = Out { data: sums, rows: &layer.by_batch[..rows.len()] };
            gemm16::multiply(layer.kernel, left, packed, pass.batch, out, Store::default(), worker);
        });
        let bias = self.bias.then(|| io.params[1].f32());
        self.finish_output(sums, bias, io.output.into_bf16());
        Ok(())
    }

    fn backward(&mut self, pass: &Pass, io: Backward<'_>) -> Result<()> {
        let (x, weight, dy) = (io.inputs[0].bf16(), io.params_rounded[0].bf16(), io.grad_output.into_bf16());
        // Without an output to read, ReLU's backward is done, or there is none.
        mask(io.output.bf16(), dy);
        let (workers, scratch) = io.scratch.into_f32().split_at_mut(self.threads * self.worker_len());
        match io.grad_params {
            _ if io.factors.bytes() > 0 => {
                let (x_left, dy_left) = io.factors.into_f32().split_at_mut(self.batch * self.inputs);
                widen(x, &mut x_left[..x.len()]);
                widen(dy, &mut dy_left[..dy.len()]);
            }
            [grad_weight, grad_bias @ ..] => {
                self.backward_weight(pass.batch, x, dy, grad_weight.f32(), scratch, workers);
                for grad_bias in grad_bias {
                    let grad_bias = grad_bias.f32();
                    grad_bias.fill(0.0);
                    add_rows(dy, grad_bias);
                }
            }
            [] => unreachable!("infer declares a weight"),
        }
        if io.grad_inputs[0].bytes() > 0 {
            self.backward_data(pass.batch, dy, weight, io.grad_inputs[0].bf16(), scratch, workers);
        }
        Ok(())
    }
}

impl Linear {
    /// y(n, o) = relu(sums(o, n) + bias(o)), in squares that fit L1.
    fn finish_output(&self, sums: &[f32], bias: Option<&[f32]>, y: &mut [bf16]) {
        const SIDE: usize = 16;
        y.par_chunks_mut(SIDE * self.units).enumerate().for_each(|(number, y)| {
            for first in (0..self.units).step_by(SIDE) {
                for (n, y) in y.chunks_exact_mut(self.units).enumerate() {
                    for o in first..self.units.min(first + SIDE) {
                        let sum = sums[o * self.batch + number * SIDE + n] + bias.map_or(0.0, |bias| bias[o]);
                        y[o] = nearest(if self.relu && sum < 0.0 { 0.0 } else { sum });
                    }
                }
            }
        });
    }

    /// dW (units, inputs) = dy^T x
    fn backward_weight(
        &self,
        batch: usize,
        x: &[bf16],
        dy: &[bf16],
        grad: &mut [f32],
        packed: &mut [f32],
        workers: &mut [f32],
    ) {
        let right = Right { data: x, rows: &self.by_inputs[..batch], step: 1, n: self.inputs };
        gemm16::pack_parallel(self.kernel, right, None, packed);
        let (packed, share) = (&*packed, self.share(self.units));
        let shares = grad.par_chunks_mut(share * self.inputs).zip(self.consecutive[..self.units].par_chunks(share));
        shares.zip(workers.par_chunks_mut(self.worker_len())).for_each(|((grad, rows), worker)| {
            let left = Left { data: dy, rows, cols: &self.by_units[..batch] };
            let out = Out { data: grad, rows: &self.by_inputs[..rows.len()] };
            gemm16::multiply(self.kernel, left, packed, self.inputs, out, Store::default(), worker);
        });
    }

    /// dx (batch, inputs) = dy W, block by block of inputs.
    fn backward_data(
        &self,
        batch: usize,
        dy: &[bf16],
        weight: &[bf16],
        grad: &mut [bf16],
        sums: &mut [f32],
        workers: &mut [f32],
    ) {
        let share = self.share(self.blocks());
        let sums = &mut sums[..self.blocks() * self.block_sums_len()];
        sums.par_chunks_mut(share * self.block_sums_len())
            .zip(workers.par_chunks_mut(self.worker_len()))
            .enumerate()
            .for_each(|(number, (sums, worker))| {
                for (block, sums) in sums.chunks_exact_mut(self.block_sums_len()).enumerate() {
                    let first = (number * share + block) * BLOCK_INPUTS;
                    self.data_block(batch, dy, weight, first, sums, worker);
                }
            });
        let sums = &*sums;
        grad.par_chunks_mut(self.inputs).enumerate().for_each(|(n, grad)| {
            for (grad, sums) in grad.chunks_mut(BLOCK_INPUTS).zip(sums.chunks_exact(self.block_sums_len())) {
                narrow(&sums[n * BLOCK_INPUTS..][..grad.len()], grad);
            }
        });
    }

    /// sums (batch, BLOCK_INPUTS) = dy times the columns of W from `first` on.
    fn data_block(
        &self,
        batch: usize,
        dy: &[bf16],
        weight: &[bf16],
        first: usize,
        sums: &mut [f32],
        worker: &mut [f32],
    ) {
        let n = BLOCK_INPUTS.min(self.inputs - first);
        let (packed, scratch) = worker.split_at_mut(self.packed_block_len());
        for unit in (0..self.units).step_by(BLOCK_UNITS) {
            let k = BLOCK_UNITS.min(self.units - unit);
            let data = &weight[unit * self.inputs + first..];
            gemm16::pack(self.kernel, Right { data, rows: &self.by_inputs[..k], step: 1, n }, None, packed);
            let left = Left { data: &dy[unit..], rows: &self.by_units[..batch], cols: &self.consecutive[..k] };
            let out = Out { data: &mut *sums, rows: &self.by_block[..batch] };
            let store = Store { accumulate: unit > 0, ..Store::default() };
            gemm16::multiply(self.kernel, left, packed, n, out, store, scratch);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::bf16_tests::agree;
    use super::*;
    use crate::model::Shape;

    #[test]
    fn every_kernel_agrees_with_f32() {
        for kernel in Kernel::available() {
            for (inputs, keys) in [
                (1, "units = 1"),
                (37, "units = 70\nactivation = \"relu\""),
                (2 * BLOCK_INPUTS + 3, "units = 33\nbias = false"),
                (70, "units = 1100\nactivation = \"relu\""),
            ] {
                let spec: super::super::Linear = toml::from_str(keys).unwrap();
                agree(&spec, Shape::vector(inputs), |build| Some(Box::new(spec.native(kernel, build)?)));
            }
        }
    }
}
