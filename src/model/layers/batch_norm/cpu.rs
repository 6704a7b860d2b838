//! Each direction in training reads its tensors twice: once for sums over rows (a row is one pixel's channels), once to
//! write the result. The sums are taken over chunks of rows that stay in the cache, so the squares can be taken around
//! the chunk's own mean, which keeps them exact in f32; the chunks are then joined in their order, in f64 (Chan, Golub,
//! LeVeque 1983). Chunks depend on the shapes alone, so the bits do not depend on the threads.

use super::Activation;
use crate::error::Result;
use crate::model::simd::vectorized;
use crate::model::{Backward, Forward, Layer, Pass, Shape};
use rayon::prelude::*;

pub struct BatchNorm {
    channels: usize,
    epsilon: f32,
    activation: Activation,
    /// Rows of a chunk: about 64 KiB, and few enough for sums in f32.
    rows: usize,
    scratch: usize,
}

/// What forward leaves for backward, (C) each.
pub struct Statistics<'a> {
    mean: &'a [f32],
    /// 1 / sqrt(variance + epsilon), variance over the count.
    inverse_std: &'a [f32],
    /// Variance over the count less one, as PyTorch's running statistic has it.
    unbiased: &'a [f32],
}

impl<'a> Statistics<'a> {
    pub const fn bytes(channels: usize) -> usize {
        3 * channels * size_of::<f32>()
    }

    fn read(saved: &'a [f32], c: usize) -> Self {
        Statistics { mean: &saved[..c], inverse_std: &saved[c..2 * c], unbiased: &saved[2 * c..3 * c] }
    }
}

impl BatchNorm {
    pub fn new(input: Shape, batch: usize, epsilon: f32, activation: Activation) -> Self {
        let rows = (16 * 1024 / input.c.max(1)).clamp(16, 256);
        let chunks = (batch * input.h * input.w).div_ceil(rows);
        BatchNorm { channels: input.c, epsilon, activation, rows, scratch: chunks * 2 * input.c * size_of::<f32>() }
    }
}

impl Layer for BatchNorm {
    fn scratch_bytes(&self) -> usize {
        self.scratch
    }

    fn forward(&mut self, pass: &Pass, mut io: Forward<'_>) -> Result<()> {
        let c = self.channels;
        let x = io.inputs[0].f32();
        let [weight, bias, running_mean, running_var] = [0, 1, 2, 3].map(|i| io.params[i].f32());
        let (saved, scratch) = (io.saved.f32(), io.scratch.f32());
        let statistics = if pass.training {
            batch_statistics(x, c, self.rows, self.epsilon, scratch, saved);
            Statistics::read(saved, c)
        } else {
            let inverse_std = &mut scratch[..c];
            for (inverse_std, variance) in inverse_std.iter_mut().zip(running_var) {
                *inverse_std = 1.0 / (variance + self.epsilon).sqrt();
            }
            Statistics { mean: running_mean, inverse_std, unbiased: running_var }
        };
        let chunk = self.rows * c;
        (io.output.f32().par_chunks_mut(chunk), x.par_chunks(chunk)).into_par_iter().for_each(|(y, x)| {
            vectorized(
                #[inline(always)]
                || normalize(&statistics, weight, bias, x, y),
            );
            self.activation.apply(y);
        });
        Ok(())
    }

    fn backward(&mut self, pass: &Pass, mut io: Backward<'_>) -> Result<()> {
        let (c, chunk) = (self.channels, self.rows * self.channels);
        let x = io.inputs[0].f32();
        let statistics = Statistics::read(io.saved.f32(), c);
        let dy = io.grad_output.f32();
        if self.activation != Activation::None {
            let y = io.output.f32();
            (dy.par_chunks_mut(chunk), y.par_chunks(chunk))
                .into_par_iter()
                .for_each(|(dy, y)| self.activation.backward(y, dy));
        }

        let [grad_weight, grad_bias, grad_mean, grad_var] = io.grad_params else { panic!("four parameters") };
        let (grad_weight, grad_bias) = (grad_weight.f32(), grad_bias.f32());
        weight_gradients(&statistics, x, dy, self.rows, io.scratch.f32(), grad_weight, grad_bias);
        for (slot, batch) in [(grad_mean, statistics.mean), (grad_var, statistics.unbiased)] {
            slot.f32().iter_mut().zip(batch).for_each(|(slot, batch)| *slot = pass.share * batch);
        }

        let weight = io.params[0].f32();
        let count = (x.len() / c) as f32;
        let dx = io.grad_inputs[0].f32();
        (dx.par_chunks_mut(chunk), x.par_chunks(chunk), dy.par_chunks(chunk)).into_par_iter().for_each(
            |(dx, x, dy)| {
                vectorized(
                    #[inline(always)]
                    || input_gradient(&statistics, weight, (grad_weight, grad_bias), count, x, dy, dx),
                );
            },
        );
        Ok(())
    }
}

