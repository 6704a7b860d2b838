//! Local response normalisation across channels (Krizhevsky, Sutskever, Hinton 2012, section 3.3):
//!
//! ```text
//! b_i = a_i / s_i^beta        s_i = bias + alpha * sum over |j - i| <= depth_radius of a_j^2
//! ```
//!
//! PyTorch's `LocalResponseNorm(size, alpha, beta, k)` divides alpha by the size of the neighbourhood: it is this layer
//! with size = 2 * depth_radius + 1, PyTorch's alpha = (2 * depth_radius + 1) * alpha, and k = bias.

mod cpu;
mod cuda;

use super::super::{Build, Inferred, Layer, LayerSpec, Shape};
use super::single;
use crate::device::cuda::kernels::Element;
use crate::error::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Lrn {
    /// Neighbours on each side, at most 16.
    #[schemars(range(max = cpu::MAX_RADIUS))]
    depth_radius: usize,
    #[schemars(extend("exclusiveMinimum" = 0))]
    bias: f32,
    /// Factor of the plain sum of squares (PyTorch's is divided by the number of channels in it).
    #[schemars(range(min = 0))]
    alpha: f32,
    #[schemars(range(min = 0))]
    beta: f32,
}

impl Default for Lrn {
    fn default() -> Self {
        Lrn { depth_radius: 5, bias: 2.0, alpha: 1e-4, beta: 0.75 }
    }
}

impl LayerSpec for Lrn {
    fn infer(&self, inputs: &[Shape]) -> Result<Inferred, String> {
        let output = single(inputs)?;
        Ok(Inferred {
            output,
            forward_flops: (output.len() * (2 * self.depth_radius + 8)) as u64,
            backward_reads_input: true,
            can_mask_input: true,
            ..Inferred::default()
        })
    }
    fn build(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(cpu::Cpu { keys: *self, channels: build.inputs[0].c, masks_input: build.masks_input }))
    }
    fn build_cuda(&self, build: &Build<'_>, element: Element) -> Result<Box<dyn Layer>> {
        Ok(Box::new(cuda::Cuda::new(*self, build, element)?))
    }
}
