//! What layers with bf16 kernels do to the gradient of their output before they multiply it.

use crate::model::simd::vectorized;
use half::bf16;
use rayon::prelude::*;

/// Values of a task.
const CHUNK: usize = 8192;
/// Channels of a task of `add_rows`: two cache lines of a row.
const CHANNELS: usize = 64;

/// dy = 0 where the ReLU's output y is not positive; nothing where `y` is empty.
pub fn mask(y: &[bf16], dy: &mut [bf16]) {
    dy.par_chunks_mut(CHUNK).zip(y.par_chunks(CHUNK)).for_each(|(dy, y)| {
        vectorized(
            #[inline(always)]
            || {
                for (dy, y) in dy.iter_mut().zip(y) {
                    // Their bits grow with positive values, up to infinity; NaN lies above.
                    let positive = (y.to_bits().wrapping_sub(1)) < bf16::INFINITY.to_bits();
                    *dy = if positive { *dy } else { bf16::ZERO };
                }
            },
        );
    });
}

/// dy (rows, C), sums (C): adds up the rows, in order.
pub fn add_rows(dy: &[bf16], sums: &mut [f32]) {
    let c = sums.len();
    sums.par_chunks_mut(CHANNELS).enumerate().for_each(|(number, sums)| {
        vectorized(
            #[inline(always)]
            || {
                let mut totals = [0.0; CHANNELS];
                let totals = &mut totals[..sums.len()];
                totals.copy_from_slice(sums);
                for row in dy.chunks_exact(c) {
                    for (total, dy) in totals.iter_mut().zip(&row[number * CHANNELS..]) {
                        *total += f32::from_bits(u32::from(dy.to_bits()) << 16);
                    }
                }
                sums.copy_from_slice(totals);
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_is_the_slope_of_relu() {
        let y: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let mut dy = vec![bf16::ONE; y.len()];
        mask(&y, &mut dy);
        for (y, dy) in y.iter().zip(dy) {
            assert_eq!(dy == bf16::ONE, y.to_f32() > 0.0, "{y} ({:#x})", y.to_bits());
        }
    }

    #[test]
    fn rows_are_added_to_what_is_there() {
        let (rows, c) = (7, 2 * CHANNELS + 3);
        let dy: Vec<bf16> = (0..rows * c).map(|i| bf16::from_f32((i % 251) as f32)).collect();
        let mut sums: Vec<f32> = (0..c).map(|i| i as f32).collect();
        add_rows(&dy, &mut sums);
        for (i, sum) in sums.iter().enumerate() {
            let column: f32 = (0..rows).map(|row| ((row * c + i) % 251) as f32).sum();
            assert_eq!(*sum, i as f32 + column);
        }
    }
}
