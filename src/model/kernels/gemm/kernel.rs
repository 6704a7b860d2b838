//! The kernel: a panel of B under a block of rows of A, tile by tile. One source, compiled for AVX-512, for AVX2 with FMA,
//! and for any CPU; which one is used is decided when the program runs.

use std::fmt;

/// An instruction set's kernel and the shape of its tile.
pub struct Kernel {
    pub name: &'static str,
    /// Rows of a tile.
    pub mr: usize,
    /// Columns of a tile, and of a panel of B.
    pub nr: usize,
    /// # Safety
    /// The CPU has the kernel's instructions, and the panel's addresses are valid.
    pub(in super::super) multiply: unsafe fn(&Panel<'_>),
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
    Kernel { name: "avx512", mr: 8, nr: 32, multiply: x86::avx512 },
    Kernel { name: "avx2", mr: 6, nr: 16, multiply: x86::avx2 },
    PORTABLE,
];
#[cfg(not(target_arch = "x86_64"))]
static KERNELS: [Kernel; 1] = [PORTABLE];

const PORTABLE: Kernel = Kernel { name: "portable", mr: 4, nr: 8, multiply: portable };

/// C(i, j) for all `rows` and `n` <= nr columns: one panel of B under a block of rows.
pub(in super::super) struct Panel<'a> {
    pub a: *const f32,
    pub rows: &'a [u32],
    pub cols: &'a [u32],
    /// (K, nr)
    pub b: *mut f32,
    /// Where B lies, if it is not in `b` yet: the first tile puts it there.
    pub source: Option<Source<'a>>,
    /// (nr): where the sums start; None to start from C.
    pub start: Option<*const f32>,
    pub c: *mut f32,
    pub c_rows: &'a [u32],
    pub n: usize,
    pub relu: bool,
}

/// Row k of a panel that is not packed: the nr values at `data + rows[k]`.
#[derive(Clone, Copy)]
pub(in super::super) struct Source<'a> {
    pub data: *const f32,
    pub rows: &'a [u32],
    /// The same place in the panel that comes next, to be fetched meanwhile.
    pub next: *const f32,
}

