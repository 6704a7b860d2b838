//! AMX: TDPBF16PS multiplies a tile of A (16 rows of 32 values) by a tile of B (16 rows of 16 pairs) and adds to a tile of
//! 16 x 16 sums: 8,192 multiply-adds in 16 cycles, 16 times what AVX-512 does in f32.
//!
//! Of the eight tile registers four hold 32 x 32 sums, two hold A and two hold B. Per 32 of K that is 4 loads of 1 KiB for
//! 4 products: 64 cycles of arithmetic, in which B (32 KB a panel and block) comes from L1 at 16 cycles, and A from L2
//! at 2 KiB in 64 cycles, 32 bytes a cycle of the about 48 that it gives. A block of 512 of K loads and stores its 4 tiles
//! of sums once in 1,024 cycles of arithmetic.
//!
//! The compiler knows the tile registers only as something that a block of assembly overwrites. It never uses them
//! itself, so they keep their configuration and values from one block to the next, and the kernel of the operating
//! system saves them with a thread's other registers. It asks to be asked first, once a process, and it saves 8 KiB more
//! of a thread whose tiles are in use: so they are released as soon as a product is done.

use super::pairs::{Block, KR, NR, STRIDE};
use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

/// Rows of a tile, and sums in a row of it.
const TILE: usize = 16;

/// Whether the CPU has AMX for bf16 and the operating system lets this process use it.
pub fn request() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const AMX_BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    const TILE_STATE: u64 = 1 << 17 | 1 << 18;
    #[target_feature(enable = "xsave")]
    fn enabled_state() -> u64 {
        // SAFETY: the register 0 exists where XSAVE does.
        unsafe { _xgetbv(0) }
    }
    __cpuid(0).eax >= 7
        && __cpuid(1).ecx & OSXSAVE != 0
        && __cpuid_count(7, 0).edx & AMX_BF16_AND_TILE == AMX_BF16_AND_TILE
        // SAFETY: OSXSAVE says that the CPU has XSAVE and the system uses it.
        && unsafe { enabled_state() } & TILE_STATE == TILE_STATE
        && permitted()
}

/// Asks Linux (5.16 or later) to save the tiles of this process's threads.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const SYS_ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let mut result = SYS_ARCH_PRCTL;
    // SAFETY: this call reads and writes no memory of ours.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// This thread's tiles, all of 16 rows of 64 bytes; released when dropped.
pub struct Tiles {
    /// Tiles belong to the thread that configured them.
    _of_this_thread: std::marker::PhantomData<*const ()>,
}

/// LDTILECFG's operand: palette 1 is the only one.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIGURATION: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

impl Tiles {
    /// # Safety
    /// `request` has returned true.
    pub unsafe fn configure() -> Tiles {
        // SAFETY: the configuration is valid for palette 1, and nobody else on this thread uses tiles.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIGURATION, options(nostack, readonly)) };
        Tiles { _of_this_thread: std::marker::PhantomData }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: no tile's value is needed any more.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// # Safety
/// This thread has configured its tiles.
pub unsafe fn multiply(block: &Block<'_>) {
    for i in (0..block.rows).step_by(2 * TILE) {
        // SAFETY: a block has MC rows, a multiple of 32, of staged values and of sums, and a multiple of 16 pairs.
        unsafe { tiles(block, block.a.as_ptr().add(i * STRIDE / 2), block.sums.as_ptr().cast_mut().add(i * NR)) }
    }
}

/// sums (32, NR) (+)= A (32, 2 * pairs) B (2 * pairs, NR)
unsafe fn tiles(block: &Block<'_>, a: *const u32, c: *mut f32) {
    let b = block.b.as_ptr();
    // SAFETY: of `multiply`.
    unsafe {
        asm!(
            "test {first}, {first}",
            "jnz 2f",
            "tileloadd tmm0, [{c} + {c_row}]",
            "tileloadd tmm1, [{c} + {c_row} + 64]",
            "tileloadd tmm2, [{c_low} + {c_row}]",
            "tileloadd tmm3, [{c_low} + {c_row} + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "tileloadd tmm4, [{a} + {a_row}]",
            "tileloadd tmm6, [{b} + {c_row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + {c_row} + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a_low} + {a_row}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, {a_step}",
            "add {a_low}, {a_step}",
            "add {b}, {b_step}",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{c} + {c_row}], tmm0",
            "tilestored [{c} + {c_row} + 64], tmm1",
            "tilestored [{c_low} + {c_row}], tmm2",
            "tilestored [{c_low} + {c_row} + 64], tmm3",
            first = in(reg) usize::from(block.first),
            steps = inout(reg) 2 * block.pairs / KR => _,
            a = inout(reg) a => _,
            a_low = inout(reg) a.add(TILE * STRIDE / 2) => _,
            b = inout(reg) b => _,
            c = in(reg) c,
            c_low = in(reg) c.add(TILE * NR),
            a_row = in(reg) STRIDE * 2,
            // Rows of B and of the sums are 32 words long.
            c_row = in(reg) NR * 4,
            a_step = const KR * 2,
            b_step = const TILE * NR * 4,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        );
    }
}
