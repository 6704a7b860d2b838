use super::{At, Optimizer, Penalty, elementwise};

/// Adadelta (Zeiler 2012; torch.optim.Adadelta):
///
/// ```text
/// v <- rho v + (1 - rho) g^2         d = sqrt(u + eps) / sqrt(v + eps) * g
/// u <- rho u + (1 - rho) d^2         w <- w - lr d
/// ```
pub(super) struct Adadelta {
    pub rho: f32,
    pub eps: f32,
    pub penalty: Penalty,
}

impl Optimizer for Adadelta {
    fn state(&self) -> &'static [&'static str] {
        &["square_avg", "acc_delta"]
    }

    fn update(&self, at: At, params: &mut [f32], grads: &[f32], state: &mut [&mut [f32]]) {
        let &Adadelta { rho, eps, penalty } = self;
        elementwise::update(params, grads, state, |w, g, [v, u]| {
            let g = penalty.add(w, g);
            let v = rho * v + (1.0 - rho) * g * g;
            let d = (u + eps).sqrt() / (v + eps).sqrt() * g;
            let u = rho * u + (1.0 - rho) * d * d;
            (w - at.lr * d, [v, u])
        });
    }
}
