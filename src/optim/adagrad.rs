use super::{At, Optimizer, Penalty, elementwise};

/// Adagrad (Duchi, Hazan, Singer 2011; torch.optim.Adagrad). With t the number of updates before this one:
///
/// ```text
/// s <- s + g^2         w <- w - lr / (1 + t lr_decay) * g / (sqrt(s) + eps)
/// ```
pub(super) struct Adagrad {
    pub eps: f32,
    pub lr_decay: f32,
    pub penalty: Penalty,
}

impl Optimizer for Adagrad {
    fn state(&self) -> &'static [&'static str] {
        &["sum"]
    }

    fn update(&self, at: At, params: &mut [f32], grads: &[f32], state: &mut [&mut [f32]]) {
        let &Adagrad { eps, lr_decay, penalty } = self;
        let lr = rate(at, lr_decay);
        elementwise::update(params, grads, state, |w, g, [s]| {
            let g = penalty.add(w, g);
            let s = s + g * g;
            (w - lr * g / (s.sqrt() + eps), [s])
        });
    }
}

/// The learning rate of a step.
pub(super) fn rate(at: At, lr_decay: f32) -> f32 {
    (f64::from(at.lr) / (1.0 + at.step as f64 * f64::from(lr_decay))) as f32
}
