//! As many groups as channels and filters: the three products of a convolution fall apart into one for each channel,
//! too small for matrices. Instead the vectors run over channels, which lie side by side everywhere:
//!
//! ```text
//! C(i, c) (+)= sum over k of A(i, k, c) * B(k, c)
//! ```
//!
//! with A and C addressed by the same tables as in the matrix products, A(i, k, c) = data[rows[i] + cols[k] + c]. Two
//! FLOP need two loads, so a Zen 3 core (two vector loads a cycle) cannot pass a quarter of its arithmetic.

use super::super::super::kernels::gemm::{Left, Out, Store};
use super::super::super::simd::vectorized;

/// B(k, c) = data[rows[k] + c]; the sums start at `bias` (or zero).
#[derive(Clone, Copy)]
pub struct PerChannel<'a> {
    pub data: &'a [f32],
    pub rows: &'a [u32],
    pub bias: Option<&'a [f32]>,
}

pub fn multiply(left: Left<'_>, right: PerChannel<'_>, channels: usize, out: Out<'_>, store: Store) {
    vectorized(
        #[inline(always)]
        || {
            for (&a, &c) in left.rows.iter().zip(out.rows) {
                let (a, c) = (&left.data[a as usize..], &mut out.data[c as usize..][..channels]);
                let mut first = 0;
                while channels - first >= 32 {
                    sums::<32>(a, left.cols, right, first, c, store);
                    first += 32;
                }
                while channels - first >= 8 {
                    sums::<8>(a, left.cols, right, first, c, store);
                    first += 8;
                }
                while first < channels {
                    sums::<1>(a, left.cols, right, first, c, store);
                    first += 1;
                }
            }
        },
    );
}

/// `W` channels of one row of C.
#[inline(always)]
fn sums<const W: usize>(a: &[f32], cols: &[u32], right: PerChannel<'_>, first: usize, c: &mut [f32], store: Store) {
    let c = &mut c[first..first + W];
    let mut sums = [0.0; W];
    if store.accumulate {
        sums.copy_from_slice(c);
    } else if let Some(bias) = right.bias {
        sums.copy_from_slice(&bias[first..first + W]);
    }
    for (&col, &row) in cols.iter().zip(right.rows) {
        let a = &a[col as usize + first..][..W];
        let b = &right.data[row as usize + first..][..W];
        for lane in 0..W {
            sums[lane] += a[lane] * b[lane];
        }
    }
    if store.relu {
        sums.iter_mut().for_each(|sum| *sum = if *sum < 0.0 { 0.0 } else { *sum });
    }
    c.copy_from_slice(&sums);
}
