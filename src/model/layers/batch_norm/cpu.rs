//! Each direction in training reads its tensors twice: once for sums over rows (a row is one pixel's channels), once to
//! write the result. The sums are taken over chunks of rows that stay in the cache, so the squares can be taken around
//! the chunk's own mean, which keeps them exact in f32; the chunks are then joined in their order, in f64 (Chan, Golub,
//! LeVeque 1983). Chunks depend on the shapes alone, so the bits do not depend on the threads.
//!
//! Rows of few channels are taken several at a time, as one wide row, so that the loops have something to vectorise:
//! what belongs to channels is repeated (`spread`), and sums are folded back (`fold`).

use super::Activation;
use crate::error::Result;
use crate::model::simd::vectorized;
use crate::model::{Backward, Build, Forward, Layer, Pass};
use rayon::prelude::*;

pub struct BatchNorm {
    channels: usize,
    epsilon: f32,
    activation: Activation,
    /// What backward has to undo of it.
    undo: Activation,
    /// Channels of a wide row.
    wide: usize,
    /// Values of a chunk of rows.
    chunk: usize,
    scratch: usize,
}

/// What forward leaves for backward, (C) each.
struct Statistics<'a> {
    mean: &'a [f32],
    /// 1 / sqrt(variance + epsilon), variance over the count.
    inverse_std: &'a [f32],
    /// Variance over the count less one, as PyTorch's running statistic has it.
    unbiased: &'a [f32],
}

pub const fn saved_bytes(channels: usize) -> usize {
    3 * channels * size_of::<f32>()
}

/// Factors of the formulas that are the same for all rows.
const FACTORS: usize = 4;

impl BatchNorm {
    pub fn new(epsilon: f32, activation: Activation, build: &Build<'_>) -> Self {
        let (input, undo) = (build.inputs[0], activation.to_undo(build));
        let channels = input.c;
        let wide = channels * (128 / channels).max(1);
        // About 64 KiB, and few enough rows for sums in f32.
        let chunk = wide * (16 * 1024 / wide).clamp(16, 256);
        let chunks = (build.batch * input.len()).div_ceil(chunk);
        let scratch = (FACTORS + 2 * chunks) * wide * size_of::<f32>();
        BatchNorm { channels, epsilon, activation, undo, wide, chunk, scratch }
    }
}

impl Layer for BatchNorm {
    fn scratch_bytes(&self) -> usize {
        self.scratch
    }

    fn forward(&mut self, pass: &Pass, mut io: Forward<'_>) -> Result<()> {
        let (c, wide) = (self.channels, self.wide);
        let x = io.inputs[0].f32();
        let [weight, bias, running_mean, running_var] = [0, 1, 2, 3].map(|i| io.params[i].f32());
        let (factors, partial) = io.scratch.f32().split_at_mut(FACTORS * wide);
        let (mean, rest) = factors.split_at_mut(wide);
        let (scale, rest) = rest.split_at_mut(wide);
        let shift = &mut rest[..wide];
        if pass.training {
            let saved = io.saved.f32();
            self.batch_statistics(x, partial, saved);
            let statistics = Statistics::read(saved, c);
            spread(mean, c, |i| statistics.mean[i]);
            spread(scale, c, |i| statistics.inverse_std[i] * weight[i]);
        } else {
            spread(mean, c, |i| running_mean[i]);
            spread(scale, c, |i| weight[i] / (running_var[i] + self.epsilon).sqrt());
        }
        spread(shift, c, |i| bias[i]);

        let (mean, scale, shift) = (&*mean, &*scale, &*shift);
        (io.output.f32().par_chunks_mut(self.chunk), x.par_chunks(self.chunk)).into_par_iter().for_each(|(y, x)| {
            vectorized(
                #[inline(always)]
                || normalize(mean, scale, shift, x, y),
            );
            self.activation.apply(y);
        });
        Ok(())
    }

