//! Matrix multiplication C = A B in f32, for linear layers and convolutions alike.
//!
//! The left matrix is never copied. It is given by two tables, A(i, k) = data[rows[i] + cols[k]], because in all our
//! products the place of an element splits into what its row and what its column contributes: strided and transposed
//! matrices do, and so does the im2col matrix of a zero-padded NHWC image, where the row is an output pixel and the
//! column is (kh, kw, c). Swapping the tables transposes A. So a convolution is this product without an im2col buffer
//! (an implicit GEMM, as in Dukhan 2019, "The Indirect Convolution Algorithm", with sums of two offsets in place of its
//! pointers).
//!
//! The right matrix is packed into panels of `nr` columns, k-major, so that the kernel reads it in order. Ahead of its
//! K rows each panel has one more: the values at which the sums start (a bias, or zeros).
//!
//!     packed B:  [panel: N / nr] [start row, then K rows] [nr values, zeros beyond column N]
//!
//! The kernel computes an mr x nr tile of C in registers: per k, `nr / lanes` vector loads of B, one table entry,
//! mr broadcasts of A, and mr * nr / lanes multiply-adds. The floor is the arithmetic: a Zen 3 core retires two 8-lane
//! FMAs a cycle, 2 * 8 * 2 = 32 FLOP, so 2 M N K FLOP cost at least M N K / 16 cycles. A 6 x 16 tile issues 9 loads and
//! 12 FMAs per k: 6 cycles of arithmetic, in which the core could load 12 to 18 times.
//!
//! Blocks (Goto and van de Geijn 2008): `KC` rows of one panel of B stay in L1 while `MC` rows of A pass by from L2.
//! K is cut by its length alone, never by the number of threads, so every element of C is the same sum in the same order
//! whoever computes it. `multiply` runs on the calling thread; callers divide M or N among threads.

mod kernel;
#[cfg(test)]
mod tests;

pub use kernel::Kernel;
use kernel::Tile;
use rayon::prelude::*;

/// Columns of A, at most, for which a panel of B stays in L1: 384 * 16 * 4 bytes = 24 KiB of 32.
const KC: usize = 384;
/// Rows of A that pass by one panel of B before the next panel is taken.
const MC: usize = 192;

/// The left matrix, M x K: A(i, k) = data[rows[i] + cols[k]].
#[derive(Clone, Copy)]
pub struct Left<'a> {
    pub data: &'a [f32],
    pub rows: &'a [u32],
    pub cols: &'a [u32],
}

/// The right matrix, K x `n`: B(k, j) = data[rows[k] + j * step].
#[derive(Clone, Copy)]
pub struct Right<'a> {
    pub data: &'a [f32],
    pub rows: &'a [u32],
    pub step: usize,
    pub n: usize,
}

/// The product, M x N: C(i, j) = data[rows[i] + j].
pub struct Out<'a> {
    pub data: &'a mut [f32],
    pub rows: &'a [u32],
}

/// What happens to a sum beside being stored.
#[derive(Clone, Copy, Default)]
pub struct Store {
    /// Adds to C instead of overwriting it; the start row of the panels is then not used.
    pub accumulate: bool,
    /// Stores max(sum, 0); a NaN stays a NaN.
    pub relu: bool,
}

/// A table of `count` offsets that lie `step` apart: the rows or columns of an ordinary matrix.
pub fn strided(count: usize, step: usize) -> Vec<u32> {
    (0..count).map(|i| u32::try_from(i * step).expect("an activation or weight holds fewer than 2^32 values")).collect()
}

/// f32 values that a packed K x N matrix takes.
pub fn packed_len(kernel: &Kernel, k: usize, n: usize) -> usize {
    n.div_ceil(kernel.nr) * panel_len(kernel, k)
}

fn panel_len(kernel: &Kernel, k: usize) -> usize {
    (k + 1) * kernel.nr
}

