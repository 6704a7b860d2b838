//! The instruction sets: how each keeps its operands, and what multiplies a staged block of A by a panel of B.

use super::super::gemm::{self, Left, Right, Tile};
use super::stage::stage;
use half::bf16;
use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;

/// An instruction set's way to multiply, and the sizes of its blocks.
pub struct Kernel {
    pub name: &'static str,
    /// Columns of a panel of B.
    pub nr: usize,
    /// Rows of A, columns of A, and columns of C in a block.
    pub(super) mc: usize,
    pub(super) kc: usize,
    pub(super) nc: usize,
    arithmetic: Arithmetic,
}

enum Arithmetic {
    /// Both operands are widened to f32 when they are staged and packed.
    Widened(&'static gemm::Kernel),
}
use Arithmetic::Widened;

/// Rows 0..`rows` of A, staged, times rows `ks` of a panel of B.
pub(super) struct Block<'a> {
    pub rows: usize,
    pub ks: Range<usize>,
    pub staged: &'a [f32],
    pub panel: &'a [f32],
    /// (mc, nr): overwritten where `ks` starts at 0, else added to.
    pub sums: &'a mut [f32],
}

impl Kernel {
    /// All kernels that run on this CPU, the fastest first.
    pub fn available() -> &'static [Kernel] {
        static AVAILABLE: OnceLock<Vec<Kernel>> = OnceLock::new();
        AVAILABLE.get_or_init(|| gemm::Kernel::available().iter().map(Kernel::widened).collect())
    }

    pub fn best() -> &'static Kernel {
        &Self::available()[0]
    }

    /// Whether the CPU has instructions for products of bf16, so that these are faster than products of f32.
    pub fn is_native(&self) -> bool {
        !matches!(self.arithmetic, Widened(_))
    }

    /// 96 x 384 of A and 96 x 256 of C take 245 KB: half of a Zen 3's L2.
    fn widened(kernel: &'static gemm::Kernel) -> Kernel {
        Kernel { name: kernel.name, nr: kernel.nr, mc: 96, kc: 384, nc: 256, arithmetic: Widened(kernel) }
    }

    pub(super) fn packed_len(&self, k: usize, n: usize) -> usize {
        match self.arithmetic {
            Widened(kernel) => gemm::packed_len(kernel, k, n),
        }
    }

    pub(super) fn pack(&self, right: Right<'_, bf16>, bias: Option<&[f32]>, packed: &mut [f32]) {
        match self.arithmetic {
            Widened(kernel) => gemm::pack(kernel, right, bias, packed),
        }
    }

    pub(super) fn pack_parallel(&self, right: Right<'_, bf16>, bias: Option<&[f32]>, packed: &mut [f32]) {
        match self.arithmetic {
            Widened(kernel) => gemm::pack_parallel(kernel, right, bias, packed),
        }
    }

    /// f32 words of a staged block.
    pub(super) fn staged_len(&self) -> usize {
        match self.arithmetic {
            Widened(_) => self.mc * self.kc,
        }
    }

    /// Copies a block of at most mc x kc of A.
    pub(super) fn stage(&self, block: Left<'_, bf16>, staged: &mut [f32]) {
        match self.arithmetic {
            Widened(_) => stage(block, staged, self.kc),
        }
    }

    pub(super) fn multiply(&self, block: Block<'_>) {
        match self.arithmetic {
            Widened(kernel) => multiply_widened(kernel, self.kc, block),
        }
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

fn multiply_widened(kernel: &gemm::Kernel, kc: usize, block: Block<'_>) {
    const ZEROS: [f32; 32] = [0.0; 32];
    let cols: [u32; 384] = std::array::from_fn(|k| k as u32);
    let a_rows: [u32; 96] = std::array::from_fn(|i| (i * kc) as u32);
    let c_rows: [u32; 96] = std::array::from_fn(|i| (i * kernel.nr) as u32);
    assert!(block.staged.len() >= block.rows * kc && block.sums.len() >= block.rows * kernel.nr);
    for i in (0..block.rows).step_by(kernel.mr) {
        let tile = Tile {
            a: block.staged.as_ptr(),
            rows: &a_rows[i..block.rows.min(i + kernel.mr)],
            cols: &cols[..block.ks.len()],
            b: &block.panel[(1 + block.ks.start) * kernel.nr..],
            start: (block.ks.start == 0).then_some(&ZEROS[..kernel.nr]),
            c: block.sums.as_mut_ptr(),
            c_rows: &c_rows[i..],
            n: kernel.nr,
            relu: false,
        };
        // SAFETY: rows and columns lie within the staged block and the sums, as asserted, and the CPU has the kernel's
        // instructions.
        unsafe { (kernel.tile)(&tile) };
    }
}
