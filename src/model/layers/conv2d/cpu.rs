//! Convolution as an implicit GEMM: 2 * OH * OW * F * taps FLOP a sample in each of the three products
//! (taps = KH * KW * C / groups), whose rows are
//!
//! ```text
//! forward            y  (pixels, F)    = im2col(x) (pixels, taps)  W (taps, F)
//! backward, weight   dW (taps, F)      = im2col(x)^T (taps, pixels)  dy (pixels, F)
//! backward, data     dx (pixels, C)    = im2col(dy) (pixels, KH * KW * F)  flipped W^T (KH * KW * F, C)
//! ```
//!
//! None of the im2col matrices is written down: the image is copied once with zeros around it, and an element's place in
//! the copy is the sum of what its pixel and what its tap contributes, which is how `gemm` addresses its left matrix.
//! The copy costs a read and a write an input value against KH * KW * F / groups multiply-adds.
//!
//! With strides (sh, sw), an input pixel (ih, iw) meets only the taps with kh = ih + before (mod sh), and likewise kw: the
//! input falls into sh * sw phases, each a stride-1 correlation of dy with every sh-th, sw-th tap of the kernel.
//!
//! Images are worked on in blocks that fit L2, so that in backward dy is read from memory once for both products. Weight
//! gradients are summed within each of at most `PARTS` parts of the batch, then over the parts in order. Blocks and parts
//! depend on shapes alone: the sums have the same bits for any number of threads.

use super::super::super::kernels::gemm::{self, Kernel, Left, Out, Right, Store};
use super::super::super::{Backward, Build, Forward, Layer, Pass};
use super::super::Activation;
use super::Geometry;
use super::depthwise::{self, PerChannel};
use super::padded::Padded;
use super::tables::{Phase, Tables};
use crate::error::Result;
use rayon::prelude::*;

/// Bytes of a block's padded input, at most, where that leaves a block at least one image.
const BLOCK_BYTES: usize = 128 << 10;
/// Parts of the batch whose weight gradients are summed on their own: as many threads can work in backward.
const PARTS: usize = 16;
/// Bytes of all parts' weight gradients, at most.
const PARTIAL_BYTES: usize = 32 << 20;
/// f32 values of a cache line.
const LINE: usize = 16;

pub struct Conv2d {
    kernel: &'static Kernel,
    geometry: Geometry,
    bias: bool,
    activation: Activation,
    /// What backward has to undo of it.
    undo: Activation,
    threads: usize,
    batch: usize,
    /// Images of a block, and of a part.
    block: usize,
    part: usize,
    /// For blocks in all products.
    tables: Tables,
}

impl Conv2d {
    pub fn new(geometry: Geometry, bias: bool, activation: Activation, build: &Build<'_>) -> Conv2d {
        let Geometry { input, output, .. } = geometry;
        let (padded, grad) = (Padded::of_input(&geometry), Padded::of_grad(&geometry));
        // All four kinds of images are addressed by tables of 32 bits that span a block.
        let largest = [input.len(), output.len(), padded.len(), grad.len()].into_iter().fold(1, usize::max);
        let block = (BLOCK_BYTES / (4 * padded.len()))
            .clamp(1, build.batch.div_ceil(PARTS).max(1))
            .min(u32::MAX as usize / largest);
        let parts = (PARTIAL_BYTES / (4 * (geometry.taps() + 1) * output.c)).clamp(1, PARTS);
        let part = build.batch.div_ceil(parts).next_multiple_of(block);

        Conv2d {
            kernel: Kernel::best(),
            bias,
            activation,
            undo: activation.to_undo(build),
            threads: build.threads.max(1),
            batch: build.batch,
            block,
            part,
            tables: Tables::new(&geometry, block, block),
            geometry,
        }
    }

    /// f32 values of the weight's gradient and the bias's.
    fn partial_len(&self) -> usize {
        (self.geometry.taps() + usize::from(self.bias)) * self.geometry.output.c
    }

    /// Packed right matrices of one group, and of all groups; a depthwise convolution packs nothing.
    fn packed_weight_len(&self) -> usize {
        gemm::packed_len(self.kernel, self.tables.taps.len(), self.geometry.filters())
    }
    fn packed_weights_len(&self) -> usize {
        if self.geometry.is_depthwise() { 0 } else { self.geometry.groups * self.packed_weight_len() }
    }
    fn packed_phase_len(&self, phase: &Phase) -> usize {
        gemm::packed_len(self.kernel, phase.taps.len(), self.geometry.channels())
    }
    fn packed_phases_len(&self) -> usize {
        let group: usize = self.tables.phases.iter().map(|phase| self.packed_phase_len(phase)).sum();
        if self.geometry.is_depthwise() { 0 } else { self.geometry.groups * group }
    }
    fn packed_grad_len(&self) -> usize {
        let len = gemm::packed_len(self.kernel, self.tables.pixels.len(), self.geometry.filters());
        if self.geometry.is_depthwise() { 0 } else { len }
    }

