use super::{At, Optimizer, Penalty, elementwise};

/// Stochastic gradient descent (torch.optim.SGD with dampening 0):
///
/// ```text
/// b <- momentum b + g         w <- w - lr b,   nesterov: w <- w - lr (g + momentum b)
/// ```
///
/// PyTorch starts b as the first gradient, which is what momentum * 0 + g gives.
pub(super) struct Sgd {
    pub momentum: f32,
    pub nesterov: bool,
    pub penalty: Penalty,
}

impl Optimizer for Sgd {
    fn state(&self) -> &'static [&'static str] {
        if self.momentum == 0.0 { &[] } else { &["momentum_buffer"] }
    }

    fn update(&self, at: At, params: &mut [f32], grads: &[f32], state: &mut [&mut [f32]]) {
        let &Sgd { momentum, nesterov, penalty } = self;
        if momentum == 0.0 {
            elementwise::update(params, grads, state, |w, g, []| (w - at.lr * penalty.add(w, g), []));
        } else if nesterov {
            elementwise::update(params, grads, state, |w, g, [b]| {
                let g = penalty.add(w, g);
                let b = momentum * b + g;
                (w - at.lr * (g + momentum * b), [b])
            });
        } else {
            elementwise::update(params, grads, state, |w, g, [b]| {
                let b = momentum * b + penalty.add(w, g);
                (w - at.lr * b, [b])
            });
        }
    }
}
