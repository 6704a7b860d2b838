use super::{At, Optimizer, Penalty, elementwise};

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
        let rate = at.lr * self.trust_ratio(params, grads);
        elementwise::update(params, grads, state, |w, g, [b]| {
            let b = momentum * b + rate * penalty.add(w, g);
            (w - b, [b])
        });
    }
}

impl Lars {
    fn trust_ratio(&self, params: &[f32], grads: &[f32]) -> f32 {
        let weight = elementwise::sum_of_squares(params).sqrt();
        let gradient = elementwise::sum_of_squares(grads).sqrt();
        if weight == 0.0 || gradient == 0.0 {
            return 1.0;
        }
        let floor = gradient + f64::from(self.penalty.l2) * weight + f64::from(self.eps);
        (f64::from(self.trust_coefficient) * weight / floor) as f32
    }
}
