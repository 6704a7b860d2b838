//! Softmax over channels. For classification use the loss `softmax_cross_entropy` on the logits instead: it contains the
//! softmax, and is exact where this layer's output rounds to 0 or 1.

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
pub struct Softmax {}

impl LayerSpec for Softmax {
    fn infer(&self, inputs: &[Shape]) -> Result<Inferred, String> {
        let output = single(inputs)?;
        Ok(Inferred {
            output,
            forward_flops: 5 * output.len() as u64,
            backward_reads_output: true,
            ..Inferred::default()
        })
    }
    fn build(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(cpu::Softmax { channels: build.inputs[0].c }))
    }
    fn build_cuda(&self, build: &Build<'_>, element: Element) -> Result<Box<dyn Layer>> {
        Ok(Box::new(cuda::Softmax::new(build, element)?))
    }
}
