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
pub(super) use kernel::Panel;
use kernel::Source;
use rayon::prelude::*;
use std::ops::Range;

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
    let k = left.cols.len();
    if left.rows.is_empty() || n == 0 {
        return;
    }
    check(&left, n, &out);
    assert!(packed.len() >= packed_len(kernel, k, n));
    for rows in blocks(left.rows.len(), MC) {
        for ks in k_blocks(k) {
            for (panel, columns) in packed.chunks_exact(panel_len(kernel, k)).zip(blocks(n, kernel.nr)) {
                let panel = Panel {
                    // Written by kernels only where there is a source.
                    b: panel[(1 + ks.start) * kernel.nr..].as_ptr().cast_mut(),
                    start: (ks.start == 0 && !store.accumulate).then_some(panel.as_ptr()),
                    rows: &left.rows[rows.clone()],
                    ..panel_of(&left, &out.rows[rows.clone()], &ks, out.data.as_mut_ptr(), &columns, store)
                };
                // SAFETY: `check` has seen the sums of offsets, and the CPU has the kernel's instructions.
                unsafe { (kernel.multiply)(&panel) };
            }
        }
    }
}

/// f32 values that `multiply_in_place` needs for each thread.
pub fn panel_buffer_len(kernel: &Kernel) -> usize {
    panel_len(kernel, KC)
}

/// C = A B (+ C), with a B whose rows lie in one piece each (`right.step` 1) and which is read where it lies, once: for a
/// B so large and an A of so few rows that packing would cost much of the product. The tile of the first rows packs the
/// panel while it multiplies, for the others, and all of them fetch the next one. Runs on as many threads of the pool as
/// `buffers` has room for, each with columns of its own.
pub fn multiply_in_place(
    kernel: &Kernel,
    left: Left<'_>,
    right: Right<'_>,
    buffers: &mut [f32],
    out: Out<'_>,
    store: Store,
) {
    let (k, n) = (left.cols.len(), right.n);
    if left.rows.is_empty() || n == 0 {
        return;
    }
    check(&left, n, &out);
    assert!(right.step == 1 && right.rows.len() == k && (k == 0 || largest(right.rows) + n <= right.data.len()));
    let threads = buffers.len() / panel_buffer_len(kernel);
    let share = n.div_ceil(kernel.nr).div_ceil(threads) * kernel.nr;
    let c = Address(out.data.as_mut_ptr());
    buffers.par_chunks_exact_mut(panel_buffer_len(kernel)).enumerate().for_each(|(thread, buffer)| {
        let columns = (thread * share).min(n)..((thread + 1) * share).min(n);
        // SAFETY: checked above, and threads write columns of their own.
        unsafe { multiply_columns(kernel, left, right, buffer, c.clone(), out.rows, columns, store) };
    });
}

/// One thread's share of `multiply_in_place`.
///
/// # Safety
/// All sums of offsets lie in the matrices, and nobody else touches these columns of C.
#[allow(clippy::too_many_arguments)]
unsafe fn multiply_columns(
    kernel: &Kernel,
    left: Left<'_>,
    right: Right<'_>,
    buffer: &mut [f32],
    c: Address,
    c_rows: &[u32],
    columns: Range<usize>,
    store: Store,
) {
    let nr = kernel.nr;
    for ks in k_blocks(left.cols.len()) {
        let rows = &right.rows[ks.clone()];
        for at in columns.clone().step_by(nr) {
            let here = at..columns.end.min(at + nr);
            let source = (here.len() == nr).then(|| Source {
                data: right.data[at..].as_ptr(),
                rows,
                next: right.data[if at + 2 * nr <= columns.end { at + nr } else { at }..].as_ptr(),
            });
            match source {
                Some(_) => buffer[..nr].fill(0.0),
                None => {
                    let right = Right { rows, n: here.end, ..right };
                    pack_panels(kernel, right, None, at, &mut buffer[..panel_len(kernel, ks.len())]);
                }
            }
            let buffer = buffer.as_mut_ptr();
            let panel = Panel {
                // SAFETY: the buffer holds a start row and KC rows.
                b: unsafe { buffer.add(nr) },
                source,
                start: (ks.start == 0 && !store.accumulate).then_some(buffer.cast_const()),
                ..panel_of(&left, c_rows, &ks, c.0, &here, store)
            };
            // SAFETY: vouched for by the caller; the CPU has the kernel's instructions.
            unsafe { (kernel.multiply)(&panel) };
        }
    }
}

/// An address that threads share; each writes other places behind it.
#[derive(Clone)]
struct Address(*mut f32);
// SAFETY: see above.
unsafe impl Send for Address {}
// SAFETY: see above.
unsafe impl Sync for Address {}

/// Columns `ks` of A times a panel for columns `columns` of C, at `c`; B is still to be named.
fn panel_of<'a>(
    left: &Left<'a>,
    c_rows: &'a [u32],
    ks: &Range<usize>,
    c: *mut f32,
    columns: &Range<usize>,
    store: Store,
) -> Panel<'a> {
    let k = left.cols.len();
    Panel {
        a: left.data.as_ptr(),
        rows: left.rows,
        cols: &left.cols[ks.clone()],
        b: std::ptr::null_mut(),
        source: None,
        start: None,
        c: c.wrapping_add(columns.start),
        c_rows,
        n: columns.len(),
        relu: store.relu && ks.end == k,
    }
}

fn check(left: &Left<'_>, n: usize, out: &Out<'_>) {
    assert_eq!(out.rows.len(), left.rows.len());
    assert!(left.cols.is_empty() || largest(left.rows) + largest(left.cols) < left.data.len());
    assert!(largest(out.rows) + n <= out.data.len());
}

fn largest(table: &[u32]) -> usize {
    table.iter().max().map_or(0, |&offset| offset as usize)
}

/// The blocks of K: equally long, at most `KC`; one of nothing where K is 0.
fn k_blocks(k: usize) -> impl Iterator<Item = Range<usize>> {
    let count = k.div_ceil(KC).max(1);
    let kc = k.div_ceil(count);
    (0..count).map(move |number| (number * kc).min(k)..((number + 1) * kc).min(k))
}

/// 0..len cut into ranges of `size`, the last one shorter.
fn blocks(len: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(size).map(move |start| start..len.min(start + size))
}
