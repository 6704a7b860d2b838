//! Batch normalisation (Ioffe and Szegedy 2015) of each channel over samples and pixels:
//!
//! ```text
//! y = activation(weight * (x - mean) / sqrt(variance + epsilon) + bias)
//! ```
//!
//! In training, mean and (biased) variance are those of the call's own samples: each rank, and each micro-batch,
//! normalises by itself, as in PyTorch's DistributedDataParallel. The running statistics that evaluation uses are a
//! different matter: their updates travel through the gradient's all-reduce, so they are the same on all ranks.

mod cpu;
mod cuda;

use super::super::params::{Init, Layout, ParamSpec, Role};
use super::super::{Build, GpuScratch, Inferred, Layer, LayerSpec, Shape};
use super::{Activation, single};
use crate::device::Place;
use crate::device::cuda::kernels::Element;
use crate::error::Result;
use crate::model::widened;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BatchNorm {
    /// Weight of the newest batch in the running statistics.
    #[schemars(range(min = 0, max = 1))]
    momentum: f32,
    /// Added to the variance.
    #[schemars(extend("exclusiveMinimum" = 0))]
    epsilon: f32,
    activation: Activation,
}

impl Default for BatchNorm {
    fn default() -> Self {
        BatchNorm { momentum: 0.1, epsilon: 1e-5, activation: Activation::None }
    }
}

impl LayerSpec for BatchNorm {
    fn infer(&self, inputs: &[Shape]) -> Result<Inferred, String> {
        let output = single(inputs)?;
        let running = Role::Running { momentum: self.momentum };
        let param = |name, value, role| ParamSpec {
            name,
            shape: vec![output.c],
            layout: Layout::Canonical,
            init: Init::Constant(value),
            role,
        };
        Ok(Inferred {
            output,
            params: vec![
                param("weight", 1.0, Role::Trainable),
                param("bias", 0.0, Role::Trainable),
                param("running_mean", 0.0, running),
                param("running_var", 1.0, running),
            ],
            forward_flops: 8 * output.len() as u64,
            saved_bytes_fixed: cpu::saved_bytes(output.c),
            backward_reads_input: true,
            backward_reads_output: self.activation != Activation::None,
            relu_output: self.activation == Activation::Relu,
            ..Inferred::default()
        })
    }
    fn gpu_scratch(&self, build: &Build<'_>, element: Element) -> GpuScratch {
        GpuScratch { bytes: cuda::Chunks::new(build, element).scratch_bytes(), workspace: 0 }
    }

    fn build(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        Ok(match build.place {
            Place::Host => Box::new(cpu::BatchNorm::new(self.epsilon, self.activation, build)),
            Place::Cuda => Box::new(cuda::BatchNorm::new(self.epsilon, self.activation, build, Element::F32)?),
        })
    }
    fn build_bf16(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        match build.place {
            Place::Host => widened::around(self, build),
            Place::Cuda => Ok(Box::new(cuda::BatchNorm::new(self.epsilon, self.activation, build, Element::Bf16)?)),
        }
    }
}
