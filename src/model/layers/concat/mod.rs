//! Concatenation of several inputs along the channels: the end of an inception block.

mod cpu;
mod cuda;

use super::super::{Build, Inferred, Layer, LayerSpec, Shape};
use super::several;
use crate::device::cuda::kernels::Element;
use crate::error::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Concat {}

impl LayerSpec for Concat {
    fn infer(&self, inputs: &[Shape]) -> Result<Inferred, String> {
        let first = several(inputs)?;
        if let Some(number) = inputs.iter().position(|shape| (shape.h, shape.w) != (first.h, first.w)) {
            let other = inputs[number];
            return Err(format!(
                "joins inputs of one height and width, but the first is {first} and number {} is {other}",
                number + 1
            ));
        }
        let c = inputs.iter().map(|shape| shape.c).sum();
        Ok(Inferred { output: Shape::new(first.h, first.w, c), ..Inferred::default() })
    }
    fn build(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(cpu::Concat { inputs: build.inputs.iter().map(|shape| shape.c).collect() }))
    }
    fn build_cuda(&self, build: &Build<'_>, element: Element) -> Result<Box<dyn Layer>> {
        Ok(Box::new(cuda::Concat::new(build, element)?))
    }
}