    fn backward(&mut self, pass: &Pass, mut io: Backward<'_>) -> Result<()> {
        let (c, wide) = (self.channels, self.wide);
        self.undo.backward(io.output.f32(), io.grad_output.f32());
        let (x, dy) = (io.inputs[0].f32(), io.grad_output.f32());
        let statistics = Statistics::read(io.saved.f32(), c);
        let (factors, partial) = io.scratch.f32().split_at_mut(FACTORS * wide);
        let (mean, rest) = factors.split_at_mut(wide);
        spread(mean, c, |i| statistics.mean[i]);

        let [grad_weight, grad_bias, grad_mean, grad_var] = io.grad_params else { panic!("four parameters") };
        let (grad_weight, grad_bias) = (grad_weight.f32(), grad_bias.f32());
        self.weight_gradients(mean, statistics.inverse_std, x, dy, partial, grad_weight, grad_bias);
        for (slot, batch) in [(grad_mean, statistics.mean), (grad_var, statistics.unbiased)] {
            slot.f32().iter_mut().zip(batch).for_each(|(slot, batch)| *slot = pass.share * batch);
        }

        let (scale, rest) = rest.split_at_mut(wide);
        let (level, slope) = rest.split_at_mut(wide);
        let (weight, count) = (io.params[0].f32(), (x.len() / c) as f32);
        spread(scale, c, |i| weight[i] * statistics.inverse_std[i]);
        spread(level, c, |i| grad_bias[i] / count);
        spread(slope, c, |i| grad_weight[i] * statistics.inverse_std[i] / count);
        let (mean, scale, level, slope) = (&*mean, &*scale, &*level, &*slope);
        let dx = io.grad_inputs[0].f32().par_chunks_mut(self.chunk);
        (dx, x.par_chunks(self.chunk), dy.par_chunks(self.chunk)).into_par_iter().for_each(|(dx, x, dy)| {
            vectorized(
                #[inline(always)]
                || input_gradient(mean, scale, level, slope, x, dy, dx),
            );
        });
        Ok(())
    }
}

impl<'a> Statistics<'a> {
    fn read(saved: &'a [f32], c: usize) -> Self {
        Statistics { mean: &saved[..c], inverse_std: &saved[c..2 * c], unbiased: &saved[2 * c..3 * c] }
    }
}

impl BatchNorm {
    /// x (M, C), partial (chunks, 2, wide), saved (3, C): mean, inverse standard deviation, unbiased variance.
    fn batch_statistics(&self, x: &[f32], partial: &mut [f32], saved: &mut [f32]) {
        let (c, wide, chunk) = (self.channels, self.wide, self.chunk);
        let partial = &mut partial[..x.len().div_ceil(chunk) * 2 * wide];
        (x.par_chunks(chunk), partial.par_chunks_exact_mut(2 * wide)).into_par_iter().for_each(|(x, partial)| {
            let (mean, squares) = partial.split_at_mut(wide);
            vectorized(
                #[inline(always)]
                || chunk_moments(c, x, mean, squares),
            );
        });

        let count = (x.len() / c) as f64;
        for channel in 0..c {
            let (mut seen, mut mean, mut squares) = (0.0, 0.0, 0.0);
            for (x, partial) in x.chunks(chunk).zip(partial.chunks_exact(2 * wide)) {
                let more = (x.len() / c) as f64;
                let delta = f64::from(partial[channel]) - mean;
                mean += delta * more / (seen + more);
                squares += f64::from(partial[wide + channel]) + delta * delta * seen * more / (seen + more);
                seen += more;
            }
            saved[channel] = mean as f32;
            saved[c + channel] = (1.0 / (squares / count + f64::from(self.epsilon)).sqrt()) as f32;
            // Of a single value there is no spread to see: 0, not 0 / 0.
            saved[2 * c + channel] = (squares / (count - 1.0).max(1.0)) as f32;
        }
    }

    /// dweight = sum over rows of dy * (x - mean) * inverse_std; dbias = sum over rows of dy.
    /// mean (wide), inverse_std (C), x (M, C), dy (M, C), partial (chunks, 2, wide), dweight (C), dbias (C).
    #[allow(clippy::too_many_arguments)]
    fn weight_gradients(
        &self,
        mean: &[f32],
        inverse_std: &[f32],
        x: &[f32],
        dy: &[f32],
        partial: &mut [f32],
        dweight: &mut [f32],
        dbias: &mut [f32],
    ) {
        let (c, wide, chunk) = (self.channels, self.wide, self.chunk);
        let partial = &mut partial[..x.len().div_ceil(chunk) * 2 * wide];
        (x.par_chunks(chunk), dy.par_chunks(chunk), partial.par_chunks_exact_mut(2 * wide)).into_par_iter().for_each(
            |(x, dy, partial)| {
                let (products, sums) = partial.split_at_mut(wide);
                vectorized(
                    #[inline(always)]
                    || chunk_gradients(c, mean, x, dy, products, sums),
                );
            },
        );
        for channel in 0..c {
            let (mut products, mut sum) = (0.0, 0.0);
            for partial in partial.chunks_exact(2 * wide) {
                products += f64::from(partial[channel]);
                sum += f64::from(partial[wide + channel]);
            }
            dweight[channel] = (products * f64::from(inverse_std[channel])) as f32;
            dbias[channel] = sum as f32;
        }
    }
}

