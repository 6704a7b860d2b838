//! The convolution of `cpu` in bf16, for CPUs that multiply bf16 matrices: the same three implicit products over the same
//! tables, with operands in bf16 and sums in f32 that are rounded once.
//!
//! What differs is how backward-weight is cut. The products are so fast here that moving sums counts: a part of the
//! batch for each thread, as in f32, would leave as many gradients of the whole weight to be added up. Instead the images
//! come in blocks of `BLOCK_PIXELS` or more output pixels, and of each block every thread makes some rows of the gradient,
//! added to those of the blocks before. A block costs a read and a write of the gradient, 8 bytes for 2 * `BLOCK_PIXELS`
//! FLOP, and all sums are in one order for any number of threads.

use super::super::super::kernels::gemm16::{self, Kernel, Left, Out, Right, Store};
use super::super::super::{Backward, Build, Forward, Layer, Pass};
use super::super::activation::bf16::{add_rows, mask};
use super::Geometry;
use super::padded::Padded;
use super::tables::{Phase, Tables};
use crate::error::Result;
use half::bf16;
use rayon::prelude::*;

/// Output pixels at least of a block of backward, where the batch has them.
const BLOCK_PIXELS: usize = 2048;
/// Output pixels at least of one product of forward and of backward-data: several blocks of the matrix kernel.
const UNIT_PIXELS: usize = 256;
/// f32 values of a cache line.
const LINE: usize = 16;

pub struct Conv2d {
    kernel: &'static Kernel,
    geometry: Geometry,
    bias: bool,
    relu: bool,
    threads: usize,
    /// Images of a block, and of one product.
    block: usize,
    unit: usize,
    /// For a block in the products over x, for a unit in that over dy.
    tables: Tables,
}

impl Conv2d {
    pub fn new(kernel: &'static Kernel, geometry: Geometry, bias: bool, relu: bool, build: &Build<'_>) -> Conv2d {
        let Geometry { input, output, .. } = geometry;
        let (padded, grad) = (Padded::of_input(&geometry), Padded::of_grad(&geometry));
        // All four kinds of images are addressed by tables of 32 bits that span a block.
        let largest = [input.len(), output.len(), padded.len(), grad.len()].into_iter().fold(1, usize::max);
        let images = |pixels: usize| {
            let images = pixels.div_ceil(output.h * output.w).min(u32::MAX as usize / largest);
            images.clamp(1, build.batch)
        };
        let (block, unit) = (images(BLOCK_PIXELS), images(UNIT_PIXELS));

        Conv2d {
            kernel,
            bias,
            relu,
            threads: build.threads.max(1),
            block,
            unit,
            tables: Tables::new(&geometry, block, unit),
            geometry,
        }
    }

    /// f32 words of the packed right matrices: of one group's weight and of all, of a phase's and of all, and of one group's
    /// dy of a block.
    fn packed_weight_len(&self) -> usize {
        gemm16::packed_len(self.kernel, self.tables.taps.len(), self.geometry.filters())
    }
    fn packed_weights_len(&self) -> usize {
        self.geometry.groups * self.packed_weight_len()
    }
    fn packed_phase_len(&self, phase: &Phase) -> usize {
        gemm16::packed_len(self.kernel, phase.taps.len(), self.geometry.channels())
    }
    fn packed_phases_len(&self) -> usize {
        self.geometry.groups * self.tables.phases.iter().map(|phase| self.packed_phase_len(phase)).sum::<usize>()
    }
    fn packed_grad_len(&self) -> usize {
        gemm16::packed_len(self.kernel, self.tables.pixels.len(), self.geometry.filters())
    }
    /// Of a block's padded images.
    fn padded_block_len(&self) -> usize {
        words(self.block * self.tables.input.copy_len())
    }
    /// Scratch of one thread: what a product needs, and a unit's padded images or gradients.
    fn worker_len(&self) -> usize {
        gemm16::scratch_len(self.kernel).next_multiple_of(LINE)
            + words(self.unit * self.tables.input.copy_len().max(self.tables.grad.copy_len()))
    }

    /// Things that a thread works on, in multiples of `unit`.
    fn share(&self, count: usize, unit: usize) -> usize {
        count.div_ceil(unit).div_ceil(self.threads).max(1) * unit
    }

    /// One thread's scratch as what a product needs and as room for padded images.
    fn split<'a>(&self, worker: &'a mut [f32]) -> (&'a mut [f32], &'a mut [bf16]) {
        let (scratch, copy) = worker.split_at_mut(gemm16::scratch_len(self.kernel).next_multiple_of(LINE));
        (scratch, bytemuck::cast_slice_mut(copy))
    }
}

