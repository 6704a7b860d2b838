//! What a rule computes with in one step.

use crate::config::raw::{self, Rule};
use crate::device::cuda::kernels::{Argument, Value};
use crate::optim::adam::{self, Moments};
use crate::optim::{At, adagrad};

/// As in optim.cu. A rule reads those that it has.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Numbers {
    pub l1: f32,
    pub l2: f32,
    /// Infinite where values are not clamped.
    pub clip_value: f32,
    /// Of all gradients, for their common norm: 1 until it is measured.
    pub factor: f32,
    /// Of all gradients, where the loss is scaled: set by `begin_step`.
    pub unscale: f32,
    /// The learning rate, with what the rule makes of it before it sees an element.
    pub rate: f32,
    /// Of SGD and LARS.
    pub momentum: f32,
    pub eps: f32,
    /// What is left of the mean of squares, and what is added to it: beta2 and rho, and 1 less them.
    pub decay: f32,
    pub gain: f32,
    /// What is added to Adam's first moment: 1 - beta1.
    pub first_gain: f32,
    /// Of Adam's second moment: sqrt(1 - beta2^t).
    pub correction: f32,
    /// What AdamW's decay leaves of a weight; else 1.
    pub keep: f32,
    /// Of LARS.
    pub trust: f32,
    /// Infinite where the norm is not clipped.
    pub max_norm: f32,
    /// What `begin_step` makes `rate` and `correction` of, when updates were skipped: updates before this one, and what the rules
    /// have that count them.
    pub step: u64,
    pub betas: [f64; 2],
    pub lr_decay: f64,
    pub lr: f32,
    _padding: f32,
}

impl Value for Numbers {
    const NAME: &'static str = "Numbers";
}

// SAFETY: the same struct in optim.cu: fifteen floats, four words of 64 bits behind a gap of 32 bits, two floats.
unsafe impl Argument for Numbers {
    fn c_type() -> String {
        Self::NAME.to_owned()
    }
}

impl Numbers {
    pub fn new(config: &raw::Optimizer, at: At) -> Numbers {
        let shared = &config.shared;
        let plain = Numbers {
            l1: shared.l1,
            l2: shared.weight_decay,
            clip_value: shared.clip_value.unwrap_or(f32::INFINITY),
            factor: 1.0,
            unscale: 1.0,
            rate: at.lr,
            momentum: 0.0,
            eps: 0.0,
            decay: 0.0,
            gain: 0.0,
            first_gain: 0.0,
            correction: 1.0,
            keep: 1.0,
            trust: 0.0,
            max_norm: shared.clip_norm.unwrap_or(f32::INFINITY),
            step: at.step,
            betas: [0.0; 2],
            lr_decay: 0.0,
            lr: at.lr,
            _padding: 0.0,
        };
        match config.rule {
            Rule::Sgd { momentum, .. } => Numbers { momentum, ..plain },
            Rule::Adam { betas, eps } => Numbers { betas, ..plain }.with_moments(&Moments::new(at, betas, eps)),
            Rule::Adamw { betas, eps } => {
                let keep = adam::keep(at.lr, shared.weight_decay);
                Numbers { l2: 0.0, keep, betas, ..plain }.with_moments(&Moments::new(at, betas, eps))
            }
            Rule::Adagrad { eps, lr_decay } => {
                Numbers { rate: adagrad::rate(at, lr_decay), eps, lr_decay: f64::from(lr_decay), ..plain }
            }
            Rule::Adadelta { rho, eps } => Numbers { decay: rho, gain: 1.0 - rho, eps, ..plain },
            Rule::Lars { momentum, trust_coefficient, eps } => {
                Numbers { momentum, trust: trust_coefficient, eps, ..plain }
            }
        }
    }

    fn with_moments(self, moments: &Moments) -> Numbers {
        Numbers {
            rate: moments.step_size,
            eps: moments.eps,
            decay: moments.beta2,
            gain: moments.one_minus_beta2,
            first_gain: moments.one_minus_beta1,
            correction: moments.sqrt_correction2,
            ..self
        }
    }
}
