//! Global max pooling: the largest value of each channel in the image, a vector.

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
pub struct GlobalMaxPool {}

impl LayerSpec for GlobalMaxPool {
    fn infer(&self, inputs: &[Shape]) -> Result<Inferred, String> {
        let input = single(inputs)?;
        Ok(Inferred {
            output: Shape::vector(input.c),
            forward_flops: input.len() as u64,
            saved_bytes: input.c * size_of::<u32>(),
            ..Inferred::default()
        })
    }
    fn build(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(cpu::GlobalMaxPool { input: build.inputs[0] }))
    }
    fn build_cuda(&self, build: &Build<'_>, element: Element) -> Result<Box<dyn Layer>> {
        Ok(Box::new(cuda::GlobalMaxPool::new(build, element)?))
    }
}
