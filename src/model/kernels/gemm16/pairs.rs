//! What AVX-512 BF16 and AMX have in common: their instructions add the products of two neighbours along K at once, so
//! both operands hold pairs (k, k + 1) in 32-bit words.
//!
//! ```text
//! staged A:  [row: 128] [k: 512, and 32 more to keep rows out of each other's cache sets]      bf16
//! packed B:  [panel: N / 32] [start row: 32 f32, then K / 2 rows] [32 words (k, k + 1)]
//! ```
//!
//! K is filled up with zeros, in both, to a multiple of the 32 that a tile of A holds. Rows and columns need no such care:
//! what they add goes to sums that nobody reads.

use super::super::super::simd::vectorized;
use super::super::gemm::{Left, Right};
use super::kernel::{self, Layout, run_len};
use half::bf16;
use rayon::prelude::*;

/// Rows of a staged block, a multiple of every kernel's tile; its columns; columns of a panel.
pub const MC: usize = 128;
pub const KC: usize = 512;
pub const NR: usize = 32;
/// Columns of a tile of A.
pub const KR: usize = 32;
/// bf16 values from one staged row to the next.
pub const STRIDE: usize = KC + KR;
/// f32 words of a staged block.
pub const STAGED_LEN: usize = MC * STRIDE / 2;

/// What a kernel computes: sums (rows, NR) (+)= A (rows, 2 * pairs) B (2 * pairs, NR).
pub struct Block<'a> {
    /// (MC, STRIDE / 2)
    pub a: &'a [u32],
    /// (pairs, NR)
    pub b: &'a [u32],
    /// (MC, NR)
    pub sums: &'a mut [f32],
    pub rows: usize,
    pub pairs: usize,
    /// The sums are written, not added to.
    pub first: bool,
}

