//! The instruction sets: how each keeps its operands, the sizes of its blocks, and which of them this CPU has.

use super::super::gemm::{self, Left, Right};
use super::{pairs, widened};
use half::bf16;
use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::{amx, avx512};

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
    /// Both operands are widened to f32 when they are staged and packed, and multiplied by a tile kernel of `gemm`.
    Widened(&'static gemm::Kernel),
    /// Both operands stay bf16, neighbours along K in pairs.
    Pairs { multiply: unsafe fn(&pairs::Block<'_>), tiles: bool },
}
use Arithmetic::{Pairs, Widened};

/// Rows 0..`rows` of A, staged, times rows `ks` of a panel of B.
pub(super) struct Block<'a> {
    pub rows: usize,
    pub ks: Range<usize>,
    pub staged: &'a [f32],
    pub layout: Layout,
    pub panel: &'a [f32],
    /// (mc, nr): overwritten where `ks` starts at 0, else added to.
    pub sums: &'a mut [f32],
}

/// How a block of A is staged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Layout {
    /// The values of a row of A side by side.
    Rows,
    /// The values of a column of A side by side.
    Columns,
}

impl Kernel {
    /// All kernels that run on this CPU, the fastest first.
    pub fn available() -> &'static [Kernel] {
        static AVAILABLE: OnceLock<Vec<Kernel>> = OnceLock::new();
        AVAILABLE.get_or_init(|| {
            let mut kernels = Vec::new();
            #[cfg(target_arch = "x86_64")]
            {
                if amx::request() {
                    kernels.push(Kernel::of_pairs("amx", amx::multiply, true));
                }
                if avx512::detected() {
                    kernels.push(Kernel::of_pairs("avx512-bf16", avx512::multiply, false));
                }
            }
            kernels.extend(gemm::Kernel::available().iter().map(Kernel::widened));
            kernels
        })
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
        Kernel {
            name: kernel.name,
            nr: kernel.nr,
            mc: widened::MC,
            kc: widened::KC,
            nc: 256,
            arithmetic: Widened(kernel),
        }
    }

    /// 128 x 512 of A and 128 x 512 of C take 401 KB of the 2 MB of L2 of a Sapphire Rapids, 512 x 32 of B 32 of the 48 KB
    /// of L1.
    #[cfg(target_arch = "x86_64")]
    fn of_pairs(name: &'static str, multiply: unsafe fn(&pairs::Block<'_>), tiles: bool) -> Kernel {
        Kernel { name, nr: pairs::NR, mc: pairs::MC, kc: pairs::KC, nc: 512, arithmetic: Pairs { multiply, tiles } }
    }

    pub(super) fn packed_len(&self, k: usize, n: usize) -> usize {
        match self.arithmetic {
            Widened(kernel) => gemm::packed_len(kernel, k, n),
            Pairs { .. } => pairs::packed_len(k, n),
        }
    }

    pub(super) fn pack(&self, right: Right<'_, bf16>, bias: Option<&[f32]>, packed: &mut [f32]) {
        match self.arithmetic {
            Widened(kernel) => gemm::pack(kernel, right, bias, packed),
            Pairs { .. } => pairs::pack(right, bias, packed),
        }
    }

    pub(super) fn pack_parallel(&self, right: Right<'_, bf16>, bias: Option<&[f32]>, packed: &mut [f32]) {
        match self.arithmetic {
            Widened(kernel) => gemm::pack_parallel(kernel, right, bias, packed),
            Pairs { .. } => pairs::pack_parallel(right, bias, packed),
        }
    }

    /// f32 words of a staged block.
    pub(super) fn staged_len(&self) -> usize {
        match self.arithmetic {
            Widened(_) => widened::STAGED_LEN,
            Pairs { .. } => pairs::STAGED_LEN,
        }
    }

    /// Copies a block of at most mc x kc of A.
    pub(super) fn stage(&self, block: Left<'_, bf16>, staged: &mut [f32]) -> Layout {
        match self.arithmetic {
            Widened(_) => widened::stage(block, staged),
            Pairs { .. } => {
                pairs::stage(block, staged);
                Layout::Rows
            }
        }
    }

    /// Prepares this thread for calls of `multiply`; what is returned is to be kept until the last.
    pub(super) fn prepare(&self) -> Prepared {
        match self.arithmetic {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the kernel is there only if the system has granted the use of tiles.
            Pairs { tiles: true, .. } => Prepared { _tiles: Some(unsafe { amx::Tiles::configure() }) },
            _ => Prepared::default(),
        }
    }

    pub(super) fn multiply(&self, _prepared: &Prepared, block: Block<'_>) {
        match self.arithmetic {
            Widened(kernel) => widened::multiply(kernel, block),
            Pairs { multiply, .. } => {
                // SAFETY: the CPU has the kernel's instructions, and `prepare` was called for its tiles.
                unsafe { multiply(&pairs::Block::new(block)) }
            }
        }
    }
}

/// What a thread holds while it multiplies.
#[derive(Default)]
pub(super) struct Prepared {
    #[cfg(target_arch = "x86_64")]
    _tiles: Option<amx::Tiles>,
}

impl Layout {
    /// The one whose copy is in longer pieces: how often the offsets of a row of A and of a column of A jump decides.
    pub fn of(block: &Left<'_, bf16>) -> Layout {
        let jumps = |table: &[u32]| table.windows(2).filter(|pair| pair[1] != pair[0].wrapping_add(1)).count();
        let (down, along) = (jumps(block.rows), jumps(block.cols));
        if down * block.cols.len() < along * block.rows.len() { Layout::Columns } else { Layout::Rows }
    }
}

/// The number of offsets at the start of the table that follow one another.
pub(super) fn run_len(table: &[u32]) -> usize {
    1 + table.windows(2).take_while(|pair| pair[1] == pair[0].wrapping_add(1)).count()
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}
