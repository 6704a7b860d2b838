//! One layer with its memory, for tests. Everything that a call must write is full of NaN before it, so what a layer
//! leaves out, or reads before it has written, shows in the result.

use lockstep::device::{Slice, SliceMut};
use lockstep::model::{Backward, Build, Forward, Inferred, Layer, LayerSpec, Pass, Shape, layers};
use std::sync::Arc;

pub const SEED: u64 = 11;
pub const LAYER: usize = 2;

/// A layer as `[[model.layers]]` describes it.
#[derive(Clone, Debug)]
pub struct Section {
    pub kind: String,
    /// Its keys, as TOML.
    pub keys: String,
    pub inputs: Vec<Shape>,
}

impl Section {
    pub fn infer(&self) -> Inferred {
        self.spec().infer(&self.inputs).unwrap_or_else(|error| panic!("{self:?}: {error}"))
    }

    pub fn refusal(&self) -> String {
        self.spec().infer(&self.inputs).expect_err("should be refused")
    }

    pub fn build(&self, batch: usize) -> Subject {
        let inferred = self.infer();
        let threads = rayon::current_num_threads();
        let build = Build { inputs: &self.inputs, batch, threads, seed: SEED, layer: LAYER, ..Build::default() };
        let layer = self.spec().build(&build).unwrap_or_else(|error| panic!("{self:?}: {error}"));
        let saved = inferred.saved_bytes * batch + inferred.saved_bytes_fixed;
        Subject { scratch: poisoned(layer.scratch_bytes()), saved: poisoned(saved), layer, inferred }
    }

    pub fn spec(&self) -> Arc<dyn LayerSpec> {
        let kind = layers::find(&self.kind).unwrap_or_else(|| panic!("no layer type {}", self.kind));
        let table = toml::from_str(&self.keys).unwrap_or_else(|error| panic!("{self:?}: {error}"));
        (kind.parse)(table).unwrap_or_else(|error| panic!("{self:?}: {error}")).spec
    }
}

/// A built layer and what it keeps between forward and backward.
pub struct Subject {
    pub inferred: Inferred,
    layer: Box<dyn Layer>,
    saved: Vec<f32>,
    scratch: Vec<f32>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Gradients {
    pub inputs: Vec<Vec<f32>>,
    pub params: Vec<Vec<f32>>,
}

impl Subject {
    /// inputs: (batch, shape) each; params in the arena's layout. Returns (batch, output).
    pub fn forward(&mut self, pass: &Pass, inputs: &[Vec<f32>], params: &[Vec<f32>]) -> Vec<f32> {
        self.saved.fill(f32::NAN);
        self.scratch.fill(f32::NAN);
        let mut output = vec![f32::NAN; pass.batch * self.inferred.output.len()];
        let io = Forward {
            inputs: &slices(inputs),
            output: SliceMut::from(&mut output[..]),
            params: &slices(params),
            params_rounded: &[],
            saved: SliceMut::from(&mut self.saved[..]),
            scratch: SliceMut::from(&mut self.scratch[..]),
        };
        self.layer.forward(pass, io).expect("forward");
        output
    }

    /// Gradients of sum(grad_output * output), after the forward call with the same inputs.
    pub fn backward(
        &mut self,
        pass: &Pass,
        inputs: &[Vec<f32>],
        output: &[f32],
        grad_output: &[f32],
        params: &[Vec<f32>],
    ) -> Gradients {
        self.scratch.fill(f32::NAN);
        let like =
            |tensors: &[Vec<f32>]| -> Vec<Vec<f32>> { tensors.iter().map(|t| vec![f32::NAN; t.len()]).collect() };
        let mut grads = Gradients { inputs: like(inputs), params: like(params) };
        let mut grad_output = grad_output.to_vec();
        let Inferred { backward_reads_input, backward_reads_output, .. } = self.inferred;
        let inputs: Vec<Slice<'_>> =
            slices(inputs).into_iter().map(|input| if backward_reads_input { input } else { Slice::empty() }).collect();
        let io = Backward {
            inputs: &inputs,
            output: if backward_reads_output { Slice::from(output) } else { Slice::empty() },
            grad_output: SliceMut::from(&mut grad_output[..]),
            grad_inputs: &mut slices_mut(&mut grads.inputs),
            params: &slices(params),
            params_rounded: &[],
            grad_params: &mut slices_mut(&mut grads.params),
            factors: SliceMut::empty(),
            input_sums: SliceMut::empty(),
            saved: Slice::from(&self.saved[..]),
            scratch: SliceMut::from(&mut self.scratch[..]),
        };
        self.layer.backward(pass, io).expect("backward");
        grads
    }
}

pub fn training(batch: usize) -> Pass {
    Pass { batch, training: true, first_sample: 5, share: 1.0 }
}

pub fn evaluation(batch: usize) -> Pass {
    Pass { training: false, ..training(batch) }
}

/// `len` different values from -1.5 to 1.5 that look random and lie 3 / len apart, so that no two of a window are close.
pub fn values(len: usize, salt: usize) -> Vec<f32> {
    let stride = (len * 5 / 13..).find(|stride| gcd(*stride, len) == 1).expect("len is coprime to one of the next len");
    let place = |i: usize| (i * stride + salt) % len;
    (0..len).map(|i| (place(i) as f32 + 0.37) / len as f32 * 3.0 - 1.5).collect()
}

/// Runs `f` in a pool of so many threads.
pub fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool").install(f)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn poisoned(bytes: usize) -> Vec<f32> {
    vec![f32::NAN; bytes.div_ceil(size_of::<f32>())]
}

fn slices(tensors: &[Vec<f32>]) -> Vec<Slice<'_>> {
    tensors.iter().map(|tensor| Slice::from(&tensor[..])).collect()
}

fn slices_mut(tensors: &mut [Vec<f32>]) -> Vec<SliceMut<'_>> {
    tensors.iter_mut().map(|tensor| SliceMut::from(&mut tensor[..])).collect()
}
