//! The learning rate as a function of the step: a closed form, so that a resumed run needs nothing but the step.
//!
//! Warm-up over W steps gives lr (s + 1) / W at step s: the first step already moves, step W - 1 has the whole rate.
//! Exponential, polynomial and cosine begin when warm-up ends, so their highest rate is lr; the epochs of a step schedule
//! are counted from the start of the run (Goyal et al. 2017).

use crate::config::raw::{self, ScheduleShape};
use crate::error::{Error, Result};
use std::f64::consts::PI;
use std::fmt::Display;

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
    /// `total_steps` is the run's length where `[run]` gives one. Fails with what does not fit and what to write instead.
    pub fn new(
        config: &raw::Schedule,
        base_lr: f32,
        steps_per_epoch: u64,
        total_steps: Option<u64>,
        world_size: usize,
    ) -> Result<Schedule> {
        let scale = if config.shared.scale_lr_with_world { world_size as f64 } else { 1.0 };
        let warmup = warmup_steps(&config.shared, steps_per_epoch)?;
        if let Some(total) = total_steps.filter(|&total| warmup > total) {
            return refuse(format!("warm-up takes {warmup} steps, but the run ends after {total}; shorten it"));
        }
        let shape = Shape::new(&config.shape, steps_per_epoch as f64, warmup, total_steps)?;
        Ok(Schedule { base_lr: f64::from(base_lr) * scale, warmup, shape })
    }

    /// The rate of the update that follows `step` others.
    pub fn lr(&self, step: u64) -> f32 {
        let rise = if step < self.warmup { (step + 1) as f64 / self.warmup as f64 } else { 1.0 };
        (rise * self.shape.lr(self.base_lr, step, step.saturating_sub(self.warmup))) as f32
    }
}

fn warmup_steps(config: &raw::ScheduleShared, steps_per_epoch: u64) -> Result<u64> {
    let epochs = config.warmup_epochs;
    if epochs != 0.0 && config.warmup_steps != 0 {
        return refuse("warmup_epochs and warmup_steps are both given; keep one");
    }
    if !(epochs.is_finite() && epochs >= 0.0) {
        return refuse(format!("warmup_epochs = {epochs} must be a finite number of at least 0"));
    }
    Ok(config.warmup_steps.max((epochs * steps_per_epoch as f64).round() as u64))
}

impl Shape {
    fn new(config: &ScheduleShape, steps_per_epoch: f64, warmup: u64, total_steps: Option<u64>) -> Result<Shape> {
        let after_warmup = |name: &str| match total_steps {
            Some(total) => Ok((total - warmup).max(1) as f64),
            None => refuse(format!("type = \"{name}\" needs to know where the run ends; give [run] epochs or steps")),
        };
        Ok(match config {
            ScheduleShape::Constant {} => Shape::Constant,
            ScheduleShape::Step { gamma, every_epochs: Some(every), at_epochs: None } => {
                let steps = positive("every_epochs", *every)? * steps_per_epoch;
                Shape::StepEvery { gamma: positive("gamma", *gamma)?, steps: steps.max(1.0) }
            }
            ScheduleShape::Step { gamma, every_epochs: None, at_epochs: Some(at) } => {
                let steps = at.iter().map(|&at| Ok((positive("at_epochs", at)? * steps_per_epoch).round() as u64));
                Shape::StepAt { gamma: positive("gamma", *gamma)?, steps: steps.collect::<Result<_>>()? }
            }
            ScheduleShape::Step { .. } => return refuse("type = \"step\" takes one of every_epochs and at_epochs"),
            ScheduleShape::Exponential { gamma } => {
                Shape::Exponential { gamma: positive("gamma", *gamma)?, steps: steps_per_epoch }
            }
            ScheduleShape::Polynomial { power, end_lr } => Shape::Polynomial {
                power: positive("power", *power)?,
                end_lr: not_negative("end_lr", *end_lr)?,
                steps: after_warmup("polynomial")?,
            },
            ScheduleShape::Cosine { end_lr } => {
                Shape::Cosine { end_lr: not_negative("end_lr", *end_lr)?, steps: after_warmup("cosine")? }
            }
        })
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

fn positive(key: &str, value: impl Into<f64> + Display + Copy) -> Result<f64> {
    match value.into() {
        number if number.is_finite() && number > 0.0 => Ok(number),
        _ => refuse(format!("{key} = {value} must be a finite number above 0")),
    }
}

fn not_negative(key: &str, value: impl Into<f64> + Display + Copy) -> Result<f64> {
    match value.into() {
        number if number.is_finite() && number >= 0.0 => Ok(number),
        _ => refuse(format!("{key} = {value} must be a finite number of at least 0")),
    }
}

fn refuse<T>(message: impl Display) -> Result<T> {
    Err(Error::usage(format!("[schedule] {message}")))
}
