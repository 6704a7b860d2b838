use super::{At, Norms, Optimizer, Penalty, elementwise};

/// Layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017, algorithm 1). The norms are of the whole tensor:
///
/// ```text
/// rate = lr * trust_coefficient |w| / (|g| + weight_decay |w| + eps)
/// b <- momentum b + rate (g + weight_decay w)         w <- w - b
/// ```
///
/// A tensor whose weight or gradient is all zero (a fresh bias) has no ratio to trust and takes the plain rate, lr.
/// An L1 penalty is added to g in the second line only.
pub(super) struct Lars {
    pub momentum: f32,
    pub trust_coefficient: f32,
    pub eps: f32,
    pub penalty: Penalty,
}

impl Optimizer for Lars {
    fn state(&self) -> &'static [&'static str] {
        &["momentum_buffer"]
    }

    fn update(&self, at: At, params: &mut [f32], grads: &[f32], state: &mut [&mut [f32]]) {
        let &Lars { momentum, penalty, .. } = self;
        elementwise::update(params, grads, state, |w, g, [b]| {
            let b = momentum * b + at.lr * penalty.add(w, g);
            (w - b, [b])
        });
    }

    fn needs_norms(&self) -> bool {
        true
    }

    fn rate(&self, lr: f32, Norms { weight, gradient }: Norms) -> f32 {
        if weight == 0.0 || gradient == 0.0 {
            return lr;
        }
        let floor = gradient + f64::from(self.penalty.l2) * weight + f64::from(self.eps);
        lr * (f64::from(self.trust_coefficient) * weight / floor) as f32
    }
}
