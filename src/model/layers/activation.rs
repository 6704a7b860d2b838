//! Element-wise activations: as layers of their own, and fused into other layers through `activation = "..."`.
//! All of them can be undone from their output, so backward never needs what came in.

use super::super::{Backward, Build, Forward, Inferred, Layer, LayerSpec, Pass, Shape};
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
    Relu,
    Sigmoid,
    Tanh,
}

impl Activation {
    /// `y = f(y)` in place.
    pub fn apply(self, y: &mut [f32]) {
        match self {
            Activation::None => {}
            Activation::Relu => y.iter_mut().for_each(|y| *y = y.max(0.0)),
            Activation::Sigmoid => y.iter_mut().for_each(|y| *y = 1.0 / (1.0 + (-*y).exp())),
            Activation::Tanh => y.iter_mut().for_each(|y| *y = y.tanh()),
        }
    }

    /// `dy *= f'(x)`, with f'(x) from the output `y = f(x)`.
    pub fn backward(self, y: &[f32], dy: &mut [f32]) {
        let pairs = dy.iter_mut().zip(y);
        match self {
            Activation::None => {}
            Activation::Relu => pairs.for_each(|(dy, y)| *dy = if *y > 0.0 { *dy } else { 0.0 }),
            Activation::Sigmoid => pairs.for_each(|(dy, y)| *dy *= y * (1.0 - y)),
            Activation::Tanh => pairs.for_each(|(dy, y)| *dy *= 1.0 - y * y),
        }
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
                Ok(Box::new(Cpu(Activation::$name)))
            }
        }
    };
}

activation_layer!(Relu);
activation_layer!(Sigmoid);
activation_layer!(Tanh);

struct Cpu(Activation);

impl Layer for Cpu {
    fn forward(&mut self, _: &Pass, mut io: Forward<'_>) -> Result<()> {
        io.output.f32().copy_from_slice(io.inputs[0].f32());
        self.0.apply(io.output.f32());
        Ok(())
    }
    fn backward(&mut self, _: &Pass, mut io: Backward<'_>) -> Result<()> {
        self.0.backward(io.output.f32(), io.grad_output.f32());
        if io.grad_inputs[0].bytes() > 0 {
            io.grad_inputs[0].f32().copy_from_slice(io.grad_output.f32());
        }
        Ok(())
    }
}