    /// Scratch of one thread, in whole cache lines.
    fn forward_worker_len(&self) -> usize {
        (self.block * self.tables.input.copy_len()).max(1).next_multiple_of(LINE)
    }
    fn backward_worker_len(&self) -> usize {
        let copies = self.block * (self.tables.input.copy_len() + self.tables.grad.copy_len());
        (self.packed_grad_len() + copies).max(1).next_multiple_of(LINE)
    }

    /// Images that a thread works on: whole multiples of `unit`, in as few threads as there are.
    fn share(&self, images: usize, unit: usize) -> usize {
        images.div_ceil(unit).div_ceil(self.threads).max(1) * unit
    }

    /// x (images, H, W, C) to y (images, OH, OW, F), at most `block` images.
    fn forward_block(&self, x: &[f32], weight: Weight<'_>, y: &mut [f32], copy: &mut [f32]) {
        let Geometry { input, output, groups, .. } = self.geometry;
        let x = self.tables.input.copy(x, copy);
        let rows = y.len() / output.c;
        let store = Store { accumulate: false, relu: self.activation == Activation::Relu };
        if self.geometry.is_depthwise() {
            let left = Left { data: x, rows: &self.tables.pixels[..rows], cols: &self.tables.taps };
            let right = PerChannel { data: weight.plain, rows: &self.tables.weight_rows, bias: weight.bias };
            let out = Out { data: y, rows: &self.tables.output_rows[..rows] };
            depthwise::multiply(left, right, output.c, out, store);
        }
        for (group, packed) in weight.packed.chunks_exact(self.packed_weight_len()).enumerate() {
            let (channel, filter) = (group * input.c / groups, group * output.c / groups);
            let left = Left { data: &x[channel..], rows: &self.tables.pixels[..rows], cols: &self.tables.taps };
            let out = Out { data: &mut y[filter..], rows: &self.tables.output_rows[..rows] };
            gemm::multiply(self.kernel, left, packed, self.geometry.filters(), out, store);
        }
        if self.activation != Activation::Relu {
            self.activation.apply(y);
        }
    }
}

impl Layer for Conv2d {
    fn scratch_bytes(&self) -> usize {
        let forward = self.packed_weights_len() + self.threads * self.forward_worker_len();
        let partials = self.batch.div_ceil(self.part) * self.partial_len();
        let backward = self.packed_phases_len() + partials + self.threads * self.backward_worker_len();
        4 * forward.max(backward)
    }

    fn forward(&mut self, pass: &Pass, io: Forward<'_>) -> Result<()> {
        let Geometry { input, output, .. } = self.geometry;
        let (x, weight) = (io.inputs[0].f32(), io.params[0].f32());
        let bias = self.bias.then(|| io.params[1].f32());
        let (packed, workers) = io.scratch.into_f32().split_at_mut(self.packed_weights_len());
        for (group, packed) in packed.chunks_exact_mut(self.packed_weight_len()).enumerate() {
            let filters = group * self.geometry.filters();
            let right =
                Right { data: &weight[filters..], rows: &self.tables.weight_rows, step: 1, n: self.geometry.filters() };
            gemm::pack_parallel(self.kernel, right, bias.map(|bias| &bias[filters..]), packed);
        }

        let (layer, weight) = (&*self, Weight { packed, plain: weight, bias });
        let share = self.share(pass.batch, self.block);
        let shares = x.par_chunks(share * input.len()).zip(io.output.into_f32().par_chunks_mut(share * output.len()));
        shares.zip(workers.par_chunks_mut(self.forward_worker_len())).for_each(|((x, y), copy)| {
            let blocks = x.chunks(layer.block * input.len()).zip(y.chunks_mut(layer.block * output.len()));
            blocks.for_each(|(x, y)| layer.forward_block(x, weight, y, copy));
        });
        Ok(())
    }

