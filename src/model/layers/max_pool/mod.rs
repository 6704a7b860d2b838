//! Max pooling: the largest value of each window, per channel. Padding never wins.

mod cpu;
mod cuda;

use super::super::{Build, GpuScratch, Inferred, Layer, LayerSpec, Shape};
use super::{Padding, Window, single};
use crate::device::cuda::kernels::Element;
use crate::error::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MaxPool {
    /// Height and width of the window, at most 16: which of its places won is kept in a byte.
    #[schemars(range(min = 1, max = 16))]
    size: usize,
    /// Default: `size`.
    #[schemars(range(min = 1))]
    stride: Option<usize>,
    /// "valid" (default), "same", or a number below `size`.
    #[serde(default)]
    padding: Padding,
}

impl MaxPool {
    fn window(&self, input: Shape) -> Result<Window, String> {
        Window::for_pooling(input, self.size, self.stride, self.padding)
    }
}

impl LayerSpec for MaxPool {
    fn infer(&self, inputs: &[Shape]) -> Result<Inferred, String> {
        let input = single(inputs)?;
        let output = self.window(input)?.output(input.c);
        Ok(Inferred {
            output,
            forward_flops: output.len() as u64 * (self.size * self.size) as u64,
            saved_bytes: output.len(),
            // The byte of a 16x16 window has no value to spare for "none of them".
            can_mask_input: self.size < 16,
            can_sum_input: true,
            ..Inferred::default()
        })
    }
    fn gpu_scratch(&self, build: &Build<'_>, _: Element) -> GpuScratch {
        let window = self.window(build.inputs[0]).expect("inferred before");
        GpuScratch { bytes: cuda::scratch_bytes(&window, build), workspace: 0 }
    }
    fn build(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        let input = build.inputs[0];
        let window = self.window(input).expect("inferred before");
        Ok(Box::new(cpu::MaxPool { window, channels: input.c, masks_input: build.masks_input }))
    }
    fn build_cuda(&self, build: &Build<'_>, element: Element) -> Result<Box<dyn Layer>> {
        let window = self.window(build.inputs[0]).expect("inferred before");
        Ok(Box::new(cuda::MaxPool::new(window, build, element)?))
    }
}
