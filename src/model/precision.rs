//! The type of activations and of the matrix work: `[run] precision`.
//!
//! bf16 is the upper half of an f32: the same range, 8 significant bits instead of 24. Activations and their gradients
//! are kept in it, and matrices are multiplied in it, into sums in f32; parameters, their gradients and the optimizer's
//! state stay f32 ("mixed precision", Micikevicius et al. 2018; bf16 needs no scaling of the loss, Kalamkar et al. 2019).
//! Kernels compute in f32 registers and round once, to nearest even, when they store.

use super::kernels::convert::{self, nearest};
use super::simd::vectorized;
use crate::device::Slice;
use crate::device::cuda::kernels::Element;
use half::bf16;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::ops::Range;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32 bits everywhere.
    #[default]
    F32,
    /// Activations and matrix work in bfloat16, sums and parameters in 32 bits.
    Bf16,
}

impl Precision {
    /// Bytes of an activation's value.
    pub const fn bytes(self) -> usize {
        match self {
            Precision::F32 => size_of::<f32>(),
            Precision::Bf16 => size_of::<bf16>(),
        }
    }

    /// What a GPU's kernels call it.
    pub const fn element(self) -> Element {
        match self {
            Precision::F32 => Element::F32,
            Precision::Bf16 => Element::Bf16,
        }
    }

    /// Where elements of an arena lie.
    pub const fn bytes_of(self, elements: &Range<usize>) -> Range<usize> {
        elements.start * self.bytes()..elements.end * self.bytes()
    }

    pub fn is_finite(self, activation: Slice<'_>) -> bool {
        match self {
            Precision::F32 => activation.f32().iter().all(|value| value.is_finite()),
            Precision::Bf16 => activation.bf16().iter().all(|value| value.is_finite()),
        }
    }
}

/// Values of a task: what is read and what is written fit into the nearest cache together.
const CHUNK: usize = 4096;

/// to = from, on all threads.
pub fn widen(from: &[bf16], to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| convert::widen(from, to));
}

/// to = from, rounded, on all threads.
pub fn narrow(from: &[f32], to: &mut [bf16]) {
    assert_eq!(from.len(), to.len());
    to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| convert::narrow(from, to));
}

/// sum += term, rounded once, on all threads.
pub fn add_bf16(sum: &mut [bf16], term: &[bf16]) {
    sum.par_chunks_mut(CHUNK).zip(term.par_chunks(CHUNK)).for_each(|(sum, term)| {
        vectorized(
            #[inline(always)]
            || {
                for (sum, term) in sum.iter_mut().zip(term) {
                    *sum = nearest(f32::from(*sum) + f32::from(*term));
                }
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_rounded_once() {
        let from: Vec<f32> = (0..3 * CHUNK + 5).map(|i| i as f32 * 0.37 - 1000.0).collect();
        let (mut sum, mut wide) = (vec![bf16::ZERO; from.len()], vec![0.0; from.len()]);
        narrow(&from, &mut sum);
        let term: Vec<bf16> = sum.iter().rev().copied().collect();
        let expected: Vec<bf16> = sum.iter().zip(&term).map(|(a, b)| bf16::from_f32(a.to_f32() + b.to_f32())).collect();
        add_bf16(&mut sum, &term);
        assert_eq!(sum, expected);
        widen(&sum, &mut wide);
        assert!(wide.iter().zip(&expected).all(|(wide, expected)| *wide == expected.to_f32()));
    }
}
