//! f32 to bf16 and back. Narrowing rounds to the nearest, ties to even, as the CPUs' and PyTorch's conversions do; NaN
//! stays NaN.

use super::super::simd::vectorized;
use half::bf16;

/// from (N) to (N)
pub fn widen(from: &[bf16], to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    vectorized(
        #[inline(always)]
        || {
            for (to, from) in to.iter_mut().zip(from) {
                *to = f32::from_bits(u32::from(from.to_bits()) << 16);
            }
        },
    );
}

/// from (N) to (N)
pub fn narrow(from: &[f32], to: &mut [bf16]) {
    assert_eq!(from.len(), to.len());
    vectorized(
        #[inline(always)]
        || {
            for (to, &from) in to.iter_mut().zip(from) {
                *to = nearest(from);
            }
        },
    );
}

/// The bf16 nearest to `x`. Unlike `bf16::from_f32`, without a branch, so that loops over it become vector instructions.
#[inline(always)]
pub fn nearest(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    // Rounding could carry a NaN's fraction away, so a NaN is cut off and made quiet instead.
    let quiet = (bits >> 16) as u16 | 0x40;
    bf16::from_bits(if x.is_nan() { quiet } else { rounded })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// f32 values around every bf16: the value, just below and above the middle to the next, the middle, and NaNs.
    fn around_every_bf16() -> Vec<f32> {
        let tails = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        (0..=u16::MAX).flat_map(|high| tails.map(|low| f32::from_bits(u32::from(high) << 16 | low))).collect()
    }

    #[test]
    fn narrowing_rounds_to_the_nearest_even_and_keeps_nan() {
        let values = around_every_bf16();
        let mut narrowed = vec![bf16::ZERO; values.len()];
        narrow(&values, &mut narrowed);
        for (value, found) in values.iter().zip(narrowed) {
            assert_eq!(found.to_bits(), bf16::from_f32(*value).to_bits(), "{value:e} ({:#x})", value.to_bits());
        }
    }

    #[test]
    fn widening_is_exact() {
        let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let mut widened = vec![0.0; all.len()];
        widen(&all, &mut widened);
        for (from, to) in all.iter().zip(widened) {
            assert_eq!(to.to_bits(), u32::from(from.to_bits()) << 16);
        }
    }
}