/// Packs B on the calling thread; `bias` (N values, zeros without) is where the sums will start.
pub fn pack(kernel: &Kernel, right: Right<'_>, bias: Option<&[f32]>, packed: &mut [f32]) {
    let panel_len = panel_len(kernel, right.rows.len());
    for (number, panel) in packed.chunks_exact_mut(panel_len).take(right.n.div_ceil(kernel.nr)).enumerate() {
        pack_panel(kernel.nr, right, bias, number * kernel.nr, panel);
    }
}

/// The same on all threads of the current pool.
pub fn pack_parallel(kernel: &Kernel, right: Right<'_>, bias: Option<&[f32]>, packed: &mut [f32]) {
    let packed = &mut packed[..packed_len(kernel, right.rows.len(), right.n)];
    let panels = packed.par_chunks_exact_mut(panel_len(kernel, right.rows.len())).enumerate();
    panels.for_each(|(number, panel)| pack_panel(kernel.nr, right, bias, number * kernel.nr, panel));
}

fn pack_panel(nr: usize, right: Right<'_>, bias: Option<&[f32]>, first: usize, panel: &mut [f32]) {
    let width = nr.min(right.n - first);
    let (start, body) = panel.split_at_mut(nr);
    start.fill(0.0);
    if let Some(bias) = bias {
        start[..width].copy_from_slice(&bias[first..first + width]);
    }
    for (row, &offset) in body.chunks_exact_mut(nr).zip(right.rows) {
        let from = offset as usize + first * right.step;
        if right.step == 1 {
            row[..width].copy_from_slice(&right.data[from..from + width]);
        } else {
            let source = right.data[from..].iter().step_by(right.step);
            row[..width].iter_mut().zip(source).for_each(|(to, from)| *to = *from);
        }
        row[width..].fill(0.0);
    }
}

/// C = A B (+ C), with `packed` from `pack` for the same kernel, K = `left.cols.len()` and `n`.
pub fn multiply(kernel: &Kernel, left: Left<'_>, packed: &[f32], n: usize, out: Out<'_>, store: Store) {
    let (m, k) = (left.rows.len(), left.cols.len());
    if m == 0 || n == 0 {
        return;
    }
    let largest = |table: &[u32]| table.iter().max().map_or(0, |&offset| offset as usize);
    assert_eq!(out.rows.len(), m);
    assert!(packed.len() >= packed_len(kernel, k, n));
    assert!(k == 0 || largest(left.rows) + largest(left.cols) < left.data.len());
    assert!(largest(out.rows) + n <= out.data.len());

    let k_blocks = k.div_ceil(KC).max(1);
    let kc = k.div_ceil(k_blocks);
    for rows in blocks(m, MC) {
        for number in 0..k_blocks {
            let ks = (number * kc).min(k)..((number + 1) * kc).min(k);
            for (panel, columns) in packed.chunks_exact(panel_len(kernel, k)).zip(blocks(n, kernel.nr)) {
                for i in rows.clone().step_by(kernel.mr) {
                    let tile = Tile {
                        a: left.data.as_ptr(),
                        rows: &left.rows[i..rows.end.min(i + kernel.mr)],
                        cols: &left.cols[ks.clone()],
                        b: &panel[(1 + ks.start) * kernel.nr..],
                        start: (number == 0 && !store.accumulate).then_some(&panel[..kernel.nr]),
                        // SAFETY: every out.rows[i] + n is within data.
                        c: unsafe { out.data.as_mut_ptr().add(columns.start) },
                        c_rows: &out.rows[i..],
                        n: columns.len(),
                        relu: store.relu && number + 1 == k_blocks,
                    };
                    // SAFETY: the sums of offsets were checked above, and the CPU has the kernel's instructions.
                    unsafe { (kernel.tile)(&tile) };
                }
            }
        }
    }
}

/// 0..len cut into ranges of `size`, the last one shorter.
fn blocks(len: usize, size: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..len).step_by(size).map(move |start| start..len.min(start + size))
}
