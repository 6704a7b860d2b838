//! Global average pooling: the mean of each channel over the image, a vector.

mod cpu;
mod cuda;

use super::super::{Build, Inferred, Layer, LayerSpec, Shape};
use super::single;
use crate::device::Place;
use crate::device::cuda::kernels::Element;
use crate::error::Result;
use crate::model::widened;
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
        Ok(match build.place {
            Place::Host => Box::new(cpu::GlobalAvgPool { input: build.inputs[0] }),
            Place::Cuda => Box::new(cuda::GlobalAvgPool::new(build, Element::F32)?),
        })
    }
    fn build_bf16(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        match build.place {
            Place::Host => widened::around(self, build),
            Place::Cuda => Ok(Box::new(cuda::GlobalAvgPool::new(build, Element::Bf16)?)),
        }
    }
}
