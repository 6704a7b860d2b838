//! Flatten: an image becomes a vector, in the order (C, H, W). The image lies in memory as (H, W, C), so values move; in
//! return the weights of a linear layer behind it are, value for value, those of the same net in PyTorch.

mod cpu;
mod cuda;

use super::super::{Build, Inferred, Layer, LayerSpec, Shape};
use super::single;
use crate::device::cuda::kernels::Element;
use crate::error::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Flatten {}

impl LayerSpec for Flatten {
    fn infer(&self, inputs: &[Shape]) -> Result<Inferred, String> {
        Ok(Inferred { output: Shape::vector(single(inputs)?.len()), ..Inferred::default() })
    }
    fn build(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(cpu::Flatten { input: build.inputs[0] }))
    }
    fn build_cuda(&self, build: &Build<'_>, element: Element) -> Result<Box<dyn Layer>> {
        Ok(Box::new(cuda::Flatten::new(build, element)?))
    }
}
