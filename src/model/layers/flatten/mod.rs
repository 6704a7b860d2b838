//! Flatten: an image becomes a vector, in the order (C, H, W). The image lies in memory as (H, W, C), so values move; in
//! return the weights of a linear layer behind it are, value for value, those of the same net in PyTorch.

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
pub struct Flatten {}

impl LayerSpec for Flatten {
    fn infer(&self, inputs: &[Shape]) -> Result<Inferred, String> {
        Ok(Inferred { output: Shape::vector(single(inputs)?.len()), ..Inferred::default() })
    }
    fn build(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        Ok(match build.place {
            Place::Host => Box::new(cpu::Flatten { input: build.inputs[0] }),
            Place::Cuda => Box::new(cuda::Flatten::new(build, Element::F32)?),
        })
    }
    fn build_bf16(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        match build.place {
            Place::Host => widened::around(self, build),
            Place::Cuda => Ok(Box::new(cuda::Flatten::new(build, Element::Bf16)?)),
        }
    }
}
