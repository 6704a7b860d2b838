//! AVX-512 BF16: VDPBF16PS multiplies 16 pairs by 16 pairs and adds the products of each to an f32. A tile of 8 x 32 sums
//! takes 16 registers; a pair of k costs 2 loads of B, 8 broadcasts of A, 16 of these instructions.

use super::pairs::{Block, NR, STRIDE};
use std::arch::x86_64::*;

/// Rows of a tile.
const MR: usize = 8;

pub fn detected() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
}

/// # Safety
/// The CPU has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub unsafe fn multiply(block: &Block<'_>) {
    for i in (0..block.rows).step_by(MR) {
        // SAFETY: a block has MC rows, a multiple of MR, of staged values and of sums.
        unsafe { tile(block, block.a.as_ptr().add(i * STRIDE / 2), block.sums.as_ptr().cast_mut().add(i * NR)) }
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
#[allow(clippy::needless_range_loop, reason = "loops over the registers of a tile, all unrolled")]
unsafe fn tile(block: &Block<'_>, a: *const u32, c: *mut f32) {
    // SAFETY: of `multiply`.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; MR];
        if !block.first {
            for i in 0..MR {
                sums[i] = [_mm512_loadu_ps(c.add(i * NR)), _mm512_loadu_ps(c.add(i * NR + NR / 2))];
            }
        }
        let pairs = |words: __m512i| std::mem::transmute::<__m512i, __m512bh>(words);
        for k in 0..block.pairs {
            let row = block.b.as_ptr().add(k * NR);
            let row = [0, NR / 2].map(|j| pairs(_mm512_loadu_si512(row.add(j).cast())));
            for i in 0..MR {
                let value = pairs(_mm512_set1_epi32(*a.add(i * STRIDE / 2 + k) as i32));
                for v in 0..2 {
                    sums[i][v] = _mm512_dpbf16_ps(sums[i][v], value, row[v]);
                }
            }
        }
        for i in 0..MR {
            for v in 0..2 {
                _mm512_storeu_ps(c.add(i * NR + v * NR / 2), sums[i][v]);
            }
        }
    }
}