impl Layer for Conv2d {
    fn scratch_bytes(&self) -> usize {
        let forward = self.packed_weights_len();
        let backward = self.packed_phases_len() + self.packed_grad_len() + self.padded_block_len();
        size_of::<f32>() * (forward.max(backward) + self.threads * self.worker_len())
    }

    fn forward(&mut self, pass: &Pass, io: Forward<'_>) -> Result<()> {
        let Geometry { input, output, .. } = self.geometry;
        let (x, weight) = (io.inputs[0].bf16(), io.params_rounded[0].bf16());
        let bias = self.bias.then(|| io.params[1].f32());
        let (workers, packed) = io.scratch.into_f32().split_at_mut(self.threads * self.worker_len());
        let packed = &mut packed[..self.packed_weights_len()];
        let n = self.geometry.filters();
        for (group, packed) in packed.chunks_exact_mut(self.packed_weight_len()).enumerate() {
            let right = Right { data: &weight[group * n..], rows: &self.tables.weight_rows, step: 1, n };
            gemm16::pack_parallel(self.kernel, right, bias.map(|bias| &bias[group * n..][..n]), packed);
        }
        let (layer, packed) = (&*self, &*packed);
        let share = self.share(pass.batch, self.unit);
        let shares = x.par_chunks(share * input.len()).zip(io.output.into_bf16().par_chunks_mut(share * output.len()));
        shares.zip(workers.par_chunks_mut(self.worker_len())).for_each(|((x, y), worker)| {
            let units = x.chunks(layer.unit * input.len()).zip(y.chunks_mut(layer.unit * output.len()));
            units.for_each(|(x, y)| layer.forward_unit(x, packed, y, worker));
        });
        Ok(())
    }

    fn backward(&mut self, pass: &Pass, io: Backward<'_>) -> Result<()> {
        let Geometry { input, output, .. } = self.geometry;
        let [grad_input] = io.grad_inputs else { unreachable!("infer takes one input") };
        let [grad_weight, grad_bias @ ..] = io.grad_params else { unreachable!("infer declares a weight") };
        let (workers, scratch) = io.scratch.into_f32().split_at_mut(self.threads * self.worker_len());
        let (packed_phases, scratch) = scratch.split_at_mut(self.packed_phases_len());
        let dx = grad_input.bf16();
        if !dx.is_empty() {
            self.pack_phases(io.params_rounded[0].bf16(), packed_phases);
        }
        let (x, y, dy) = (io.inputs[0].bf16(), io.output.bf16(), io.grad_output.into_bf16());
        grad_bias.iter_mut().for_each(|grad| grad.f32().fill(0.0));
        for first in (0..pass.batch).step_by(self.block) {
            let images = first..pass.batch.min(first + self.block);
            let inputs = images.start * input.len()..images.end * input.len();
            let outputs = images.start * output.len()..images.end * output.len();
            let dy = &mut dy[outputs.clone()];
            // Without an output to read, ReLU's backward is done, or there is none.
            if !y.is_empty() {
                mask(&y[outputs], dy);
            }
            grad_bias.iter_mut().for_each(|grad| add_rows(dy, grad.f32()));
            self.weight_block(&x[inputs.clone()], dy, grad_weight.f32(), first > 0, scratch, workers);
            if !dx.is_empty() {
                self.data_block(dy, packed_phases, &mut dx[inputs], workers);
            }
        }
        Ok(())
    }
}

impl Conv2d {
    /// x (images, H, W, C) to y (images, OH, OW, F), at most `unit` images.
    fn forward_unit(&self, x: &[bf16], packed: &[f32], y: &mut [bf16], worker: &mut [f32]) {
        let Geometry { input, output, groups, .. } = self.geometry;
        let (scratch, copy) = self.split(worker);
        let x = self.tables.input.copy(x, copy);
        let rows = y.len() / output.c;
        let store = Store { relu: self.relu, ..Store::default() };
        for (group, packed) in packed.chunks_exact(self.packed_weight_len()).enumerate() {
            let (channel, filter) = (group * input.c / groups, group * output.c / groups);
            let left = Left { data: &x[channel..], rows: &self.tables.pixels[..rows], cols: &self.tables.taps };
            let out = Out { data: &mut y[filter..], rows: &self.tables.output_rows[..rows] };
            gemm16::multiply(self.kernel, left, packed, self.geometry.filters(), out, store, scratch);
        }
    }

