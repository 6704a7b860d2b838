//! Clipping of the whole gradient before the update. By values, tensor by tensor; or by the L2 norm over all trainable
//! tensors, which takes two rounds: sum `norm::squares` over the tensors, then `scale` each by `norm_factor`.

/// What every gradient is multiplied by so that their common L2 norm is at most `max_norm`
/// (torch.nn.utils.clip_grad_norm_: min(1, max_norm / (norm + 1e-6))). `squares` is the sum over all trainable tensors,
/// always added in the same order.
pub fn norm_factor(squares: f64, max_norm: f32) -> f32 {
    (f64::from(max_norm) / (squares.sqrt() + 1e-6)).min(1.0) as f32
}

/// Multiplies a gradient by `norm_factor`; 1 leaves it alone.
pub fn scale(grads: &mut [f32], factor: f32) {
    if factor != 1.0 {
        grads.iter_mut().for_each(|g| *g *= factor);
    }
}

/// Clamps every value to +-`limit` (torch.nn.utils.clip_grad_value_). NaN stays NaN.
pub fn clip_value(grads: &mut [f32], limit: f32) {
    grads.iter_mut().for_each(|g| *g = g.clamp(-limit, limit));
}
