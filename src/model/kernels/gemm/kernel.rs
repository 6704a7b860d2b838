//! The tile kernel: one source, compiled for AVX-512, for AVX2 with FMA, and for any CPU; which one is used is decided
//! when the program runs.

use std::fmt;

/// An instruction set's tile kernel and the shape of its tile.
pub struct Kernel {
    pub name: &'static str,
    /// Rows of a tile.
    pub mr: usize,
    /// Columns of a tile, and of a panel of B.
    pub nr: usize,
    /// # Safety
    /// The CPU has the kernel's instructions, and the tile's addresses are valid.
    pub(in super::super) tile: unsafe fn(&Tile<'_>),
}

impl Kernel {
    /// All kernels that run on this CPU, the fastest first.
    pub fn available() -> &'static [Kernel] {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return &KERNELS;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return &KERNELS[1..];
            }
        }
        &KERNELS[KERNELS.len() - 1..]
    }

    pub fn best() -> &'static Kernel {
        &Self::available()[0]
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

#[cfg(target_arch = "x86_64")]
static KERNELS: [Kernel; 3] = [
    Kernel { name: "avx512", mr: 8, nr: 32, tile: x86::avx512 },
    Kernel { name: "avx2", mr: 6, nr: 16, tile: x86::avx2 },
    PORTABLE,
];
#[cfg(not(target_arch = "x86_64"))]
static KERNELS: [Kernel; 1] = [PORTABLE];

const PORTABLE: Kernel = Kernel { name: "portable", mr: 4, nr: 8, tile: portable };

/// One tile of C and what it is the product of: C(i, j) for `rows.len()` <= mr rows and `n` <= nr columns.
pub(in super::super) struct Tile<'a> {
    pub a: *const f32,
    pub rows: &'a [u32],
    pub cols: &'a [u32],
    /// (K, nr)
    pub b: &'a [f32],
    /// (nr): where the sums start; None to start from C.
    pub start: Option<&'a [f32]>,
    pub c: *mut f32,
    pub c_rows: &'a [u32],
    pub n: usize,
    pub relu: bool,
}

