//! Optimizers. They see one tensor at a time and know nothing of ranks: by the time they run, the gradient is the sum
//! over all ranks of the gradient of the mean loss.
//!
//! Every rule is PyTorch's, with its formula, order of operations, defaults and names of state. Adding one: its file,
//! and one line of `new`.

mod adadelta;
mod adagrad;
mod adam;
pub mod clip;
mod elementwise;
mod lars;
pub mod schedule;
mod sgd;
#[cfg(test)]
mod tests;

use crate::config::raw::{self, Rule};

/// Circumstances of one update.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// Learning rate of this step, schedule and warm-up applied.
    pub lr: f32,
    /// Updates done before this one; Adam's bias correction uses step + 1.
    pub step: u64,
}

/// A rule that turns a gradient into an update.
pub trait Optimizer: Send + Sync {
    /// Names of the state tensors it keeps per parameter, as checkpoints call them: `momentum_buffer`, `exp_avg`, ...
    fn state(&self) -> &'static [&'static str];

    /// Updates one whole tensor in place. All slices have its length, `state` is in the order of `state()` and starts as
    /// zeros. Element-wise rules give the same bits however the tensor is cut; LARS takes norms over what it is given.
    fn update(&self, at: At, params: &mut [f32], grads: &[f32], state: &mut [&mut [f32]]);
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
