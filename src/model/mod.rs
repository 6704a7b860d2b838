//! The network. `Layer` is the seam between the net, which knows order, memory and parameters, and the kernels, which
//! know their mathematics and their device. A layer is described by its section of the TOML (`LayerSpec`), which infers
//! shapes and parameters without touching memory, and then builds the operator (`Layer`) for a device.

pub mod elementwise;
pub mod init;
pub mod kernels;
pub mod layers;
pub mod loss;
pub mod memory;
pub mod net;
pub mod params;
pub mod precision;
pub mod simd;
pub mod spec;
pub mod stopwatch;
pub mod weights;
mod widened;

use crate::device::cuda::kernels::Element;
use crate::device::{Slice, SliceMut};
use crate::error::Result;
use params::ParamSpec;
use std::fmt;

/// Shape of one sample's activation: height, width, channels. Activations are NHWC; a vector is (1, 1, C).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub h: usize,
    pub w: usize,
    pub c: usize,
}

impl Shape {
    pub const fn new(h: usize, w: usize, c: usize) -> Self {
        Shape { h, w, c }
    }
    pub const fn vector(c: usize) -> Self {
        Shape { h: 1, w: 1, c }
    }
    /// Values a sample.
    pub const fn len(self) -> usize {
        self.h * self.w * self.c
    }
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }
    pub const fn lengths(self) -> [usize; 3] {
        [self.h, self.w, self.c]
    }
    pub const fn is_vector(self) -> bool {
        self.h == 1 && self.w == 1
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}", self.h, self.w, self.c)
    }
}

/// What a layer's section of the TOML means, before any memory exists. A layer without parameters works on each sample by
/// itself, so that a batch may also be handed to it in parts.
pub trait LayerSpec: Send + Sync + fmt::Debug {
    /// Everything that follows from the input shapes. The error says which shapes do not fit and why; the caller puts
    /// the names of both layers in front.
    fn infer(&self, inputs: &[Shape]) -> Result<Inferred, String>;