    fn backward(&mut self, pass: &Pass, io: Backward<'_>) -> Result<()> {
        let Geometry { groups, .. } = self.geometry;
        let [grad_input] = io.grad_inputs else { unreachable!("infer takes one input") };
        let grad_input = grad_input.f32();
        let (packed, scratch) = io.scratch.into_f32().split_at_mut(self.packed_phases_len());
        let weight = io.params[0].f32();
        if !grad_input.is_empty() && !self.geometry.is_depthwise() {
            let mut rest = &mut *packed;
            for (phase, group) in
                self.tables.phases.iter().flat_map(|phase| (0..groups).map(move |group| (phase, group)))
            {
                let (packed, after) = rest.split_at_mut(self.packed_phase_len(phase));
                // Transposed: columns are channels, which lie F apart.
                let (data, n) = (&weight[group * self.geometry.filters()..], self.geometry.channels());
                let right = Right { data, rows: &phase.weights, step: self.geometry.output.c, n };
                gemm::pack_parallel(self.kernel, right, None, packed);
                rest = after;
            }
        }

        let parts = pass.batch.div_ceil(self.part);
        let (partials, workers) = scratch.split_at_mut(parts * self.partial_len());
        let workers = &mut workers[..self.threads * self.backward_worker_len()];
        let shared = Shared { layer: self, weight: Weight { packed, plain: weight, bias: None } };
        shared.run(Job {
            images: pass.batch,
            x: io.inputs[0].f32(),
            y: io.output.f32(),
            dy: io.grad_output.into_f32(),
            dx: grad_input,
            partials,
            workers,
        });

        let weight_len = self.geometry.taps() * self.geometry.output.c;
        let (partials, partial_len) = (&*partials, self.partial_len());
        for (number, grad) in io.grad_params.iter_mut().enumerate() {
            sum_parts(partials, partial_len, number * weight_len, grad.f32());
        }
        Ok(())
    }
}

/// grad(i) = sum over parts of partials(part, first + i), in order.
fn sum_parts(partials: &[f32], partial_len: usize, first: usize, grad: &mut [f32]) {
    const CHUNK: usize = 4096;
    grad.par_chunks_mut(CHUNK).enumerate().for_each(|(number, grad)| {
        let first = first + number * CHUNK;
        grad.fill(0.0);
        for partial in partials.chunks_exact(partial_len) {
            grad.iter_mut().zip(&partial[first..]).for_each(|(sum, part)| *sum += part);
        }
    });
}

/// What all threads of a backward call read.
struct Shared<'a> {
    layer: &'a Conv2d,
    weight: Weight<'a>,
}

/// The weight, packed group by group (in backward, within each phase) and as it lies in the arena.
#[derive(Clone, Copy)]
struct Weight<'a> {
    packed: &'a [f32],
    plain: &'a [f32],
    bias: Option<&'a [f32]>,
}

/// Backward of consecutive images, whole parts of the batch. `y` is empty without an activation, `dx` if nobody needs it.
struct Job<'a> {
    images: usize,
    x: &'a [f32],
    y: &'a [f32],
    dy: &'a mut [f32],
    dx: &'a mut [f32],
    partials: &'a mut [f32],
    workers: &'a mut [f32],
}

impl Shared<'_> {
    /// Halves the job until each thread has its share.
    fn run(&self, job: Job<'_>) {
        let threads = job.workers.len() / self.layer.backward_worker_len();
        let parts = job.images.div_ceil(self.layer.part);
        if threads.min(parts) <= 1 {
            return self.run_share(job);
        }
        let (left, right) = job.split(self.layer, parts / 2, threads / 2);
        rayon::join(|| self.run(left), || self.run(right));
    }

    fn run_share(&self, job: Job<'_>) {
        let layer = self.layer;
        let Geometry { input, output, .. } = layer.geometry;
        let partials = job.partials.chunks_exact_mut(layer.partial_len());
        for (number, partial) in partials.enumerate() {
            let images = number * layer.part..job.images.min((number + 1) * layer.part);
            let (weight, bias) = partial.split_at_mut(layer.geometry.taps() * output.c);
            bias.fill(0.0);
            for first in images.clone().step_by(layer.block) {
                let block = first..images.end.min(first + layer.block);
                let inputs = block.start * input.len()..block.end * input.len();
                let outputs = block.start * output.len()..block.end * output.len();
                let (x, dy) = (&job.x[inputs.clone()], &mut job.dy[outputs.clone()]);
                if layer.undo != Activation::None {
                    layer.undo.backward(&job.y[outputs], dy);
                }
                if layer.bias {
                    dy.chunks_exact(output.c).for_each(|row| bias.iter_mut().zip(row).for_each(|(sum, dy)| *sum += dy));
                }
                let (packed, copies) = job.workers.split_at_mut(layer.packed_grad_len());
                let (input_copy, grad_copy) = copies.split_at_mut(layer.block * layer.tables.input.copy_len());
                layer.weight_block(x, dy, weight, first != images.start, input_copy, packed);
                if !job.dx.is_empty() {
                    layer.data_block(dy, self.weight, &mut job.dx[inputs], grad_copy);
                }
            }
        }
    }
}