/// A register of f32 lanes. The methods are inlined into functions that are compiled for the instructions they use.
trait Vector: Copy {
    const LANES: usize;
    unsafe fn zero() -> Self;
    unsafe fn splat(from: *const f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// Asks for the cache line at `place`, which need not be valid, into the cache of this level.
    unsafe fn prefetch<const LEVEL: i32>(place: *const f32);
    /// self * b + c
    unsafe fn multiply_add(self, b: Self, c: Self) -> Self;
    /// max(self, 0), NaN where self is NaN.
    unsafe fn relu(self) -> Self;
}

/// Columns of A from one prefetch to the next: a cache line of a row.
const LINE: usize = 16;

/// Rows of the next tile when `left` are left: the last two share theirs, since a tile of few rows has too few sums to
/// hide the latency of its multiply-adds.
fn tile_rows(left: usize, most: usize) -> usize {
    if left > most && left < 2 * most { left.div_ceil(2) } else { left.min(most) }
}

/// The rows from `first` on, exactly `MR`, under the panel, whose columns fill the first `NV` vectors of its `NR`. With
/// `PACK`, B is read from the source and left in the panel.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "loops over the registers of a tile, all unrolled")]
unsafe fn tile<V: Vector, const MR: usize, const NV: usize, const NR: usize, const PACK: bool>(
    p: &Panel<'_>,
    first: usize,
) {
    debug_assert!(p.rows.len() >= first + MR && p.c_rows.len() >= first + MR && p.n <= NV * V::LANES);
    // SAFETY: the caller of the kernel vouches for rows, columns, B and C.
    unsafe {
        let mut a = [p.a; MR];
        let mut c = [p.c; MR];
        for i in 0..MR {
            // Without columns no row of A need exist, so this place may lie outside; it is not read then.
            a[i] = p.a.wrapping_add(*p.rows.get_unchecked(first + i) as usize);
            c[i] = p.c.add(*p.c_rows.get_unchecked(first + i) as usize);
            V::prefetch::<1>(c[i]);
        }
        let mut sums = begin::<V, MR, NV>(p, &c);
        let share = [first, first + MR].map(|row| LINE * row / p.rows.len());
        let mut b = p.b;
        for (number, cols) in p.cols.chunks(LINE).enumerate() {
            let k = number * LINE;
            prefetch::<V, MR>(p, first, k, cols, share);
            // In a variable of the loop's own, the sums stay in registers.
            let mut inner = sums;
            for (i, &col) in cols.iter().enumerate() {
                let from = match p.source {
                    Some(source) if PACK => source.data.add(*source.rows.get_unchecked(k + i) as usize),
                    _ => b,
                };
                let mut row = [V::zero(); NV];
                for v in 0..NV {
                    row[v] = V::load(from.add(v * V::LANES));
                    if PACK {
                        row[v].store(b.add(v * V::LANES));
                    }
                }
                for i in 0..MR {
                    let value = V::splat(a[i].add(col as usize));
                    for v in 0..NV {
                        inner[i][v] = value.multiply_add(row[v], inner[i][v]);
                    }
                }
                b = b.add(NR);
            }
            sums = inner;
        }
        if p.n == NV * V::LANES {
            return end(p, &c, sums);
        }
        let mut values = [[0.0; 32]; MR];
        for i in 0..MR {
            for v in 0..NV {
                sums[i][v].store(values[i].as_mut_ptr().add(v * V::LANES));
            }
        }
        end_partly(p, &c, values.as_flattened());
    }
}

/// What the sums start from.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "loops over the registers of a tile, all unrolled")]
unsafe fn begin<V: Vector, const MR: usize, const NV: usize>(p: &Panel<'_>, c: &[*mut f32; MR]) -> [[V; NV]; MR] {
    // SAFETY: passed on.
    unsafe {
        let mut sums = [[V::zero(); NV]; MR];
        for v in 0..NV {
            match p.start {
                Some(start) => {
                    let start = V::load(start.add(v * V::LANES));
                    for i in 0..MR {
                        sums[i][v] = start;
                    }
                }
                None if p.n == NV * V::LANES => {
                    for i in 0..MR {
                        sums[i][v] = V::load(c[i].add(v * V::LANES));
                    }
                }
                // Added at the end.
                None => {}
            }
        }
        sums
    }
}

/// While `cols`, which begin at column `k`, are worked on: fetches the same columns of the next tile's rows, or of a
/// panel that is not packed the same rows of the next one, of which each tile takes its `share`.
#[inline(always)]
unsafe fn prefetch<V: Vector, const MR: usize>(p: &Panel<'_>, first: usize, k: usize, cols: &[u32], share: [usize; 2]) {
    // SAFETY: the tables are as long as the caller of the kernel says; a prefetch of any address is harmless.
    unsafe {
        if let Some(source) = p.source {
            for line in share[0].min(cols.len())..share[1].min(cols.len()) {
                V::prefetch::<2>(source.next.wrapping_add(*source.rows.get_unchecked(k + line) as usize));
            }
        } else {
            // Behind the last tile comes the first again, with the next panel.
            let next = if first + 2 * MR <= p.rows.len() { first + MR } else { 0 };
            for i in next..next + MR {
                let row = *p.rows.get_unchecked(i) as usize;
                V::prefetch::<2>(p.a.wrapping_add(row + *cols.get_unchecked(0) as usize));
            }
        }
    }
}

/// Stores a tile that fills its vectors.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "loops over the registers of a tile, all unrolled")]
unsafe fn end<V: Vector, const MR: usize, const NV: usize>(p: &Panel<'_>, c: &[*mut f32; MR], sums: [[V; NV]; MR]) {
    // SAFETY: passed on.
    unsafe {
        for i in 0..MR {
            for v in 0..NV {
                let sum = if p.relu { sums[i][v].relu() } else { sums[i][v] };
                sum.store(c[i].add(v * V::LANES));
            }
        }
    }
}

/// Stores a tile of fewer columns, value by value.
#[inline(never)]
unsafe fn end_partly(p: &Panel<'_>, c: &[*mut f32], sums: &[f32]) {
    let width = sums.len() / c.len();
    for (&c, sums) in c.iter().zip(sums.chunks_exact(width)) {
        for (j, sum) in sums[..p.n].iter().enumerate() {
            // SAFETY: passed on.
            unsafe {
                let begun = if p.start.is_none() { *c.add(j) } else { 0.0 };
                let sum = begun + sum;
                *c.add(j) = if p.relu && sum < 0.0 { 0.0 } else { sum };
            }
        }
    }
}

/// All tiles of a panel, each by `$tile` for its number of rows and of vectors.
macro_rules! tiles {
    ($panel:expr, $tile:ident, $lanes:literal, $most:literal, $($mr:literal)+) => {{
        let p: &Panel<'_> = $panel;
        let mut first = 0;
        while first < p.rows.len() {
            let rows = tile_rows(p.rows.len() - first, $most);
            match rows {
                $($mr if p.n <= $lanes => $tile::<$mr, 1, false>(p, first),
                  $mr if first == 0 && p.source.is_some() => $tile::<$mr, 2, true>(p, first),
                  $mr => $tile::<$mr, 2, false>(p, first),)+
                rows => unreachable!("a tile of {rows} rows"),
            }
            first += rows;
        }
    }};
}

unsafe fn portable(p: &Panel<'_>) {
    // SAFETY: passed on.
    unsafe { tiles!(p, portable_tile, 4, 4, 1 2 3 4) }
}

unsafe fn portable_tile<const MR: usize, const NV: usize, const PACK: bool>(p: &Panel<'_>, first: usize) {
    // SAFETY: passed on.
    unsafe { tile::<[f32; 4], MR, NV, 8, PACK>(p, first) }
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
    #[inline(always)]
    unsafe fn prefetch<const LEVEL: i32>(_: *const f32) {}
    /// Two roundings: without an FMA instruction, `mul_add` is a slow library call.
    #[inline(always)]
    unsafe fn multiply_add(self, b: Self, c: Self) -> Self {
        std::array::from_fn(|lane| self[lane] * b[lane] + c[lane])
    }
    #[inline(always)]
    unsafe fn relu(self) -> Self {
        self.map(|x| if x < 0.0 { 0.0 } else { x })
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Panel, Vector, tile, tile_rows};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512(p: &Panel<'_>) {
        // SAFETY: passed on.
        unsafe { tiles!(p, avx512_tile, 16, 8, 1 2 3 4 5 6 7 8) }
    }

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(p: &Panel<'_>) {
        // SAFETY: passed on.
        unsafe { tiles!(p, avx2_tile, 8, 6, 1 2 3 4 5 6) }
    }

    /// Functions of their own: in one of all tiles, the compiler does not keep the sums in registers.
    #[target_feature(enable = "avx512f")]
    #[inline(never)]
    unsafe fn avx512_tile<const MR: usize, const NV: usize, const PACK: bool>(p: &Panel<'_>, first: usize) {
        // SAFETY: passed on.
        unsafe { tile::<__m512, MR, NV, 32, PACK>(p, first) }
    }

    #[target_feature(enable = "avx2,fma")]
    #[inline(never)]
    unsafe fn avx2_tile<const MR: usize, const NV: usize, const PACK: bool>(p: &Panel<'_>, first: usize) {
        // SAFETY: passed on.
        unsafe { tile::<__m256, MR, NV, 16, PACK>(p, first) }
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
                unsafe fn prefetch<const LEVEL: i32>(place: *const f32) {
                    match LEVEL {
                        1 => unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast()) },
                        _ => unsafe { _mm_prefetch::<_MM_HINT_T1>(place.cast()) },
                    }
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
