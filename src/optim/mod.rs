//! Optimizers. They see one tensor at a time and know nothing of ranks: by the time they run, the gradient is the sum
//! over all ranks of the gradient of the mean loss.

/// Circumstances of one update.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// Learning rate of this step, schedule and warm-up applied.
    pub lr: f32,
    /// Updates done before this one; Adam's bias correction uses step + 1.
    pub step: u64,
}

/// A rule that turns a gradient into an update.
pub trait Optimizer: Send + Sync {
    /// Names of the state tensors it keeps per parameter, as checkpoints call them: `momentum_buffer`, `exp_avg`, ...
    fn state(&self) -> &'static [&'static str];

    /// Updates one whole tensor in place. All slices have its length, `state` is in the order of `state()` and starts as
    /// zeros. Element-wise rules give the same bits however the tensor is cut; LARS takes norms over what it is given.
    fn update(&self, at: At, params: &mut [f32], grads: &[f32], state: &mut [&mut [f32]]);
}
