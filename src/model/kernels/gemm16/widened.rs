//! bf16 on a CPU without instructions for it: values are widened when they are copied, which is exact, and the tile kernels
//! of the f32 product do the rest. They take the left matrix in any order, so a block is staged in the order in which
//! the copy is in long pieces.

use super::super::convert::widen;
use super::super::gemm::{self, Left, Tile};
use super::kernel::{Block, Layout, run_len};
use half::bf16;

pub const MC: usize = 96;
pub const KC: usize = 384;
pub const STAGED_LEN: usize = MC * KC;

/// A(i, k) goes to place i * KC + k, or to i + k * MC.
pub fn stage(block: Left<'_, bf16>, staged: &mut [f32]) -> Layout {
    let layout = Layout::of(&block);
    match layout {
        Layout::Rows => copy_runs(block.data, block.rows, block.cols, staged, KC),
        Layout::Columns => copy_runs(block.data, block.cols, block.rows, staged, MC),
    }
    layout
}

/// to(i, j) = data[outer[i] + inner[j]], rows of `to` being `stride` long: for each run of `inner`, piece by piece.
fn copy_runs(data: &[bf16], outer: &[u32], inner: &[u32], to: &mut [f32], stride: usize) {
    let mut start = 0;
    while start < inner.len() {
        let run = run_len(&inner[start..]);
        for (&place, to) in outer.iter().zip(to.chunks_exact_mut(stride)) {
            let from = place as usize + inner[start] as usize;
            widen(&data[from..from + run], &mut to[start..start + run]);
        }
        start += run;
    }
}

/// The tables of staged blocks.
const CONSECUTIVE: [u32; KC] = multiples(1);
const ROW_STARTS: [u32; MC] = multiples(KC);
const COLUMN_STARTS: [u32; KC] = multiples(MC);

const fn multiples<const N: usize>(step: usize) -> [u32; N] {
    let mut table = [0; N];
    let mut i = 0;
    while i < N {
        table[i] = (i * step) as u32;
        i += 1;
    }
    table
}

/// sums (rows, nr) (+)= the staged block times rows `ks` of the panel.
pub fn multiply(kernel: &gemm::Kernel, block: Block<'_>) {
    const ZEROS: [f32; 32] = [0.0; 32];
    let (a_rows, a_cols) = match block.layout {
        Layout::Rows => (&ROW_STARTS, &CONSECUTIVE),
        Layout::Columns => (CONSECUTIVE.first_chunk().expect("MC <= KC"), &COLUMN_STARTS),
    };
    assert!(block.staged.len() >= STAGED_LEN && block.sums.len() >= block.rows * kernel.nr);
    for i in (0..block.rows).step_by(kernel.mr) {
        let rows = i..block.rows.min(i + kernel.mr);
        let sums = &mut block.sums[i * kernel.nr..];
        let tile = Tile {
            a: block.staged.as_ptr(),
            rows: &a_rows[rows.clone()],
            cols: &a_cols[..block.ks.len()],
            b: &block.panel[(1 + block.ks.start) * kernel.nr..],
            start: (block.ks.start == 0).then_some(&ZEROS[..kernel.nr]),
            c: sums.as_mut_ptr(),
            c_rows: sum_rows(kernel.nr),
            n: kernel.nr,
            relu: false,
        };
        // SAFETY: the tables stay within the staged block, the sums have the tile's rows, and the CPU has the kernel's
        // instructions.
        unsafe { (kernel.tile)(&tile) };
    }
}

/// The rows of a tile of sums that is `nr` wide.
fn sum_rows(nr: usize) -> &'static [u32] {
    const OF_8: [u32; 8] = multiples(8);
    const OF_16: [u32; 8] = multiples(16);
    const OF_32: [u32; 8] = multiples(32);
    match nr {
        8 => &OF_8,
        16 => &OF_16,
        32 => &OF_32,
        nr => unreachable!("a kernel of {nr} columns"),
    }
}