    /// The operator on the CPU, for activations in f32. This and those that follow are called after `infer` succeeded for the
    /// same inputs.
    fn build(&self, build: &Build<'_>) -> Result<Box<dyn Layer>>;

    /// What it will work in on a GPU, for activations of type `element`.
    fn gpu_scratch(&self, _build: &Build<'_>, _element: Element) -> GpuScratch {
        GpuScratch::default()
    }

    /// The same for activations in bf16. A layer that has no kernels for them works in f32 between two conversions.
    fn build_bf16(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        widened::around(self, build)
    }

    /// The operator on this rank's GPU, for activations of type `element`.
    fn build_cuda(&self, build: &Build<'_>, element: Element) -> Result<Box<dyn Layer>>;
}

/// A layer's scratch on a GPU, in bytes, before the layer is built.
#[derive(Clone, Copy, Debug, Default)]
pub struct GpuScratch {
    pub bytes: usize,
    /// At most so much more, for algorithms of cuDNN or cuBLASLt, of which timing chooses one.
    pub workspace: usize,
}

/// What follows from a layer's input shapes.
#[derive(Clone, Debug, Default)]
pub struct Inferred {
    pub output: Shape,
    /// Weight first, bias second, then running statistics.
    pub params: Vec<ParamSpec>,
    /// Floating-point operations of forward for one sample; a multiply-add counts as two.
    pub forward_flops: u64,
    /// Bytes a sample that forward leaves for backward (argmax, statistics) beside input and output.
    pub saved_bytes: usize,
    /// Bytes that forward leaves for backward whatever the batch.
    pub saved_bytes_fixed: usize,
    /// What backward reads: the planner may reuse the memory of what it does not.
    pub backward_reads_input: bool,
    pub backward_reads_output: bool,
    /// The output is that of a ReLU, whose backward its only reader may do instead (`Build::grad_masked`); backward then
    /// does not read the output.
    pub relu_output: bool,
    /// Backward can do that of a ReLU in front of the only input (`Build::masks_input`).
    pub can_mask_input: bool,
    /// The same of its operator on a GPU.
    pub can_mask_input_on_gpu: bool,
    /// The second parameter is a bias, added to each pixel of the output with at most a ReLU behind it. Its gradient is the sum of
    /// the output's over the pixels, which the output's only reader may make (`Build::grad_summed`).
    pub adds_bias: bool,
    /// Backward on a GPU can sum the gradient by the only input over its pixels (`Build::sums_input`).
    pub can_sum_input: bool,
    /// The gradients of the parameters are products of these factors, which backward can leave instead.
    pub factors: Option<Factors>,
}

/// The factors of a linear layer's gradient: x (batch, inputs) and dy (batch, units), the gradient by what comes before its
/// activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Factors {
    pub inputs: usize,
    pub units: usize,
    pub bias: bool,
}

impl Factors {
    /// f32 values of a sample.
    pub fn values(self) -> usize {
        self.inputs + self.units
    }
}

impl Default for Shape {
    fn default() -> Self {
        Shape::vector(0)
    }
}

/// What a layer is told when it is built.
#[derive(Clone, Debug, Default)]
pub struct Build<'a> {
    pub inputs: &'a [Shape],
    /// Samples at most in one call.
    pub batch: usize,
    /// Whether a GPU may multiply f32 values cut to TF32.
    pub tf32: bool,
    /// Whether a GPU may add in an order of chance where that is faster.
    pub nondeterministic: bool,
    /// Whether backward will be called, and whether the gradients by the inputs will be wanted then.
    pub training: bool,
    pub grad_inputs: bool,
    /// Threads of this rank's rayon pool, for sizing per-thread scratch.
    pub threads: usize,
    pub seed: u64,
    /// Number of the layer in the net: keys its random numbers.
    pub layer: usize,
    /// The input comes from a ReLU whose backward is done here: its gradient is 0 wherever it is not above 0.
    pub masks_input: bool,
    /// The reader of the output has done the backward of this layer's ReLU.
    pub grad_masked: bool,
    /// The input comes from a layer with a bias, whose gradient is made here: `Backward::input_sums`.
    pub sums_input: bool,
    /// The reader of the output has made the gradient of this layer's bias.
    pub grad_summed: bool,
}

/// One call's circumstances.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// Samples in this call: at most `Build::batch`; the last batch of an epoch may be short.
    pub batch: usize,
    pub training: bool,
    /// Position in the run of this call's first sample, counted over all ranks: keys dropout.
    pub first_sample: u64,
    /// This call's samples over those of the whole step: what running statistics are weighted with.
    pub share: f32,
}

/// An operator on one device. `forward` and `backward` allocate nothing.
pub trait Layer: Send {
    /// Bytes of scratch that either direction needs; its contents do not survive a call.
    fn scratch_bytes(&self) -> usize {
        0
    }
    /// A pass begins. On a GPU, what of it differs from step to step goes where the launches of forward and backward read it, so
    /// that these are the same at each step and a CUDA graph may hold them.
    fn begin(&mut self, _pass: &Pass) -> Result<()> {
        Ok(())
    }
    fn forward(&mut self, pass: &Pass, io: Forward<'_>) -> Result<()>;
    /// Overwrites every gradient it is given; the net adds where several meet.
    fn backward(&mut self, pass: &Pass, io: Backward<'_>) -> Result<()>;
}

/// Buffers of a forward call. Activations hold `pass.batch` samples; parameters are in the order of `Inferred::params`.
pub struct Forward<'a> {
    pub inputs: &'a [Slice<'a>],
    pub output: SliceMut<'a>,
    pub params: &'a [Slice<'a>],
    /// `params` rounded to the type of the activations where that has 16 bits; else none.
    pub params_rounded: &'a [Slice<'a>],
    pub saved: SliceMut<'a>,
    pub scratch: SliceMut<'a>,
}