/// A register of f32 lanes. The methods are inlined into functions that are compiled for the instructions they use.
trait Vector: Copy {
    const LANES: usize;
    unsafe fn zero() -> Self;
    unsafe fn splat(from: *const f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// self * b + c
    unsafe fn multiply_add(self, b: Self, c: Self) -> Self;
    /// max(self, 0), NaN where self is NaN.
    unsafe fn relu(self) -> Self;
    /// Asks for what two vectors at an address will need; any address will do.
    unsafe fn prefetch(at: *const f32);
}

/// A tile of exactly `MR` rows whose columns fill the first `NV` vectors of the panel's `NR` columns.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "loops over the registers of a tile, all unrolled")]
unsafe fn tile<V: Vector, const MR: usize, const NV: usize, const NR: usize>(t: &Tile<'_>) {
    debug_assert!(t.rows.len() == MR && t.c_rows.len() >= MR && t.b.len() >= t.cols.len() * NR && t.n <= NV * V::LANES);
    // SAFETY: the caller of the kernel vouches for rows, columns and C; B was checked when it was sliced.
    unsafe {
        let full = t.n == NV * V::LANES;
        let mut a = [t.a; MR];
        let mut c = [t.c; MR];
        for i in 0..MR {
            // Without columns no row of A need exist, so this place may lie outside; it is not read then.
            a[i] = t.a.wrapping_add(*t.rows.get_unchecked(i) as usize);
            c[i] = t.c.add(*t.c_rows.get_unchecked(i) as usize);
        }

        let mut sums = [[V::zero(); NV]; MR];
        match t.start {
            Some(start) => {
                for v in 0..NV {
                    let start = V::load(start.as_ptr().add(v * V::LANES));
                    for sums in &mut sums {
                        sums[v] = start;
                    }
                }
            }
            None if full => {
                for i in 0..MR {
                    for v in 0..NV {
                        sums[i][v] = V::load(c[i].add(v * V::LANES));
                    }
                }
            }
            None => {}
        }

        // The next tile's part of C, which may lie far away: the last level of cache takes long to answer.
        for &row in t.c_rows.iter().skip(MR).take(MR) {
            V::prefetch(t.c.wrapping_add(row as usize));
        }

        let mut b = t.b.as_ptr();
        for &col in t.cols {
            let mut row = [V::zero(); NV];
            for v in 0..NV {
                row[v] = V::load(b.add(v * V::LANES));
            }
            for i in 0..MR {
                let value = V::splat(a[i].add(col as usize));
                for v in 0..NV {
                    sums[i][v] = value.multiply_add(row[v], sums[i][v]);
                }
            }
            b = b.add(NR);
        }

        if full {
            for i in 0..MR {
                for v in 0..NV {
                    let sum = if t.relu { sums[i][v].relu() } else { sums[i][v] };
                    sum.store(c[i].add(v * V::LANES));
                }
            }
        } else {
            for i in 0..MR {
                let mut row = [[0.0; 16]; NV];
                for v in 0..NV {
                    sums[i][v].store(row[v].as_mut_ptr());
                }
                for j in 0..t.n {
                    let begun = if t.start.is_none() { *c[i].add(j) } else { 0.0 };
                    let sum = begun + row[j / V::LANES][j % V::LANES];
                    *c[i].add(j) = if t.relu && sum < 0.0 { 0.0 } else { sum };
                }
            }
        }
    }
}

/// `tile` for the number of rows and of vectors at hand.
macro_rules! choose {
    ($t:expr, $vector:ty, $nr:literal, $($mr:literal)+) => {
        match $t.rows.len() {
            $($mr if $t.n > <$vector>::LANES => tile::<$vector, $mr, 2, $nr>($t),
              $mr => tile::<$vector, $mr, 1, $nr>($t),)+
            rows => unreachable!("a tile of {rows} rows"),
        }
    };
}

unsafe fn portable(t: &Tile<'_>) {
    // SAFETY: passed on.
    unsafe { choose!(t, [f32; 4], 8, 1 2 3 4) }
}

impl Vector for [f32; 4] {
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn zero() -> Self {
        [0.0; 4]
    }
    #[inline(always)]
    unsafe fn splat(from: *const f32) -> Self {
        unsafe { [*from; 4] }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { from.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self) }
    }
    /// Two roundings: without an FMA instruction, `mul_add` is a slow library call.
    #[inline(always)]
    unsafe fn multiply_add(self, b: Self, c: Self) -> Self {
        std::array::from_fn(|lane| self[lane] * b[lane] + c[lane])
    }
    #[inline(always)]
    unsafe fn relu(self) -> Self {
        self.map(|x| if x < 0.0 { 0.0 } else { x })
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const f32) {}
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Tile, Vector, tile};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512(t: &Tile<'_>) {
        // SAFETY: passed on.
        unsafe { choose!(t, __m512, 32, 1 2 3 4 5 6 7 8) }
    }

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(t: &Tile<'_>) {
        // SAFETY: passed on.
        unsafe { choose!(t, __m256, 16, 1 2 3 4 5 6) }
    }

    macro_rules! vector {
        ($vector:ty, $lanes:literal, $zero:ident, $set1:ident, $load:ident, $store:ident, $fma:ident, $max:ident) => {
            impl Vector for $vector {
                const LANES: usize = $lanes;
                #[inline(always)]
                unsafe fn zero() -> Self {
                    unsafe { $zero() }
                }
                #[inline(always)]
                unsafe fn splat(from: *const f32) -> Self {
                    unsafe { $set1(*from) }
                }
                #[inline(always)]
                unsafe fn load(from: *const f32) -> Self {
                    unsafe { $load(from) }
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut f32) {
                    unsafe { $store(to, self) }
                }
                #[inline(always)]
                unsafe fn multiply_add(self, b: Self, c: Self) -> Self {
                    unsafe { $fma(self, b, c) }
                }
                /// Of two operands of which one is NaN, the instruction returns the second.
                #[inline(always)]
                unsafe fn relu(self) -> Self {
                    unsafe { $max($zero(), self) }
                }
                #[inline(always)]
                unsafe fn prefetch(at: *const f32) {
                    for line in (0..2 * $lanes).step_by(16) {
                        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(line).cast()) }
                    }
                }
            }
        };
    }
    vector!(
        __m256,
        8,
        _mm256_setzero_ps,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_fmadd_ps,
        _mm256_max_ps
    );
    vector!(
        __m512,
        16,
        _mm512_setzero_ps,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_fmadd_ps,
        _mm512_max_ps
    );
}
