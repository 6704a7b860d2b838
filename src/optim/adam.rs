use super::{At, Optimizer, Penalty, elementwise};

/// Adam (Kingma and Ba 2015; torch.optim.Adam). With t the number of this update, from 1:
///
/// ```text
/// m <- m + (1 - beta1) (g - m)         v <- beta2 v + (1 - beta2) g^2
/// w <- w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
/// ```
pub(super) struct Adam {
    pub betas: [f64; 2],
    pub eps: f32,
    pub penalty: Penalty,
}

/// AdamW (Loshchilov and Hutter 2019; torch.optim.AdamW): Adam whose weight decay stays out of the moments,
/// w <- (1 - lr weight_decay) w before the update.
pub(super) struct AdamW {
    pub betas: [f64; 2],
    pub eps: f32,
    pub penalty: Penalty,
}

const STATE: &[&str] = &["exp_avg", "exp_avg_sq"];

impl Optimizer for Adam {
    fn state(&self) -> &'static [&'static str] {
        STATE
    }

    fn update(&self, at: At, params: &mut [f32], grads: &[f32], state: &mut [&mut [f32]]) {
        let moments = Moments::new(at, self.betas, self.eps);
        let penalty = self.penalty;
        elementwise::update(params, grads, state, |w, g, state| moments.update(w, penalty.add(w, g), state));
    }
}

impl Optimizer for AdamW {
    fn state(&self) -> &'static [&'static str] {
        STATE
    }

    fn update(&self, at: At, params: &mut [f32], grads: &[f32], state: &mut [&mut [f32]]) {
        let moments = Moments::new(at, self.betas, self.eps);
        let keep = keep(at.lr, self.penalty.l2);
        let penalty = Penalty { l2: 0.0, ..self.penalty };
        elementwise::update(params, grads, state, |w, g, state| moments.update(w * keep, penalty.add(w, g), state));
    }
}

/// What AdamW's decay leaves of a weight.
pub(super) fn keep(lr: f32, weight_decay: f32) -> f32 {
    (1.0 - f64::from(lr) * f64::from(weight_decay)) as f32
}

/// What one step's formula needs, worked out in f64 as PyTorch does.
pub(super) struct Moments {
    pub one_minus_beta1: f32,
    pub beta2: f32,
    pub one_minus_beta2: f32,
    pub step_size: f32,
    pub sqrt_correction2: f32,
    pub eps: f32,
}

impl Moments {
    pub fn new(at: At, [beta1, beta2]: [f64; 2], eps: f32) -> Moments {
        let t = (at.step + 1) as f64;
        Moments {
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            step_size: (f64::from(at.lr) / (1.0 - beta1.powf(t))) as f32,
            sqrt_correction2: (1.0 - beta2.powf(t)).sqrt() as f32,
            eps,
        }
    }

    #[inline(always)]
    fn update(&self, w: f32, g: f32, [m, v]: [f32; 2]) -> (f32, [f32; 2]) {
        let m = m + self.one_minus_beta1 * (g - m);
        let v = self.beta2 * v + self.one_minus_beta2 * g * g;
        let scale = v.sqrt() / self.sqrt_correction2 + self.eps;
        (w - self.step_size * m / scale, [m, v])
    }
}
