//! Scaling of the loss, for activations in fp16 (Micikevicius et al. 2018; torch.amp.GradScaler).
//!
//! fp16 ends at 6e-8, and many gradients by activations are smaller. So the loss is multiplied by a scale, and with it all
//! gradients; those of the parameters, sums in f32, are divided by it before anything else is made of them. At the other end,
//! 65504, a scale that is too large shows: a gradient is infinite or not a number.
//!
//! ```text
//! a gradient of the sum over all ranks is not finite:   nothing is updated, the scale is halved
//! all are, in the 2000th step in a row:                  the scale is doubled
//! ```
//!
//! All ranks have the same sums, so they decide the same. A step whose update was skipped counts as a step, but not in Adam's
//! bias correction. A loss that is not finite is another matter: no scale mends forward, and the run ends as it does in other
//! precisions.

use crate::config::raw;
use crate::error::{Error, Kind, Result};
use serde::{Deserialize, Serialize};

/// How the scale changes.
#[derive(Clone, Copy, Debug)]
pub struct Scaling {
    /// In the first step.
    pub start: f32,
    /// Steps without an overflow after which it is doubled; with 0 it stays as it is.
    pub growth_every: u32,
}

/// The scale between two steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    pub scale: f32,
    /// Without an overflow, since it was last changed.
    pub good_steps: u32,
    /// Updates of the run.
    pub skipped: u32,
    pub skipped_in_a_row: u32,
}

/// So many halvings bring a scale from 2^16 to 2^-16: it is not the scale that is to blame.
const MOST_IN_A_ROW: u32 = 32;

impl Scaling {
    pub const NONE: Scaling = Scaling { start: 1.0, growth_every: 0 };

    /// From `[optimizer]`, with PyTorch's defaults.
    pub fn new(config: &raw::OptimizerShared) -> Scaling {
        Scaling {
            start: config.loss_scale.unwrap_or(65536.0),
            growth_every: config.loss_scale_growth_every.unwrap_or(2000),
        }
    }
}

impl LossScale {
    pub fn at_first(scaling: Scaling) -> LossScale {
        LossScale { scale: scaling.start, good_steps: 0, skipped: 0, skipped_in_a_row: 0 }
    }

    /// Fails where no update comes through any more.
    pub fn check(&self) -> Result<()> {
        let LossScale { scale, skipped_in_a_row, .. } = self;
        if *skipped_in_a_row < MOST_IN_A_ROW {
            return Ok(());
        }
        Err(Error::new(
            Kind::NonFinite,
            format!(
                "gradients were not finite in the last {skipped_in_a_row} steps, whose updates were skipped; the loss scale is \
                 {scale:e} now. Lower optimizer.lr, or an optimizer.loss_scale that does not change, and go on from an earlier \
                 checkpoint; or use run.precision = \"bf16\", which has the range of f32"
            ),
        ))
    }
}