impl<'a> Job<'a> {
    /// The first `parts` parts with the first `threads` threads' scratch, and the rest.
    fn split(self, layer: &Conv2d, parts: usize, threads: usize) -> (Job<'a>, Job<'a>) {
        let images = parts * layer.part;
        let Geometry { input, output, .. } = layer.geometry;
        let (x, x_rest) = self.x.split_at(images * input.len());
        let (y, y_rest) = self.y.split_at(self.y.len().min(images * output.len()));
        let (dy, dy_rest) = self.dy.split_at_mut(images * output.len());
        let dx_len = self.dx.len().min(images * input.len());
        let (dx, dx_rest) = self.dx.split_at_mut(dx_len);
        let (partials, partials_rest) = self.partials.split_at_mut(parts * layer.partial_len());
        let (workers, workers_rest) = self.workers.split_at_mut(threads * layer.backward_worker_len());
        let rest = Job {
            images: self.images - images,
            x: x_rest,
            y: y_rest,
            dy: dy_rest,
            dx: dx_rest,
            partials: partials_rest,
            workers: workers_rest,
        };
        (Job { images, x, y, dy, dx, partials, workers }, rest)
    }
}

impl Conv2d {
    /// weight (taps, F) (+)= im2col(x)^T dy
    fn weight_block(
        &self,
        x: &[f32],
        dy: &[f32],
        weight: &mut [f32],
        accumulate: bool,
        copy: &mut [f32],
        packed: &mut [f32],
    ) {
        let Geometry { input, output, groups, .. } = self.geometry;
        let x = self.tables.input.copy(x, copy);
        let pixels = dy.len() / output.c;
        let rows = &self.tables.output_rows[..pixels];
        let store = Store { accumulate, relu: false };
        if self.geometry.is_depthwise() {
            let left = Left { data: x, rows: &self.tables.taps, cols: &self.tables.pixels[..pixels] };
            let out = Out { data: weight, rows: &self.tables.weight_rows };
            return depthwise::multiply(left, PerChannel { data: dy, rows, bias: None }, output.c, out, store);
        }
        for group in 0..groups {
            let (channel, filter) = (group * input.c / groups, group * output.c / groups);
            let right = Right { data: &dy[filter..], rows, step: 1, n: self.geometry.filters() };
            gemm::pack(self.kernel, right, None, packed);
            let left = Left { data: &x[channel..], rows: &self.tables.taps, cols: &self.tables.pixels[..pixels] };
            let out = Out { data: &mut weight[filter..], rows: &self.tables.weight_rows };
            gemm::multiply(self.kernel, left, packed, self.geometry.filters(), out, store);
        }
    }

    /// dx = im2col(dy) flipped W^T
    fn data_block(&self, dy: &[f32], weight: Weight<'_>, dx: &mut [f32], copy: &mut [f32]) {
        let Geometry { input, output, groups, .. } = self.geometry;
        let images = dx.len() / input.len();
        let dy = self.tables.grad.copy(dy, copy);
        let mut packed = weight.packed;
        for phase in &self.tables.phases {
            let rows = phase.input_rows.len() / self.block * images;
            if self.geometry.is_depthwise() {
                let left = Left { data: dy, rows: &phase.pixels[..rows], cols: &phase.taps };
                let right = PerChannel { data: weight.plain, rows: &phase.weights, bias: None };
                let out = Out { data: dx, rows: &phase.input_rows[..rows] };
                depthwise::multiply(left, right, input.c, out, Store::default());
                continue;
            }
            for group in 0..groups {
                let (channel, filter) = (group * input.c / groups, group * output.c / groups);
                let left = Left { data: &dy[filter..], rows: &phase.pixels[..rows], cols: &phase.taps };
                let out = Out { data: &mut dx[channel..], rows: &phase.input_rows[..rows] };
                gemm::multiply(self.kernel, left, packed, self.geometry.channels(), out, Store::default());
                packed = &packed[self.packed_phase_len(phase)..];
            }
        }
    }
}
