//! Element-wise activations: as layers of their own, and fused into other layers through `activation = "..."`.
//! All of them can be undone from their output, so backward never needs what came in.

pub mod bf16;
mod cpu;
pub mod cuda;

use super::super::{Build, Inferred, Layer, LayerSpec, Shape};
use super::single;
use crate::device::cuda::kernels::Element;
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

    /// Its name in `activation.cuh`.
    pub fn number(self) -> u32 {
        match self {
            Activation::None => 0,
            Activation::Relu => 1,
            Activation::Sigmoid => 2,
            Activation::Tanh => 3,
        }
    }

    /// What backward has to undo of it: nothing where the reader of the output has.
    pub(crate) fn to_undo(self, build: &Build<'_>) -> Activation {
        if build.grad_masked { Activation::None } else { self }
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
                    relu_output: Activation::$name == Activation::Relu,
                    ..Inferred::default()
                })
            }
            fn build(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
                let (activation, undo) = (Activation::$name, Activation::$name.to_undo(build));
                Ok(Box::new(cpu::Elementwise { activation, undo }))
            }
            fn build_cuda(&self, build: &Build<'_>, element: Element) -> Result<Box<dyn Layer>> {
                let (activation, undo) = (Activation::$name, Activation::$name.to_undo(build));
                Ok(Box::new(cuda::Elementwise::new(activation, undo, element)?))
            }
        }
    };
}

activation_layer!(Relu);
activation_layer!(Sigmoid);
activation_layer!(Tanh);
