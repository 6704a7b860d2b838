//! Element-wise activations: as layers of their own, and fused into other layers through `activation = "..."`.
//! All of them can be undone from their output, so backward never needs what came in.

pub mod bf16;
mod cpu;

use super::super::{Build, Inferred, Layer, LayerSpec, Shape};
use super::single;
use crate::error::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `activation = "..."` of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    #[default]
    None,
    /// max(x, 0)
    Relu,
    /// 1 / (1 + exp(-x))
    Sigmoid,
    Tanh,
}

impl Activation {
    pub fn is_relu_or_none(self) -> bool {
        matches!(self, Activation::None | Activation::Relu)
    }
}

macro_rules! activation_layer {
    ($name:ident) => {
        #[derive(Debug, Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {}

        impl LayerSpec for $name {
            fn infer(&self, inputs: &[Shape]) -> Result<Inferred, String> {
                let output = single(inputs)?;
                Ok(Inferred {
                    output,
                    forward_flops: output.len() as u64,
                    backward_reads_output: true,
                    ..Inferred::default()
                })
            }
            fn build(&self, _: &Build<'_>) -> Result<Box<dyn Layer>> {
                Ok(Box::new(cpu::Elementwise(Activation::$name)))
            }
        }
    };
}

activation_layer!(Relu);
activation_layer!(Sigmoid);
activation_layer!(Tanh);
