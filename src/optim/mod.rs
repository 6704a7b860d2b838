//! Optimizers. They see one tensor, or a part of one, at a time and know nothing of ranks: by the time they run, the gradient
//! is the sum over all ranks of the gradient of the mean loss.
//!
//! Every rule is PyTorch's, with its formula, order of operations, defaults and names of state. Adding one: its file,
//! and one line of `new`.

mod adadelta;
mod adagrad;
mod adam;
pub mod clip;
pub mod cuda;
mod elementwise;
mod lars;
pub mod loss_scale;
pub mod norm;
pub mod schedule;
mod sgd;
#[cfg(test)]
mod tests;

use crate::config::raw::{self, Rule};

/// Circumstances of one update.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// Learning rate of this step, schedule and warm-up applied; of a rule that needs norms, what its `rate` made of it.
    pub lr: f32,
    /// Updates done before this one; Adam's bias correction uses step + 1.
    pub step: u64,
}

/// L2 norms of one whole tensor.
#[derive(Clone, Copy, Debug)]
pub struct Norms {
    pub weight: f64,
    /// Of the gradient after clipping.
    pub gradient: f64,
}

/// A rule that turns a gradient into an update.
pub trait Optimizer: Send + Sync {
    /// Names of the state tensors it keeps per parameter, as checkpoints call them: `momentum_buffer`, `exp_avg`, ...
    fn state(&self) -> &'static [&'static str];

    /// Updates a tensor, or a part of one, in place; the bits are the same however it is cut. All slices have its length,
    /// `state` is in the order of `state()` and starts as zeros.
    fn update(&self, at: At, params: &mut [f32], grads: &[f32], state: &mut [&mut [f32]]);

    /// Whether each tensor has a learning rate of its own, `rate` of its norms.
    fn needs_norms(&self) -> bool {
        false
    }

    /// The learning rate of a tensor with these norms before the update.
    fn rate(&self, lr: f32, _norms: Norms) -> f32 {
        lr
    }
}

/// The optimizer of `[optimizer]`, whose values are in the ranges of `config::raw`'s schema.
pub fn new(config: &raw::Optimizer) -> Box<dyn Optimizer> {
    let penalty = Penalty { l1: config.shared.l1, l2: config.shared.weight_decay };
    match config.rule {
        Rule::Sgd { momentum, nesterov } => Box::new(sgd::Sgd { momentum, nesterov, penalty }),
        Rule::Adam { betas, eps } => Box::new(adam::Adam { betas, eps, penalty }),
        Rule::Adamw { betas, eps } => Box::new(adam::AdamW { betas, eps, penalty }),
        Rule::Adagrad { eps, lr_decay } => Box::new(adagrad::Adagrad { eps, lr_decay, penalty }),
        Rule::Adadelta { rho, eps } => Box::new(adadelta::Adadelta { rho, eps, penalty }),
        Rule::Lars { momentum, trust_coefficient, eps } => {
            Box::new(lars::Lars { momentum, trust_coefficient, eps, penalty })
        }
    }
}

/// What is added to the gradient so that weights stay small: l2 * w (`weight_decay`) and l1 * sign(w).
#[derive(Clone, Copy, Debug)]
struct Penalty {
    l1: f32,
    l2: f32,
}

impl Penalty {
    #[inline(always)]
    fn add(self, w: f32, g: f32) -> f32 {
        let sign = f32::from(w > 0.0) - f32::from(w < 0.0);
        g + self.l1 * sign + self.l2 * w
    }
}
