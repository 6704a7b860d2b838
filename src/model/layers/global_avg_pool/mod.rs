//! Global average pooling: the mean of each channel over the image, a vector.

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
pub struct GlobalAvgPool {}

impl LayerSpec for GlobalAvgPool {
    fn infer(&self, inputs: &[Shape]) -> Result<Inferred, String> {
        let input = single(inputs)?;
        Ok(Inferred { output: Shape::vector(input.c), forward_flops: input.len() as u64, ..Inferred::default() })
    }
    fn build(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(cpu::GlobalAvgPool { input: build.inputs[0] }))
    }
    fn build_cuda(&self, build: &Build<'_>, element: Element) -> Result<Box<dyn Layer>> {
        Ok(Box::new(cuda::GlobalAvgPool::new(build, element)?))
    }
}