impl<'a> Block<'a> {
    pub fn new(block: kernel::Block<'a>) -> Block<'a> {
        let pairs = padded(block.ks.len()) / 2;
        let b = &block.panel[(1 + block.ks.start / 2) * NR..][..pairs * NR];
        assert!(block.staged.len() >= STAGED_LEN && block.sums.len() >= MC * NR && block.rows <= MC);
        Block {
            a: bytemuck::cast_slice(block.staged),
            b: bytemuck::cast_slice(b),
            sums: block.sums,
            rows: block.rows,
            pairs,
            first: block.ks.start == 0,
        }
    }
}

/// K with its zeros: at least one tile, so that the sums of no products are written too.
fn padded(k: usize) -> usize {
    k.max(1).next_multiple_of(KR)
}

fn panel_len(k: usize) -> usize {
    (1 + padded(k) / 2) * NR
}

pub fn packed_len(k: usize, n: usize) -> usize {
    n.div_ceil(NR) * panel_len(k)
}

pub fn pack(right: Right<'_, bf16>, bias: Option<&[f32]>, packed: &mut [f32]) {
    let panel_len = panel_len(right.rows.len());
    let columns = (0..right.n).step_by(NR);
    packed.chunks_exact_mut(panel_len).zip(columns).for_each(|(panel, column)| pack_panel(right, bias, column, panel));
}

pub fn pack_parallel(right: Right<'_, bf16>, bias: Option<&[f32]>, packed: &mut [f32]) {
    let panel_len = panel_len(right.rows.len());
    let packed = &mut packed[..packed_len(right.rows.len(), right.n)];
    packed
        .par_chunks_exact_mut(panel_len)
        .enumerate()
        .for_each(|(number, panel)| pack_panel(right, bias, number * NR, panel));
}

/// The panel of the columns from `column` on.
fn pack_panel(right: Right<'_, bf16>, bias: Option<&[f32]>, column: usize, panel: &mut [f32]) {
    let width = NR.min(right.n - column);
    let (start, body) = panel.split_at_mut(NR);
    start.fill(0.0);
    if let Some(bias) = bias {
        start[..width].copy_from_slice(&bias[column..column + width]);
    }
    let body: &mut [u32] = bytemuck::cast_slice_mut(body);
    let (full, rest) = body.split_at_mut(right.rows.len().div_ceil(2) * NR);
    rest.fill(0);
    if right.step == 1 {
        vectorized(
            #[inline(always)]
            || pack_rows(right, column, width, full),
        );
    } else {
        pack_columns(right, column, width, full);
    }
}

/// Columns that lie side by side: two rows are interleaved.
#[inline(always)]
fn pack_rows(right: Right<'_, bf16>, column: usize, width: usize, body: &mut [u32]) {
    let from = |k: usize| &right.data[right.rows[k] as usize + column..][..width];
    for (to, k) in body.chunks_exact_mut(NR).zip((0..right.rows.len()).step_by(2)) {
        let (to, beyond) = to.split_at_mut(width);
        beyond.fill(0);
        let even = from(k);
        if k + 1 < right.rows.len() {
            let odd = from(k + 1);
            for j in 0..width {
                to[j] = pair(even[j], odd[j]);
            }
        } else {
            for j in 0..width {
                to[j] = pair(even[j], bf16::ZERO);
            }
        }
    }
}

/// Columns apart from each other: a few rows at a time, each column read along them, since they often lie side by side.
fn pack_columns(right: Right<'_, bf16>, column: usize, width: usize, body: &mut [u32]) {
    const ROWS: usize = 32;
    for (to, rows) in body.chunks_mut(ROWS / 2 * NR).zip(right.rows.chunks(ROWS)) {
        for j in 0..width {
            let from = &right.data[(column + j) * right.step..];
            for (to, rows) in to.chunks_exact_mut(NR).zip(rows.chunks(2)) {
                let odd = rows.get(1).map_or(bf16::ZERO, |&row| from[row as usize]);
                to[j] = pair(from[rows[0] as usize], odd);
            }
        }
        to.chunks_exact_mut(NR).for_each(|row| row[width..].fill(0));
    }
}

#[inline(always)]
fn pair(even: bf16, odd: bf16) -> u32 {
    u32::from(even.to_bits()) | u32::from(odd.to_bits()) << 16
}

/// Copies at most MC x KC of A, and zeros behind each row.
pub fn stage(block: Left<'_, bf16>, staged: &mut [f32]) {
    let staged: &mut [bf16] = bytemuck::cast_slice_mut(staged);
    let k = block.cols.len();
    match Layout::of(&block) {
        Layout::Rows => stage_rows(block, staged),
        Layout::Columns => stage_columns(block, staged),
    }
    staged.chunks_exact_mut(STRIDE).take(block.rows.len()).for_each(|row| row[k..padded(k)].fill(bf16::ZERO));
}

fn stage_rows(block: Left<'_, bf16>, staged: &mut [bf16]) {
    let mut start = 0;
    while start < block.cols.len() {
        let run = run_len(&block.cols[start..]);
        for (&row, to) in block.rows.iter().zip(staged.chunks_exact_mut(STRIDE)) {
            let from = row as usize + block.cols[start] as usize;
            to[start..start + run].copy_from_slice(&block.data[from..from + run]);
        }
        start += run;
    }
}

/// Each run of rows in squares of 8 x 8, that a CPU transposes in its registers.
fn stage_columns(block: Left<'_, bf16>, staged: &mut [bf16]) {
    let mut start = 0;
    while start < block.rows.len() {
        let run = run_len(&block.rows[start..]);
        for i in (start..start + run).step_by(SIDE) {
            let height = SIDE.min(start + run - i);
            for (number, cols) in block.cols.chunks(SIDE).enumerate() {
                let mut square = [[bf16::ZERO; SIDE]; SIDE];
                for (to, &col) in square.iter_mut().zip(cols) {
                    let from = block.rows[i] as usize + col as usize;
                    match (height, to) {
                        (SIDE, to) => *to = *block.data[from..].first_chunk().expect("the run is that long"),
                        (_, to) => to[..height].copy_from_slice(&block.data[from..from + height]),
                    }
                }
                transpose(&mut square);
                let rows = staged[i * STRIDE..].chunks_mut(STRIDE).take(height);
                rows.zip(&square).for_each(|(to, from)| to[number * SIDE..][..SIDE].copy_from_slice(from));
            }
        }
        start += run;
    }
}

/// Rows and columns of a square that is transposed in registers.
const SIDE: usize = 8;

#[inline(always)]
fn transpose(square: &mut [[bf16; SIDE]; SIDE]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{
            __m128i, _mm_unpackhi_epi16, _mm_unpackhi_epi32, _mm_unpackhi_epi64, _mm_unpacklo_epi16,
            _mm_unpacklo_epi32, _mm_unpacklo_epi64,
        };
        // SAFETY: every x86-64 has SSE2, and 16 bytes are as good as 8 values of 2.
        unsafe {
            let rows: [__m128i; SIDE] = std::mem::transmute(*square);
            let pairs = |i: usize| (_mm_unpacklo_epi16(rows[i], rows[i + 1]), _mm_unpackhi_epi16(rows[i], rows[i + 1]));
            let ((a0, a1), (b0, b1), (c0, c1), (d0, d1)) = (pairs(0), pairs(2), pairs(4), pairs(6));
            let fours = |x, y| (_mm_unpacklo_epi32(x, y), _mm_unpackhi_epi32(x, y));
            let (ab, cd) = ([fours(a0, b0), fours(a1, b1)], [fours(c0, d0), fours(c1, d1)]);
            let eights = |x, y| [_mm_unpacklo_epi64(x, y), _mm_unpackhi_epi64(x, y)];
            let columns = [
                eights(ab[0].0, cd[0].0),
                eights(ab[0].1, cd[0].1),
                eights(ab[1].0, cd[1].0),
                eights(ab[1].1, cd[1].1),
            ];
            *square = std::mem::transmute::<[[__m128i; 2]; 4], [[bf16; SIDE]; SIDE]>(columns);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    for i in 0..SIDE {
        for j in 0..i {
            (square[i][j], square[j][i]) = (square[j][i], square[i][j]);
        }
    }
}
