//! Average pooling. Zeros of the padding count as values, as in PyTorch by default (`count_include_pad=True`), so every
//! window divides by the same number.

mod cpu;
mod cuda;

use super::super::{Build, Inferred, Layer, LayerSpec, Shape};
use super::{Padding, Window, single};
use crate::device::cuda::kernels::Element;
use crate::error::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AvgPool {
    /// Height and width of the window.
    #[schemars(range(min = 1, max = 65536))]
    size: usize,
    /// Default: `size`.
    #[schemars(range(min = 1))]
    stride: Option<usize>,
    /// "valid" (default), "same", or a number below `size`; the zeros are part of the average.
    #[serde(default)]
    padding: Padding,
}

impl AvgPool {
    fn window(&self, input: Shape) -> Result<Window, String> {
        Window::for_pooling(input, self.size, self.stride, self.padding)
    }
}

impl LayerSpec for AvgPool {
    fn infer(&self, inputs: &[Shape]) -> Result<Inferred, String> {
        let input = single(inputs)?;
        let output = self.window(input)?.output(input.c);
        Ok(Inferred {
            output,
            forward_flops: output.len() as u64 * (self.size * self.size) as u64,
            ..Inferred::default()
        })
    }
    fn build(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        let input = build.inputs[0];
        let window = self.window(input).expect("inferred before");
        Ok(Box::new(cpu::AvgPool { window, channels: input.c }))
    }
    fn build_cuda(&self, build: &Build<'_>, element: Element) -> Result<Box<dyn Layer>> {
        let window = self.window(build.inputs[0]).expect("inferred before");
        Ok(Box::new(cuda::AvgPool::new(window, build, element)?))
    }
}
