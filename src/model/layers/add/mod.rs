//! Sum of several inputs of one shape: the end of a residual block.

mod cpu;
mod cuda;

use super::super::{Build, Inferred, Layer, LayerSpec, Shape};
use super::{Activation, several};
use crate::device::cuda::kernels::Element;
use crate::error::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Add {
    /// Applied to the sum.
    #[serde(default)]
    activation: Activation,
}

impl LayerSpec for Add {
    fn infer(&self, inputs: &[Shape]) -> Result<Inferred, String> {
        let output = several(inputs)?;
        if let Some(number) = inputs.iter().position(|shape| *shape != output) {
            let (first, other) = (output, inputs[number]);
            return Err(format!(
                "adds inputs of one shape, but the first is {first} and number {} is {other}",
                number + 1
            ));
        }
        Ok(Inferred {
            output,
            forward_flops: (output.len() * (inputs.len() - 1)) as u64,
            backward_reads_output: self.activation != Activation::None,
            relu_output: self.activation == Activation::Relu,
            ..Inferred::default()
        })
    }
    fn build(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        let (activation, undo) = (self.activation, self.activation.to_undo(build));
        Ok(Box::new(cpu::Add { activation, undo }))
    }
    fn build_cuda(&self, build: &Build<'_>, element: Element) -> Result<Box<dyn Layer>> {
        let (activation, undo) = (self.activation, self.activation.to_undo(build));
        Ok(Box::new(cuda::Add::new(activation, undo, element)?))
    }
}
