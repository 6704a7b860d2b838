//! The learning rate as a function of the step: a closed form, so that a resumed run needs nothing but the step.
//!
//! Warm-up over W steps gives lr (s + 1) / W at step s: the first step already moves, step W - 1 has the whole rate.
//! Exponential, polynomial and cosine begin when warm-up ends, so their highest rate is lr; the epochs of a step schedule
//! are counted from the start of the run (Goyal et al. 2017).

use crate::config::plan::Plan;
use crate::config::raw::{self, ScheduleShape};
use std::f64::consts::PI;

/// The resolved `[schedule]`.
#[derive(Clone, Debug)]
pub struct Schedule {
    base_lr: f64,
    warmup: u64,
    shape: Shape,
}

/// Times in steps.
#[derive(Clone, Debug)]
enum Shape {
    Constant,
    StepEvery { gamma: f64, steps: f64 },
    StepAt { gamma: f64, steps: Vec<u64> },
    Exponential { gamma: f64, steps: f64 },
    Polynomial { power: f64, end_lr: f64, steps: f64 },
    Cosine { end_lr: f64, steps: f64 },
}

impl Schedule {
    /// From `[schedule]`, as `config` lets it pass, and the numbers derived for this world.
    pub fn new(config: &raw::Schedule, base_lr: f32, plan: &Plan) -> Schedule {
        let scale = if config.shared.scale_lr_with_world { plan.ranks as f64 } else { 1.0 };
        Schedule {
            base_lr: f64::from(base_lr) * scale,
            warmup: plan.warmup_steps,
            shape: Shape::new(&config.shape, plan),
        }
    }

    /// The rate of the update that follows `step` others.
    pub fn lr(&self, step: u64) -> f32 {
        let rise = if step < self.warmup { (step + 1) as f64 / self.warmup as f64 } else { 1.0 };
        (rise * self.shape.lr(self.base_lr, step, step.saturating_sub(self.warmup))) as f32
    }
}

impl Shape {
    fn new(config: &ScheduleShape, plan: &Plan) -> Shape {
        let epoch = plan.steps_per_epoch as f64;
        let after_warmup = || {
            let total = plan.total_steps.expect("config::rules asks for the run's length");
            // None are left where the run ends within its warm-up.
            total.saturating_sub(plan.warmup_steps).max(1) as f64
        };
        match config {
            ScheduleShape::Constant {} => Shape::Constant,
            ScheduleShape::Step { gamma, every_epochs: Some(every), at_epochs: None } => {
                Shape::StepEvery { gamma: f64::from(*gamma), steps: (every * epoch).max(1.0) }
            }
            ScheduleShape::Step { gamma, every_epochs: None, at_epochs: Some(at) } => {
                let steps = at.iter().map(|at| (at * epoch).round() as u64);
                Shape::StepAt { gamma: f64::from(*gamma), steps: steps.collect() }
            }
            ScheduleShape::Step { .. } => unreachable!("config::rules asks for one of every_epochs and at_epochs"),
            ScheduleShape::Exponential { gamma } => Shape::Exponential { gamma: f64::from(*gamma), steps: epoch },
            ScheduleShape::Polynomial { power, end_lr } => {
                Shape::Polynomial { power: f64::from(*power), end_lr: f64::from(*end_lr), steps: after_warmup() }
            }
            ScheduleShape::Cosine { end_lr } => Shape::Cosine { end_lr: f64::from(*end_lr), steps: after_warmup() },
        }
    }

    /// `step` counts from the start of the run, `warm` from the end of warm-up.
    fn lr(&self, lr: f64, step: u64, warm: u64) -> f64 {
        let share_of = |steps: &f64| (warm as f64 / steps).min(1.0);
        match self {
            Shape::Constant => lr,
            // The half puts a fractional boundary at the nearest step.
            Shape::StepEvery { gamma, steps } => lr * gamma.powf(((step as f64 + 0.5) / steps).floor()),
            Shape::StepAt { gamma, steps } => lr * gamma.powf(steps.iter().filter(|&&at| step >= at).count() as f64),
            Shape::Exponential { gamma, steps } => lr * gamma.powf(warm as f64 / steps),
            Shape::Polynomial { power, end_lr, steps } => {
                let remaining = (1.0 - share_of(steps)).powf(*power);
                lr * remaining + end_lr * (1.0 - remaining)
            }
            Shape::Cosine { end_lr, steps } => {
                let remaining = (1.0 + (PI * share_of(steps)).cos()) / 2.0;
                end_lr + (lr - end_lr) * remaining
            }
        }
    }
}