/// x (M, C), saved (3, C): mean, inverse standard deviation, unbiased variance; scratch (chunks, 2, C).
fn batch_statistics(x: &[f32], c: usize, rows: usize, epsilon: f32, scratch: &mut [f32], saved: &mut [f32]) {
    let chunks = x.len().div_ceil(rows * c);
    let partial = &mut scratch[..chunks * 2 * c];
    (x.par_chunks(rows * c), partial.par_chunks_exact_mut(2 * c)).into_par_iter().for_each(|(x, partial)| {
        let (mean, squares) = partial.split_at_mut(c);
        vectorized(
            #[inline(always)]
            || chunk_moments(x, mean, squares),
        );
    });

    let count = (x.len() / c) as f64;
    for channel in 0..c {
        let (mut seen, mut mean, mut squares) = (0.0, 0.0, 0.0);
        for (number, partial) in partial.chunks_exact(2 * c).enumerate() {
            let more = rows.min(x.len() / c - number * rows) as f64;
            let delta = f64::from(partial[channel]) - mean;
            mean += delta * more / (seen + more);
            squares += f64::from(partial[c + channel]) + delta * delta * seen * more / (seen + more);
            seen += more;
        }
        saved[channel] = mean as f32;
        saved[c + channel] = (1.0 / (squares / count + f64::from(epsilon)).sqrt()) as f32;
        // Of a single value there is no spread to see: 0, not 0 / 0.
        saved[2 * c + channel] = (squares / (count - 1.0).max(1.0)) as f32;
    }
}

/// x (rows, C), mean (C), squares (C): the sum of squares around this mean.
#[inline(always)]
fn chunk_moments(x: &[f32], mean: &mut [f32], squares: &mut [f32]) {
    let c = mean.len();
    mean.fill(0.0);
    for x in x.chunks_exact(c) {
        mean.iter_mut().zip(x).for_each(|(mean, x)| *mean += x);
    }
    let count = (x.len() / c) as f32;
    mean.iter_mut().for_each(|mean| *mean /= count);
    squares.fill(0.0);
    for x in x.chunks_exact(c) {
        for ((squares, x), mean) in squares.iter_mut().zip(x).zip(&*mean) {
            *squares += (x - mean) * (x - mean);
        }
    }
}

/// x (rows, C), y (rows, C), the others (C).
#[inline(always)]
fn normalize(statistics: &Statistics<'_>, weight: &[f32], bias: &[f32], x: &[f32], y: &mut [f32]) {
    let c = weight.len();
    let Statistics { mean, inverse_std, .. } = statistics;
    for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
        for i in 0..c {
            y[i] = (x[i] - mean[i]) * (inverse_std[i] * weight[i]) + bias[i];
        }
    }
}

/// dweight = sum over rows of dy * (x - mean) * inverse_std; dbias = sum over rows of dy.
/// x (M, C), dy (M, C), scratch (chunks, 2, C), dweight (C), dbias (C).
fn weight_gradients(
    statistics: &Statistics<'_>,
    x: &[f32],
    dy: &[f32],
    rows: usize,
    scratch: &mut [f32],
    dweight: &mut [f32],
    dbias: &mut [f32],
) {
    let c = dweight.len();
    let chunks = x.len().div_ceil(rows * c);
    let partial = &mut scratch[..chunks * 2 * c];
    (x.par_chunks(rows * c), dy.par_chunks(rows * c), partial.par_chunks_exact_mut(2 * c)).into_par_iter().for_each(
        |(x, dy, partial)| {
            let (products, sums) = partial.split_at_mut(c);
            vectorized(
                #[inline(always)]
                || chunk_gradients(statistics.mean, x, dy, products, sums),
            );
        },
    );
    for channel in 0..c {
        let (mut products, mut sum) = (0.0, 0.0);
        for partial in partial.chunks_exact(2 * c) {
            products += f64::from(partial[channel]);
            sum += f64::from(partial[c + channel]);
        }
        dweight[channel] = (products * f64::from(statistics.inverse_std[channel])) as f32;
        dbias[channel] = sum as f32;
    }
}

/// x (rows, C), dy (rows, C), products (C): the sum of dy * (x - mean), sums (C): of dy.
#[inline(always)]
fn chunk_gradients(mean: &[f32], x: &[f32], dy: &[f32], products: &mut [f32], sums: &mut [f32]) {
    let c = mean.len();
    products.fill(0.0);
    sums.fill(0.0);
    for (x, dy) in x.chunks_exact(c).zip(dy.chunks_exact(c)) {
        for i in 0..c {
            products[i] += dy[i] * (x[i] - mean[i]);
            sums[i] += dy[i];
        }
    }
}

/// dx = weight * inverse_std * (dy - dbias / M - (x - mean) * inverse_std * dweight / M).
/// x, dy, dx (rows, C), the others (C).
#[inline(always)]
fn input_gradient(
    statistics: &Statistics<'_>,
    weight: &[f32],
    (dweight, dbias): (&[f32], &[f32]),
    count: f32,
    x: &[f32],
    dy: &[f32],
    dx: &mut [f32],
) {
    let c = weight.len();
    let Statistics { mean, inverse_std, .. } = statistics;
    for ((dx, x), dy) in dx.chunks_exact_mut(c).zip(x.chunks_exact(c)).zip(dy.chunks_exact(c)) {
        for i in 0..c {
            let along = (x[i] - mean[i]) * (inverse_std[i] * dweight[i] / count);
            dx[i] = weight[i] * inverse_std[i] * (dy[i] - dbias[i] / count - along);
        }
    }
}
