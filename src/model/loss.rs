//! The loss: what the last layer's outputs are worth, given the labels, and its gradient.
//!
//! Every loss is a mean over samples of a per-sample loss. A call sees a part of the batch, so it returns the sum over
//! its samples, and takes the factor (one over the samples of the whole step) that makes gradients add up to the mean's.

pub mod cuda;

use crate::config::raw;
use crate::device::{Slice, SliceMut};
use crate::error::{Error, Result};

/// A loss over (batch, classes) outputs.
#[derive(Clone, Debug)]
pub struct Loss {
    classes: usize,
    rule: Rule,
}

#[derive(Clone, Debug)]
enum Rule {
    /// sum over k of target_k * weight_k * -log softmax(x)_k, less the target's own entropy where KL is wanted.
    CrossEntropy { smoothing: f32, weights: Option<Vec<f32>>, entropy: f32 },
    /// mean over k of (x_k - target_k)^2
    SquaredError,
}

/// Sums over the samples of a call.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossOut {
    pub loss_sum: f32,
    /// Samples whose largest output is the label's.
    pub correct: usize,
}

impl Loss {
    /// From `[loss]`, with class weights resolved to a number for each class.
    ///
    /// A weight multiplies the loss of its class's samples, and the mean is over samples. PyTorch divides by the sum of
    /// the batch's weights instead, which would couple the ranks; for "balanced" weights, whose mean over the training
    /// set is 1, the two agree in expectation.
    pub fn new(config: &raw::Loss, classes: usize, class_weights: Option<Vec<f32>>) -> Result<Loss> {
        let rule = match *config {
            raw::Loss::SoftmaxCrossEntropy { label_smoothing, .. } => {
                Rule::CrossEntropy { smoothing: label_smoothing, weights: class_weights, entropy: 0.0 }
            }
            raw::Loss::KlDivergence { label_smoothing } => {
                let entropy = target_entropy(label_smoothing, classes);
                Rule::CrossEntropy { smoothing: label_smoothing, weights: None, entropy }
            }
            raw::Loss::Mse {} => Rule::SquaredError,
        };
        check(&rule, classes)?;
        Ok(Loss { classes, rule })
    }

    /// Loss and gradient: outputs (batch, classes), labels (batch), grad (batch, classes) = scale * dloss/doutputs.
    pub fn forward_backward(&self, outputs: Slice<'_>, labels: &[u32], scale: f32, grad: SliceMut<'_>) -> LossOut {
        let rows = grad.into_f32().chunks_exact_mut(self.classes);
        for ((dx, x), label) in rows.zip(outputs.f32().chunks_exact(self.classes)).zip(labels) {
            self.gradient(x, *label as usize, scale, dx);
        }
        self.evaluate(outputs, labels)
    }

    /// The loss alone: outputs (batch, classes), labels (batch), each below `classes` as the dataset has checked.
    pub fn evaluate(&self, outputs: Slice<'_>, labels: &[u32]) -> LossOut {
        let outputs = outputs.f32();
        assert_eq!(outputs.len(), labels.len() * self.classes, "outputs for {} labels", labels.len());
        let (mut loss_sum, mut correct) = (0.0, 0);
        for (x, label) in outputs.chunks_exact(self.classes).zip(labels) {
            let label = *label as usize;
            assert!(label < self.classes, "label {label} of {} classes", self.classes);
            loss_sum += f64::from(self.value(x, label));
            correct += usize::from(argmax(x) == label);
        }
        LossOut { loss_sum: loss_sum as f32, correct }
    }

    /// x (classes): the loss of one sample.
    fn value(&self, x: &[f32], label: usize) -> f32 {
        match &self.rule {
            Rule::CrossEntropy { smoothing, weights, entropy } => {
                let normalizer = LogSoftmax::of(x);
                let term = |k| target(*smoothing, weights.as_deref(), self.classes, label, k) * normalizer.at(x[k]);
                // Without smoothing the other targets are 0, and 0 * log 0 should be 0.
                let others = if *smoothing > 0.0 { 0..self.classes } else { label..label + 1 };
                entropy - others.map(term).sum::<f32>()
            }
            Rule::SquaredError => {
                let squares = x.iter().enumerate().map(|(k, x)| (x - one_hot(label, k)).powi(2));
                squares.sum::<f32>() / self.classes as f32
            }
        }
    }

    /// x (classes), dx (classes) = scale * dvalue/dx.
    fn gradient(&self, x: &[f32], label: usize, scale: f32, dx: &mut [f32]) {
        match &self.rule {
            Rule::CrossEntropy { smoothing, weights, .. } => {
                let target = |k| target(*smoothing, weights.as_deref(), self.classes, label, k);
                let total: f32 = (0..self.classes).map(target).sum();
                let normalizer = LogSoftmax::of(x);
                for (k, (dx, x)) in dx.iter_mut().zip(x).enumerate() {
                    *dx = scale * (total * normalizer.at(*x).exp() - target(k));
                }
            }
            Rule::SquaredError => {
                for (k, (dx, x)) in dx.iter_mut().zip(x).enumerate() {
                    *dx = scale * 2.0 * (x - one_hot(label, k)) / self.classes as f32;
                }
            }
        }
    }
}

fn check(rule: &Rule, classes: usize) -> Result<()> {
    let Rule::CrossEntropy { smoothing, weights, .. } = rule else { return Ok(()) };
    if !(0.0..1.0).contains(smoothing) {
        return Err(Error::usage(format!("label_smoothing {smoothing}: it must be at least 0 and below 1")));
    }
    let Some(weights) = weights else { return Ok(()) };
    if weights.len() != classes {
        return Err(Error::usage(format!(
            "class_weights has {} values, but there are {classes} classes",
            weights.len()
        )));
    }
    match weights.iter().find(|weight| !(weight.is_finite() && **weight >= 0.0)) {
        Some(weight) => Err(Error::usage(format!("class_weights has a {weight}: weights are finite and not negative"))),
        None => Ok(()),
    }
}

/// What the outputs should be: the label's one, mixed with the uniform distribution, times the class's weight.
fn target(smoothing: f32, weights: Option<&[f32]>, classes: usize, label: usize, k: usize) -> f32 {
    let share = (1.0 - smoothing) * one_hot(label, k) + smoothing / classes as f32;
    weights.map_or(share, |weights| weights[k] * share)
}

fn one_hot(label: usize, k: usize) -> f32 {
    if k == label { 1.0 } else { 0.0 }
}

/// sum over k of target_k * log target_k: the same for every label.
fn target_entropy(smoothing: f32, classes: usize) -> f32 {
    let terms = (0..classes).map(|k| target(smoothing, None, classes, 0, k));
    terms.filter(|share| *share > 0.0).map(|share| share * share.ln()).sum()
}

/// log softmax(x)_k = (x_k - largest) - log(sum of exp(x_j - largest)): nothing overflows, and the difference is taken
/// first, so that large logits lose no digits.
struct LogSoftmax {
    largest: f32,
    log_sum: f32,
}

impl LogSoftmax {
    fn of(x: &[f32]) -> LogSoftmax {
        let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        LogSoftmax { largest, log_sum: x.iter().map(|x| (x - largest).exp()).sum::<f32>().ln() }
    }

    fn at(&self, x: f32) -> f32 {
        (x - self.largest) - self.log_sum
    }
}

/// The first of the largest values.
fn argmax(x: &[f32]) -> usize {
    x.iter().enumerate().fold(0, |best, (k, value)| if *value > x[best] { k } else { best })
}

#[cfg(test)]
mod tests;
