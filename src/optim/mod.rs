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
use crate::error::{Error, Result};

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

/// The optimizer of `[optimizer]`.
pub fn new(config: &raw::Optimizer) -> Result<Box<dyn Optimizer>> {
    check(config)?;
    let penalty = Penalty { l1: config.shared.l1, l2: config.shared.weight_decay };
    Ok(match config.rule {
        Rule::Sgd { momentum, nesterov } => Box::new(sgd::Sgd { momentum, nesterov, penalty }),
        Rule::Adam { betas, eps } => Box::new(adam::Adam { betas, eps, penalty }),
        Rule::Adamw { betas, eps } => Box::new(adam::AdamW { betas, eps, penalty }),
        Rule::Adagrad { eps, lr_decay } => Box::new(adagrad::Adagrad { eps, lr_decay, penalty }),
        Rule::Adadelta { rho, eps } => Box::new(adadelta::Adadelta { rho, eps, penalty }),
        Rule::Lars { momentum, trust_coefficient, eps } => {
            Box::new(lars::Lars { momentum, trust_coefficient, eps, penalty })
        }
    })
}

fn check(config: &raw::Optimizer) -> Result<()> {
    let shared = &config.shared;
    not_negative("lr", shared.lr)?;
    not_negative("weight_decay", shared.weight_decay)?;
    not_negative("l1", shared.l1)?;
    for (key, limit) in [("clip_norm", shared.clip_norm), ("clip_value", shared.clip_value)] {
        let fits = |limit: f32| limit.is_finite() && limit > 0.0;
        require(limit.is_none_or(fits), key, limit.unwrap_or_default(), "a finite number above 0")?;
    }
    match config.rule {
        Rule::Sgd { momentum, nesterov } => {
            fraction("momentum", momentum)?;
            require(!nesterov || momentum > 0.0, "momentum", momentum, "above 0 for nesterov = true")
        }
        Rule::Adam { betas, eps } | Rule::Adamw { betas, eps } => {
            fraction("betas[0]", betas[0] as f32)?;
            fraction("betas[1]", betas[1] as f32)?;
            not_negative("eps", eps)
        }
        Rule::Adagrad { eps, lr_decay } => {
            not_negative("eps", eps)?;
            not_negative("lr_decay", lr_decay)
        }
        Rule::Adadelta { rho, eps } => {
            fraction("rho", rho)?;
            not_negative("eps", eps)
        }
        Rule::Lars { momentum, trust_coefficient, eps } => {
            fraction("momentum", momentum)?;
            not_negative("trust_coefficient", trust_coefficient)?;
            not_negative("eps", eps)
        }
    }
}

fn not_negative(key: &str, value: f32) -> Result<()> {
    require(value.is_finite() && value >= 0.0, key, value, "a finite number of at least 0")
}

fn fraction(key: &str, value: f32) -> Result<()> {
    require((0.0..1.0).contains(&value), key, value, "at least 0 and below 1")
}

fn require(fits: bool, key: &str, value: f32, expected: &str) -> Result<()> {
    if fits { Ok(()) } else { Err(Error::usage(format!("[optimizer] {key} = {value} must be {expected}"))) }
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
