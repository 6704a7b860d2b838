//! Any f32 layer in a net of bf16 activations: what it reads is widened into scratch, what it writes is rounded from
//! there. It computes in f32 and rounds once, as kernels for bf16 do; its parameters it reads in f32.
//!
//! A layer without parameters is given a few samples at a time, so that their f32 copies stay in the cache: each value
//! costs a store and a load of 4 bytes there, and the memory behind it sees bf16 alone. A layer with parameters is given
//! all samples at once: its gradients are sums over them, and batch normalisation needs them together.

use super::precision::{narrow, widen};
use super::spec::{MAX_INPUTS, MAX_PARAMS};
use super::{Backward, Build, Forward, Inferred, Layer, LayerSpec, Pass};
use crate::device::{ALIGN, Slice, SliceMut};
use crate::error::{Error, Result};
use std::array;
use std::ops::Range;

/// Bytes of a thread's share of a block's f32 copies, at most.
const BLOCK_BYTES: usize = 1 << 20;

/// The f32 operator of a layer, made into one for bf16.
pub fn around<S: LayerSpec + ?Sized>(spec: &S, build: &Build<'_>) -> Result<Box<dyn Layer>> {
    let inferred = spec.infer(build.inputs).map_err(Error::usage)?;
    let inputs: Vec<usize> = build.inputs.iter().map(|shape| shape.len()).collect();
    // Backward holds most: inputs and output, and the gradients of all.
    let sample = 2 * size_of::<f32>() * (inputs.iter().sum::<usize>() + inferred.output.len());
    let block = match inferred.params.is_empty() {
        true => (BLOCK_BYTES * build.threads.max(1) / sample.max(1)).clamp(1, build.batch),
        false => build.batch,
    };
    let layer = spec.build(&Build { batch: block, ..build.clone() })?;
    Ok(Box::new(Widened { layer, inferred, inputs, block }))
}

struct Widened {
    layer: Box<dyn Layer>,
    inferred: Inferred,
    /// Values a sample of each input.
    inputs: Vec<usize>,
    /// Samples that the layer is given at a time: at least one.
    block: usize,
}

impl Widened {
    /// The blocks of a pass: the samples of each, the pass that it is to its layer, and its part of what is saved.
    fn blocks(&self, pass: &Pass) -> impl Iterator<Item = (Range<usize>, Pass, Range<usize>)> + use<> {
        let (pass, block) = (*pass, self.block);
        let Inferred { saved_bytes, saved_bytes_fixed, .. } = self.inferred;
        (0..pass.batch).step_by(block).map(move |start| {
            let samples = start..pass.batch.min(start + block);
            let saved = start * saved_bytes..samples.end * saved_bytes + saved_bytes_fixed;
            let pass = Pass { batch: samples.len(), first_sample: pass.first_sample + start as u64, ..pass };
            (samples, pass, saved)
        })
    }
}

impl Layer for Widened {
    fn scratch_bytes(&self) -> usize {
        let of = |len: usize| in_lines(self.block * len);
        let values = self.inputs.iter().map(|&len| of(len)).sum::<usize>() + of(self.inferred.output.len());
        2 * size_of::<f32>() * values + self.layer.scratch_bytes()
    }

    fn forward(&mut self, pass: &Pass, mut io: Forward<'_>) -> Result<()> {
        let output_len = self.inferred.output.len();
        for (samples, pass, saved) in self.blocks(pass) {
            let mut scratch = Scratch(io.scratch.f32());
            let inputs = scratch.inputs(io.inputs, &samples, &self.inputs);
            let output = scratch.take(samples.len() * output_len);
            let block = Forward {
                inputs: &inputs[..self.inputs.len()],
                output: SliceMut::from(&mut *output),
                params: io.params,
                params_rounded: &[],
                saved: io.saved.cut(saved),
                scratch: SliceMut::from(scratch.0),
            };
            self.layer.forward(&pass, block)?;
            narrow(output, &mut io.output.bf16()[values(&samples, output_len)]);
        }
        Ok(())
    }

    fn backward(&mut self, pass: &Pass, mut io: Backward<'_>) -> Result<()> {
        let output_len = self.inferred.output.len();
        for (samples, pass, saved) in self.blocks(pass) {
            let mut scratch = Scratch(io.scratch.f32());
            let inputs = scratch.inputs(io.inputs, &samples, &self.inputs);
            let output = Slice::from(&*scratch.widened(io.output, &samples, output_len));
            let grad_output = SliceMut::from(scratch.widened(io.grad_output.as_slice(), &samples, output_len));
            let mut grads: [&mut [f32]; MAX_INPUTS] = array::from_fn(|i| match io.grad_inputs.get(i) {
                Some(grad) if grad.bytes() > 0 => scratch.take(samples.len() * self.inputs[i]),
                _ => Default::default(),
            });
            let mut grad_inputs = grads.each_mut().map(|grad| SliceMut::from(&mut **grad));
            let mut slots = io.grad_params.iter_mut();
            let mut grad_params: [SliceMut; MAX_PARAMS] =
                array::from_fn(|_| slots.next().map_or_else(SliceMut::empty, SliceMut::reborrow));
            let block = Backward {
                inputs: &inputs[..self.inputs.len()],
                output,
                grad_output,
                grad_inputs: &mut grad_inputs[..self.inputs.len()],
                params: io.params,
                params_rounded: &[],
                grad_params: &mut grad_params[..io.params.len()],
                factors: io.factors.reborrow(),
                input_sums: SliceMut::empty(),
                saved: io.saved.cut(saved),
                scratch: SliceMut::from(scratch.0),
            };
            self.layer.backward(&pass, block)?;
            for (i, (grad, to)) in grads.iter().zip(io.grad_inputs.iter_mut()).enumerate() {
                if !grad.is_empty() {
                    narrow(grad, &mut to.bf16()[values(&samples, self.inputs[i])]);
                }
            }
        }
        Ok(())
    }
}

/// What is left of the scratch.
struct Scratch<'a>(&'a mut [f32]);

impl<'a> Scratch<'a> {
    /// The next `len` values, in cache lines of their own.
    fn take(&mut self, len: usize) -> &'a mut [f32] {
        let (taken, rest) = std::mem::take(&mut self.0).split_at_mut(in_lines(len));
        self.0 = rest;
        &mut taken[..len]
    }

    /// Some samples of each input, of as many values as `lens` says.
    fn inputs(&mut self, inputs: &[Slice<'_>], samples: &Range<usize>, lens: &[usize]) -> [Slice<'a>; MAX_INPUTS] {
        array::from_fn(|i| match inputs.get(i) {
            Some(input) => Slice::from(&*self.widened(*input, samples, lens[i])),
            None => Slice::empty(),
        })
    }

    /// Some samples of an activation of `len` values each; nothing of one that is not there.
    fn widened(&mut self, activation: Slice<'_>, samples: &Range<usize>, len: usize) -> &'a mut [f32] {
        if activation.bytes() == 0 {
            return &mut [];
        }
        let wide = self.take(samples.len() * len);
        widen(&activation.bf16()[values(samples, len)], wide);
        wide
    }
}

/// Where samples of `len` values lie.
fn values(samples: &Range<usize>, len: usize) -> Range<usize> {
    samples.start * len..samples.end * len
}

fn in_lines(values: usize) -> usize {
    values.next_multiple_of(ALIGN / size_of::<f32>())
}