/// Buffers of a backward call. `inputs` and `output` are empty where `Inferred` says that backward does not read them.
pub struct Backward<'a> {
    pub inputs: &'a [Slice<'a>],
    pub output: Slice<'a>,
    /// Gradient of the loss by the output. The layer may overwrite it (an activation's backward in place).
    pub grad_output: SliceMut<'a>,
    /// Gradient by each input; empty where nobody needs it (the data itself).
    pub grad_inputs: &'a mut [SliceMut<'a>],
    pub params: &'a [Slice<'a>],
    /// As in `Forward`.
    pub params_rounded: &'a [Slice<'a>],
    /// Gradient by each parameter, in f32. For a running statistic: this call's value times `pass.share`, so that the sum over
    /// micro-batches and ranks is the step's mean.
    pub grad_params: &'a mut [SliceMut<'a>],
    /// Where not empty, backward leaves its factors here, x and then dy of the greatest batch, in f32, and no gradient by a
    /// parameter.
    pub factors: SliceMut<'a>,
    /// Of the layer with `Build::sums_input`: the sums of the gradient by its input over the pixels, by channel, in f32.
    pub input_sums: SliceMut<'a>,
    pub saved: Slice<'a>,
    pub scratch: SliceMut<'a>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Place;

    /// `y = 2 x` on a device: it gets addresses, hands them to its "kernel", and never asks for a CPU slice.
    struct Doubling;

    impl Layer for Doubling {
        fn forward(&mut self, pass: &Pass, io: Forward<'_>) -> Result<()> {
            launch(io.inputs[0].address(), io.output.address(), pass.batch);
            Ok(())
        }
        fn backward(&mut self, pass: &Pass, io: Backward<'_>) -> Result<()> {
            launch(io.grad_output.address(), io.grad_inputs[0].address(), pass.batch);
            Ok(())
        }
    }

    fn launch(from: usize, to: usize, count: usize) {
        for i in 0..count {
            // SAFETY: the test lends `count` values at both addresses.
            unsafe { *(to as *mut f32).add(i) = 2.0 * *(from as *const f32).add(i) };
        }
    }

    /// A GPU's buffers fit behind the same trait: the net passes addresses on, and a CPU kernel that were given one
    /// would assert instead of reading it.
    #[test]
    fn a_layer_of_another_device_stands_behind_the_same_trait() {
        let memory = [1.0f32, 2.0, 3.0, 0.0, 0.0, 0.0].map(std::cell::Cell::new);
        let at = |i: usize| memory[i].as_ptr() as usize;
        // SAFETY: three values each, which only `launch` touches.
        let read = unsafe { Slice::from_raw(Place::Cuda, at(0), 12) };
        // SAFETY: as above.
        let write = |i: usize| unsafe { SliceMut::from_raw(Place::Cuda, at(i), 12) };
        let pass = Pass { batch: 3, training: true, first_sample: 0, share: 1.0 };
        let mut layer: Box<dyn Layer> = Box::new(Doubling);
        let (saved, scratch) = (SliceMut::empty(), SliceMut::empty());
        layer
            .forward(
                &pass,
                Forward { inputs: &[read], output: write(3), params: &[], params_rounded: &[], saved, scratch },
            )
            .unwrap();
        assert_eq!(memory.each_ref().map(|value| value.get()), [1.0, 2.0, 3.0, 2.0, 4.0, 6.0]);

        let io = Backward {
            inputs: &[],
            output: Slice::empty(),
            grad_output: write(3),
            grad_inputs: &mut [write(0)],
            params: &[],
            params_rounded: &[],
            grad_params: &mut [],
            factors: SliceMut::empty(),
            input_sums: SliceMut::empty(),
            saved: Slice::empty(),
            scratch: SliceMut::empty(),
        };
        layer.backward(&pass, io).unwrap();
        assert_eq!(memory.each_ref().map(|value| value.get())[..3], [4.0, 8.0, 12.0]);
        assert!(std::panic::catch_unwind(|| read.f32()[0]).is_err(), "a CPU kernel must not read device memory");
    }
}