    /// weight (taps, F) (+)= im2col(x)^T dy, of one block.
    fn weight_block(
        &self,
        x: &[bf16],
        dy: &[bf16],
        weight: &mut [f32],
        accumulate: bool,
        scratch: &mut [f32],
        workers: &mut [f32],
    ) {
        let Geometry { input, output, groups, .. } = self.geometry;
        let (packed, copy) = scratch.split_at_mut(self.packed_grad_len());
        let x = self.padded_block(x, bytemuck::cast_slice_mut(copy));
        let (n, pixels) = (self.geometry.filters(), dy.len() / output.c);
        let store = Store { accumulate, ..Store::default() };
        let share = self.share(self.tables.taps.len(), LINE);
        for group in 0..groups {
            let (channel, filter) = (group * input.c / groups, group * output.c / groups);
            let right = Right { data: &dy[filter..], rows: &self.tables.output_rows[..pixels], step: 1, n };
            gemm16::pack_parallel(self.kernel, right, None, packed);
            let (x, packed) = (&x[channel..], &*packed);
            let shares = weight.par_chunks_mut(share * output.c).zip(self.tables.taps.par_chunks(share));
            shares.zip(workers.par_chunks_mut(self.worker_len())).for_each(|((weight, taps), worker)| {
                let left = Left { data: x, rows: taps, cols: &self.tables.pixels[..pixels] };
                let out = Out { data: &mut weight[filter..], rows: &self.tables.weight_rows[..taps.len()] };
                gemm16::multiply(self.kernel, left, packed, n, out, store, self.split(worker).0);
            });
        }
    }

    /// The padded images of a block.
    fn padded_block<'a>(&self, x: &'a [bf16], copy: &'a mut [bf16]) -> &'a [bf16] {
        if self.tables.input.copy_len() == 0 {
            return x;
        }
        let len = x.len() / self.geometry.input.len() * self.tables.input.copy_len();
        let images =
            x.par_chunks(self.geometry.input.len()).zip(copy[..len].par_chunks_mut(self.tables.input.copy_len()));
        images.for_each(|(x, copy)| {
            self.tables.input.copy(x, copy);
        });
        &copy[..len]
    }

    /// The weight transposed, phase by phase and group by group: columns are channels, which lie F apart.
    fn pack_phases(&self, weight: &[bf16], mut packed: &mut [f32]) {
        let (step, n) = (self.geometry.output.c, self.geometry.channels());
        for phase in &self.tables.phases {
            for group in 0..self.geometry.groups {
                let (here, rest) = packed.split_at_mut(self.packed_phase_len(phase));
                let data = &weight[group * self.geometry.filters()..];
                gemm16::pack_parallel(self.kernel, Right { data, rows: &phase.weights, step, n }, None, here);
                packed = rest;
            }
        }
    }

    /// dx = im2col(dy) flipped W^T, of one block.
    fn data_block(&self, dy: &[bf16], packed: &[f32], dx: &mut [bf16], workers: &mut [f32]) {
        let Geometry { input, output, .. } = self.geometry;
        let share = self.share(dx.len() / input.len(), self.unit);
        let shares = dx.par_chunks_mut(share * input.len()).zip(dy.par_chunks(share * output.len()));
        shares.zip(workers.par_chunks_mut(self.worker_len())).for_each(|((dx, dy), worker)| {
            let units = dx.chunks_mut(self.unit * input.len()).zip(dy.chunks(self.unit * output.len()));
            units.for_each(|(dx, dy)| self.data_unit(dy, packed, dx, worker));
        });
    }

    fn data_unit(&self, dy: &[bf16], mut packed: &[f32], dx: &mut [bf16], worker: &mut [f32]) {
        let Geometry { input, output, groups, .. } = self.geometry;
        let images = dx.len() / input.len();
        let (scratch, copy) = self.split(worker);
        let dy = self.tables.grad.copy(dy, copy);
        for phase in &self.tables.phases {
            let rows = phase.input_rows.len() / self.unit * images;
            for group in 0..groups {
                let (channel, filter) = (group * input.c / groups, group * output.c / groups);
                let left = Left { data: &dy[filter..], rows: &phase.pixels[..rows], cols: &phase.taps };
                let out = Out { data: &mut dx[channel..], rows: &phase.input_rows[..rows] };
                let n = self.geometry.channels();
                gemm16::multiply(self.kernel, left, packed, n, out, Store::default(), scratch);
                packed = &packed[self.packed_phase_len(phase)..];
            }
        }
    }
}

/// f32 words, whole cache lines, for so many bf16 values.
fn words(values: usize) -> usize {
    values.div_ceil(2).next_multiple_of(LINE)
}

#[cfg(test)]
mod tests {
    use super::super::super::bf16_tests::agree;
    use super::super::tests::CASES;
    use super::*;

    #[test]
    fn every_kernel_agrees_with_f32() {
        for kernel in Kernel::available() {
            for case in CASES.iter().filter(|case| case.spec().activation.is_relu_or_none()) {
                let spec = case.spec();
                agree(&spec, case.input, |build| Some(Box::new(spec.native(kernel, build)?)));
            }
        }
    }
}
