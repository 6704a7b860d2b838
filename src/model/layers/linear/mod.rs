//! `type = "linear"`: y(n, o) = activation(bias(o) + sum over i of x(n, i) * weight(o, i)).

mod bf16;
mod cpu;
mod cuda;
pub mod factors;
#[cfg(test)]
mod tests;

use super::super::init::Initializer;
use super::super::kernels::gemm16::Kernel;
use super::super::params::{Layout, ParamSpec, Role};
use super::super::widened;
use super::super::{Build, Factors, GpuScratch, Inferred, Layer, LayerSpec, Shape};
use super::{Activation, addressable, refuse_unused_bias_init, single};
use crate::device::Place;
use crate::device::cuda::cublaslt;
use crate::device::cuda::kernels::Element;
use crate::error::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Linear {
    /// Outputs.
    #[schemars(range(min = 1))]
    units: usize,
    #[serde(default = "super::yes")]
    bias: bool,
    #[serde(default)]
    activation: Activation,
    /// Of the weight; the default keeps the variance of activations through layers of ReLUs.
    #[serde(default)]
    init: Initializer,
    /// The first value of every bias.
    #[serde(default)]
    bias_init: f32,
}

impl Linear {
    /// Inputs a sample.
    fn width(&self, inputs: &[Shape]) -> Result<usize, String> {
        let input = single(inputs)?;
        if !input.is_vector() {
            return Err(format!(
                "takes a vector, but its input is {input}; put a flatten or global_avg_pool layer before it"
            ));
        }
        addressable("weight", &[self.units, input.c])?;
        Ok(input.c)
    }
}

impl LayerSpec for Linear {
    fn infer(&self, inputs: &[Shape]) -> Result<Inferred, String> {
        refuse_unused_bias_init(self.bias, self.bias_init)?;
        let width = self.width(inputs)?;
        let weight = ParamSpec {
            name: "weight",
            shape: vec![self.units, width],
            layout: Layout::Canonical,
            init: self.init.resolve(width, self.units),
            role: Role::Trainable,
        };
        let bias = self.bias.then(|| ParamSpec::bias(self.units, self.bias_init));
        Ok(Inferred {
            output: Shape::vector(self.units),
            params: std::iter::once(weight).chain(bias).collect(),
            forward_flops: 2 * width as u64 * self.units as u64,
            backward_reads_input: true,
            backward_reads_output: self.activation != Activation::None,
            relu_output: self.activation == Activation::Relu,
            factors: Some(Factors { inputs: width, units: self.units, bias: self.bias }),
            ..Inferred::default()
        })
    }

    fn gpu_scratch(&self, _: &Build<'_>, _: Element) -> GpuScratch {
        GpuScratch { bytes: 0, workspace: cublaslt::MOST_WORKSPACE_BYTES }
    }

    fn build(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        let width = self.width(build.inputs).map_err(Error::usage)?;
        match build.place {
            Place::Host => Ok(Box::new(cpu::Linear::new(width, self.units, self.bias, self.activation, build))),
            Place::Cuda => self.on_gpu(Element::F32, build),
        }
    }

    fn build_bf16(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        if build.place == Place::Cuda {
            return self.on_gpu(Element::Bf16, build);
        }
        match Kernel::best().is_native().then(|| self.native(Kernel::best(), build)).flatten() {
            Some(layer) => Ok(Box::new(layer)),
            None => widened::around(self, build),
        }
    }
}

impl Linear {
    fn on_gpu(&self, element: Element, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        let width = self.width(build.inputs).map_err(Error::usage)?;
        Ok(Box::new(cuda::Linear::new((width, self.units), self.bias, self.activation, element, build)?))
    }

    /// The operator with bf16 products; of activations they know ReLU.
    fn native(&self, kernel: &'static Kernel, build: &Build<'_>) -> Option<bf16::Linear> {
        let width = self.width(build.inputs).ok()?;
        self.activation.is_relu_or_none().then(|| {
            bf16::Linear::new(kernel, (width, self.units), self.bias, self.activation == Activation::Relu, build)
        })
    }
}
