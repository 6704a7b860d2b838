//! Matrix multiplication C = A B in f32, for linear layers and convolutions alike.
//!
//! The left matrix is never copied. It is given by two tables, `A(i, k) = data[rows[i] + cols[k]]`, because in all our
//! products the place of an element splits into what its row and what its column contributes: strided and transposed
//! matrices do, and so does the im2col matrix of a zero-padded NHWC image, where the row is an output pixel and the
//! column is (kh, kw, c). Swapping the tables transposes A. So a convolution is this product without an im2col buffer
//! (an implicit GEMM, as in Dukhan 2019, "The Indirect Convolution Algorithm", with sums of two offsets in place of its
//! pointers).
//!
//! The right matrix is packed into panels of `nr` columns, k-major, so that the kernel reads it in order. Ahead of its
//! K rows each panel has one more: the values at which the sums start (a bias, or zeros).
//!
//! ```text
//! packed B:  [panel: N / nr] [start row, then K rows] [nr values, zeros beyond column N]
//! ```
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
pub(super) use kernel::Tile;
use rayon::prelude::*;

/// Columns of A, at most, for which a panel of B stays in L1: 384 * 16 * 4 bytes = 24 KiB of 32.
const KC: usize = 384;
/// Rows of A that pass by one panel of B before the next panel is taken.
const MC: usize = 192;

/// The left matrix, M x K: `A(i, k) = data[rows[i] + cols[k]]`.
#[derive(Clone, Copy)]
pub struct Left<'a, T = f32> {
    pub data: &'a [T],
    pub rows: &'a [u32],
    pub cols: &'a [u32],
}

/// The right matrix, K x `n`: `B(k, j) = data[rows[k] + j * step]`.
#[derive(Clone, Copy)]
pub struct Right<'a, T = f32> {
    pub data: &'a [T],
    pub rows: &'a [u32],
    pub step: usize,
    pub n: usize,
}

/// The product, M x N: `C(i, j) = data[rows[i] + j]`.
pub struct Out<'a, T = f32> {
    pub data: &'a mut [T],
    pub rows: &'a [u32],
}

/// What happens to a sum beside being stored.
#[derive(Clone, Copy, Debug, Default)]
pub struct Store {
    /// Adds to C instead of overwriting it; the start row of the panels is then not used.
    pub accumulate: bool,
    /// Stores max(sum, 0); a NaN stays a NaN.
    pub relu: bool,
}

/// A table of `count` offsets that lie `step` apart: the rows or columns of an ordinary matrix.
pub fn strided(count: usize, step: usize) -> Vec<u32> {
    (0..count).map(|i| offset(i * step)).collect()
}

/// An entry of a table. What is larger was refused before: of weights and single images by the layers' `infer`, of whole
/// batches by `Net::new`.
pub fn offset(place: usize) -> u32 {
    u32::try_from(place).expect("an activation or weight holds at most 2^32 values")
}

/// f32 values that a packed K x N matrix takes.
pub fn packed_len(kernel: &Kernel, k: usize, n: usize) -> usize {
    n.div_ceil(kernel.nr) * panel_len(kernel, k)
}

fn panel_len(kernel: &Kernel, k: usize) -> usize {
    (k + 1) * kernel.nr
}

/// Packs B, of f32 or of what widens to it, on the calling thread; `bias` (N values, zeros without) is where the sums will
/// start.
pub fn pack<T: Copy + Into<f32>>(kernel: &Kernel, right: Right<'_, T>, bias: Option<&[f32]>, packed: &mut [f32]) {
    let packed = &mut packed[..packed_len(kernel, right.rows.len(), right.n)];
    pack_panels(kernel, right, bias, 0, packed);
}

/// The same on all threads of the current pool, each with a few neighbouring panels.
pub fn pack_parallel<T>(kernel: &Kernel, right: Right<'_, T>, bias: Option<&[f32]>, packed: &mut [f32])
where
    T: Copy + Into<f32> + Sync,
{
    const PANELS: usize = 16;
    let packed = &mut packed[..packed_len(kernel, right.rows.len(), right.n)];
    let chunks = packed.par_chunks_mut(PANELS * panel_len(kernel, right.rows.len())).enumerate();
    chunks.for_each(|(number, panels)| pack_panels(kernel, right, bias, number * PANELS * kernel.nr, panels));
}

/// Packs the panels of the columns from `first` on.
fn pack_panels<T>(kernel: &Kernel, right: Right<'_, T>, bias: Option<&[f32]>, first: usize, panels: &mut [f32])
where
    T: Copy + Into<f32>,
{
    match kernel.nr {
        8 => pack_panels_of::<8>(right, bias, first, panels),
        16 => pack_panels_of::<16>(right, bias, first, panels),
        32 => pack_panels_of::<32>(right, bias, first, panels),
        nr => unreachable!("a kernel of {nr} columns"),
    }
}

fn pack_panels_of<const NR: usize>(
    right: Right<'_, impl Copy + Into<f32>>,
    bias: Option<&[f32]>,
    first: usize,
    panels: &mut [f32],
) {
    let panel_len = (right.rows.len() + 1) * NR;
    let last = right.n.min(first + panels.len() / panel_len * NR);
    for (panel, column) in panels.chunks_exact_mut(panel_len).zip((first..last).step_by(NR)) {
        let width = NR.min(last - column);
        let (start, body) = panel.split_at_mut(NR);
        start.fill(0.0);
        if let Some(bias) = bias {
            start[..width].copy_from_slice(&bias[column..column + width]);
        }
        if right.step != 1 {
            pack_strided::<NR>(right, column, width, body);
        }
    }
    if right.step == 1 {
        // Row by row over all panels, so that B is read in the order in which it lies.
        for (k, &row) in right.rows.iter().enumerate() {
            let row = &right.data[row as usize + first..row as usize + last];
            for (values, panel) in row.chunks(NR).zip(panels.chunks_exact_mut(panel_len)) {
                let to: &mut [f32] = &mut panel[(1 + k) * NR..(2 + k) * NR];
                match <&[_; NR]>::try_from(values) {
                    Ok(values) => (0..NR).for_each(|j| to[j] = values[j].into()),
                    Err(_) => {
                        to.iter_mut().zip(values).for_each(|(to, &value)| *to = value.into());
                        to[values.len()..].fill(0.0);
                    }
                }
            }
        }
    }
}

/// One panel of a B whose columns do not lie side by side: a few rows at a time, each column read along them, since they
/// often do lie side by side.
fn pack_strided<const NR: usize>(
    right: Right<'_, impl Copy + Into<f32>>,
    column: usize,
    width: usize,
    body: &mut [f32],
) {
    const ROWS: usize = 16;
    for (to, rows) in body.chunks_mut(ROWS * NR).zip(right.rows.chunks(ROWS)) {
        for j in 0..width {
            let from = &right.data[(column + j) * right.step..];
            rows.iter().enumerate().for_each(|(k, &row)| to[k * NR + j] = from[row as usize].into());
        }
        to.chunks_exact_mut(NR).for_each(|row| row[width..].fill(0.0));
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