/// x (rows, C), mean (wide), squares (wide): the sum of squares around this mean.
#[inline(always)]
fn chunk_moments(c: usize, x: &[f32], mean: &mut [f32], squares: &mut [f32]) {
    mean.fill(0.0);
    for x in x.chunks(mean.len()) {
        for (mean, x) in mean.iter_mut().zip(x) {
            *mean += x;
        }
    }
    fold(mean, c);
    let count = (x.len() / c) as f32;
    for mean in &mut mean[..c] {
        *mean /= count;
    }
    for start in (c..mean.len()).step_by(c) {
        mean.copy_within(..c, start);
    }
    squares.fill(0.0);
    for x in x.chunks(mean.len()) {
        for ((squares, x), mean) in squares.iter_mut().zip(x).zip(&*mean) {
            *squares += (x - mean) * (x - mean);
        }
    }
    fold(squares, c);
}

/// mean (wide), x (rows, C), dy (rows, C), products (wide): the sum of dy * (x - mean), sums (wide): of dy.
#[inline(always)]
fn chunk_gradients(c: usize, mean: &[f32], x: &[f32], dy: &[f32], products: &mut [f32], sums: &mut [f32]) {
    products.fill(0.0);
    sums.fill(0.0);
    for (x, dy) in x.chunks(mean.len()).zip(dy.chunks(mean.len())) {
        let to = products.iter_mut().zip(sums.iter_mut());
        for ((((product, sum), x), dy), mean) in to.zip(x).zip(dy).zip(mean) {
            *product += dy * (x - mean);
            *sum += dy;
        }
    }
    fold(products, c);
    fold(sums, c);
}

/// y = scale * (x - mean) + shift: x (rows, C), y (rows, C), the others (wide).
#[inline(always)]
fn normalize(mean: &[f32], scale: &[f32], shift: &[f32], x: &[f32], y: &mut [f32]) {
    for (y, x) in y.chunks_mut(mean.len()).zip(x.chunks(mean.len())) {
        for ((((y, x), mean), scale), shift) in y.iter_mut().zip(x).zip(mean).zip(scale).zip(shift) {
            *y = (x - mean) * scale + shift;
        }
    }
}

/// dx = scale * (dy - level - slope * (x - mean)), with scale = weight * inverse_std, level = dbias / M and slope =
/// dweight * inverse_std / M: x, dy, dx (rows, C), the others (wide).
#[inline(always)]
fn input_gradient(mean: &[f32], scale: &[f32], level: &[f32], slope: &[f32], x: &[f32], dy: &[f32], dx: &mut [f32]) {
    let wide = mean.len();
    for ((dx, x), dy) in dx.chunks_mut(wide).zip(x.chunks(wide)).zip(dy.chunks(wide)) {
        let factors = mean.iter().zip(scale).zip(level).zip(slope);
        for (((dx, x), dy), (((mean, scale), level), slope)) in dx.iter_mut().zip(x).zip(dy).zip(factors) {
            *dx = scale * (dy - level - slope * (x - mean));
        }
    }
}

/// wide (k, C): every row is f of its channels.
fn spread(wide: &mut [f32], c: usize, f: impl Fn(usize) -> f32) {
    for row in wide.chunks_exact_mut(c) {
        row.iter_mut().enumerate().for_each(|(i, value)| *value = f(i));
    }
}

/// wide (k, C): the sum over rows goes to the first.
#[inline(always)]
fn fold(wide: &mut [f32], c: usize) {
    let (sum, rest) = wide.split_at_mut(c);
    for row in rest.chunks_exact(c) {
        for (sum, value) in sum.iter_mut().zip(row) {
            *sum += value;
        }
    }
}
