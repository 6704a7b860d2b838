//! Matrix multiplication C = A B of bf16 matrices with sums in f32; C is bf16 (activations) or f32 (weight gradients).
//!
//! The interface is that of [`gemm`](super::gemm): the left matrix by two tables of offsets, the right one packed into
//! panels ahead of the product, each with a row of values at which the sums start (a bias). What is packed and the
//! scratch are f32 words, whatever a kernel keeps in them.
//!
//! ```text
//! pack(kernel, Right { data: w, rows, step: 1, n }, bias, &mut packed[..packed_len(kernel, k, n)]);
//! multiply(kernel, Left { data: x, rows, cols }, packed, n, Out { data: y, rows }, store, &mut scratch[..scratch_len(kernel)]);
//! ```
//!
//! Unlike in f32, A is copied: the kernels want it in another form, and a convolution's taps come in runs of its channels,
//! so that the copy goes run by run. A block of `mc` rows and `kc` columns of A is staged in the caller's scratch and stays
//! in L2 while every panel of B passes by; the sums of `mc` rows and `nc` columns of C stay there in f32 until K is done,
//! then they get the bias or C, ReLU, and are rounded once. Each staged value meets N columns, each sum K products:
//! against M N K multiply-adds that is M K ceil(N / nc) values copied and 2 M N ceil(K / kc) sums moved within L2.
//!
//! K is cut by its length alone, so every element of C is the same sum in the same order whoever computes it. `multiply`
//! runs on the calling thread; callers divide M or N among threads, each with its own scratch.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod kernel;
mod pairs;
#[cfg(test)]
mod tests;
mod widened;

pub use super::gemm::{Left, Out, Right, Store};
pub use kernel::Kernel;

use super::convert::nearest;
use half::bf16;
use kernel::{Block, Layout};
use std::ops::Range;

/// What C may consist of.
pub trait Element: Copy + Into<f32> {
    fn from_sum(sum: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn from_sum(sum: f32) -> f32 {
        sum
    }
}

impl Element for bf16 {
    /// Rounded to the nearest, ties to even.
    #[inline(always)]
    fn from_sum(sum: f32) -> bf16 {
        nearest(sum)
    }
}

/// f32 words that a packed K x N matrix takes.
pub fn packed_len(kernel: &Kernel, k: usize, n: usize) -> usize {
    kernel.packed_len(k, n)
}

/// f32 words of scratch that `multiply` needs. It is fastest where they start at a cache line.
pub fn scratch_len(kernel: &Kernel) -> usize {
    kernel.staged_len() + kernel.mc * kernel.nc
}

/// Packs B on the calling thread; `bias` (N values, zeros without) is where the sums will start.
pub fn pack(kernel: &Kernel, right: Right<'_, bf16>, bias: Option<&[f32]>, packed: &mut [f32]) {
    kernel.pack(right, bias, packed);
}

/// The same on all threads of the current pool.
pub fn pack_parallel(kernel: &Kernel, right: Right<'_, bf16>, bias: Option<&[f32]>, packed: &mut [f32]) {
    kernel.pack_parallel(right, bias, packed);
}

/// C = A B (+ C), with `packed` from `pack` for the same kernel, K = `left.cols.len()` and `n`.
pub fn multiply<T: Element>(
    kernel: &Kernel,
    left: Left<'_, bf16>,
    packed: &[f32],
    n: usize,
    mut out: Out<'_, T>,
    store: Store,
    scratch: &mut [f32],
) {
    let (m, k) = (left.rows.len(), left.cols.len());
    assert_eq!(out.rows.len(), m);
    assert!(packed.len() >= packed_len(kernel, k, n));
    let panel_len = packed_len(kernel, k, 1);
    let (staged, sums) = scratch[..scratch_len(kernel)].split_at_mut(kernel.staged_len());

    let prepared = kernel.prepare();
    let mut layout = Layout::Rows;

    let blocks_of_k = k.div_ceil(kernel.kc).max(1);
    for rows in blocks(m, kernel.mc) {
        for columns in blocks(n, kernel.nc) {
            let panels = &packed[columns.start / kernel.nr * panel_len..];
            let panels = panels.chunks_exact(panel_len).take(columns.len().div_ceil(kernel.nr));
            for number in 0..blocks_of_k {
                let ks = number * kernel.kc..k.min((number + 1) * kernel.kc);
                if blocks_of_k > 1 || columns.start == 0 {
                    let block = Left { rows: &left.rows[rows.clone()], cols: &left.cols[ks.clone()], ..left };
                    layout = kernel.stage(block, staged);
                }
                for (panel, sums) in panels.clone().zip(sums.chunks_exact_mut(kernel.mc * kernel.nr)) {
                    let block = Block { rows: rows.len(), ks: ks.clone(), staged, layout, panel, sums };
                    kernel.multiply(&prepared, block);
                }
            }
            let starts = panels.map(|panel| &panel[..kernel.nr]);
            for (number, start) in starts.enumerate() {
                let columns =
                    columns.start + number * kernel.nr..columns.end.min(columns.start + (number + 1) * kernel.nr);
                let sums = sums[number * kernel.mc * kernel.nr..].chunks_exact(kernel.nr);
                finish(sums, start, &mut out, rows.clone(), columns, store);
            }
        }
    }
}

/// Stores the sums of one panel's columns, each row of `sums` one row of C.
fn finish<'a, T: Element>(
    sums: impl Iterator<Item = &'a [f32]>,
    start: &[f32],
    out: &mut Out<'_, T>,
    rows: Range<usize>,
    columns: Range<usize>,
    store: Store,
) {
    for (sums, &row) in sums.zip(&out.rows[rows]) {
        let c = &mut out.data[row as usize + columns.start..row as usize + columns.end];
        for ((c, &sum), &start) in c.iter_mut().zip(sums).zip(start) {
            let sum = sum + if store.accumulate { (*c).into() } else { start };
            *c = T::from_sum(if store.relu && sum < 0.0 { 0.0 } else { sum });
        }
    }
}

/// 0..len cut into ranges of `size`, the last one shorter.
fn blocks(len: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(size).map(move |start| start..len.min(start + size))
}
