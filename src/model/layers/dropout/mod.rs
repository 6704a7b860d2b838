//! Dropout (Srivastava et al. 2014), inverted: in training a value is zeroed with probability `rate`, the others are
//! divided by 1 - rate; in evaluation nothing happens.
//!
//! The mask is a function of (seed, layer, position of the sample in the run): the same on any number of ranks, and
//! backward draws it again instead of keeping it.

mod cpu;
mod cuda;

use super::super::{Build, Inferred, Layer, LayerSpec, Shape};
use super::single;
use crate::device::cuda::kernels::Element;
use crate::error::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Dropout {
    /// Probability with which a value is zeroed, from 0 to below 1.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    rate: f32,
}

impl Default for Dropout {
    fn default() -> Self {
        Dropout { rate: 0.5 }
    }
}

impl LayerSpec for Dropout {
    fn infer(&self, inputs: &[Shape]) -> Result<Inferred, String> {
        let output = single(inputs)?;
        Ok(Inferred { output, forward_flops: output.len() as u64, ..Inferred::default() })
    }
    fn build(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(cpu::Dropout::new(build.inputs[0], self.rate, build.seed, build.layer)))
    }
    fn build_cuda(&self, build: &Build<'_>, element: Element) -> Result<Box<dyn Layer>> {
        Ok(Box::new(cuda::Dropout::new(self.rate, build, element)?))
    }
}

/// Draws of 16 bits below the threshold are dropped: the rate in steps of 1 / 65536. The others are scaled by 1 / (the share that
/// is kept in truth), so that the mean stays.
fn threshold_and_scale(rate: f32) -> (u32, f32) {
    let threshold = ((rate * 65536.0).round() as u32).min(65535);
    (threshold, 65536.0 / (65536 - threshold) as f32)
}
