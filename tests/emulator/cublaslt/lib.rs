//! libcublasLt for the emulator: matrix products on host memory, by plain loops whose sums are in f64.
//!
//! It is strict where the real library is, or may be: an attribute has its size, leading dimensions cover their columns, an
//! algorithm is used for the types and the epilogue that it was found for, pointers have the alignment that was promised, and
//! the workspace is as large as the algorithm said, at a multiple of 256 bytes. What else is asked for is an invalid value.
//! Among the algorithms that it offers are some that a caller has to exclude: one that sums in place in an order of its own,
//! and one that needs matrices at multiples of 256 bytes. The sums of BGRADB are there only where rows begin at multiples of 16
//! bytes, so that callers have to do without.

#[path = "../context.rs"]
mod context;
#[path = "../queue.rs"]
mod queue;
mod values;

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use values::{BF16, F16, F32, load, size, store};

type Status = c_int;
const SUCCESS: Status = 0;
const NOT_INITIALIZED: Status = 1;
const INVALID_VALUE: Status = 7;
const EXECUTION_FAILED: Status = 13;
const NOT_SUPPORTED: Status = 15;

const COMPUTE_32F: u32 = 68;
const COMPUTE_32F_FAST_TF32: u32 = 77;
const COMPUTE_TYPE_REDUCTION: u32 = 2;
const INPLACE_REDUCTION: u32 = 1;

/// Epilogues are sets of bits: these are those known here.
const DEFAULT: u32 = 1;
const RELU: u32 = 2;
const BIAS: u32 = 4;
const RELU_BIAS: u32 = RELU | BIAS;
const BGRADB: u32 = 512;

const WORKSPACE_ALIGNMENT: usize = 256;

#[derive(Clone, Copy)]
pub struct Description {
    compute: u32,
    scale: u32,
    transposed: [c_int; 2],
    epilogue: u32,
    bias: usize,
}

/// Column by column: value (i, j) lies at i + j * ld.
#[derive(Clone, Copy)]
pub struct Layout {
    of: u32,
    rows: u64,
    cols: u64,
    ld: i64,
}

pub struct Preference {
    workspace: u64,
    reductions: u32,
    /// Of A, B, C and D.
    alignments: [u32; 4],
}

/// What stands in the 64 opaque bytes of an algorithm.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Algorithm {
    magic: u64,
    kind: u64,
    alignment: u64,
    types: u64,
    epilogue: u64,
    unused: [u64; 3],
}

#[repr(C)]
pub struct Heuristic {
    algorithm: Algorithm,
    workspace: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

const MAGIC: u64 = 0x656d_756c_6174_6564;

/// Kinds of algorithms.
const PLAIN: u64 = 0;
const SPLIT: u64 = 1;
const SPLIT_IN_PLACE: u64 = 2;
const VECTORS: u64 = 3;

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtGetVersion() -> usize {
    130_000
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtGetStatusString(status: Status) -> *const std::ffi::c_char {
    match status {
        SUCCESS => c"the operation completed successfully",
        INVALID_VALUE => c"an unsupported value or parameter was passed to the function",
        _ => c"the functionality requested is not supported",
    }
    .as_ptr()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtCreate(handle: *mut *mut c_void) -> Status {
    unsafe { *handle = Box::into_raw(Box::new(MAGIC)).cast() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtDestroy(handle: *mut c_void) -> Status {
    unsafe { destroy(handle.cast::<u64>()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescCreate(to: *mut *mut Description, compute: u32, scale: u32) -> Status {
    let description = Description { compute, scale, transposed: [0; 2], epilogue: DEFAULT, bias: 0 };
    unsafe { *to = Box::into_raw(Box::new(description)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescDestroy(description: *mut Description) -> Status {
    unsafe { destroy(description) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescSetAttribute(
    description: *mut Description,
    attribute: c_int,
    from: *const c_void,
    bytes: usize,
) -> Status {
    let description = unsafe { &mut *description };
    unsafe {
        match attribute {
            3 => set(&mut description.transposed[0], from, bytes),
            4 => set(&mut description.transposed[1], from, bytes),
            7 => set(&mut description.epilogue, from, bytes),
            8 => set(&mut description.bias, from, bytes),
            _ => INVALID_VALUE,
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutCreate(
    to: *mut *mut Layout,
    of: u32,
    rows: u64,
    cols: u64,
    ld: i64,
) -> Status {
    unsafe { *to = Box::into_raw(Box::new(Layout { of, rows, cols, ld })) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutDestroy(layout: *mut Layout) -> Status {
    unsafe { destroy(layout) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutSetAttribute(
    layout: *mut Layout,
    attribute: c_int,
    from: *const c_void,
    bytes: usize,
) -> Status {
    let layout = unsafe { &mut *layout };
    unsafe {
        match attribute {
            2 => set(&mut layout.rows, from, bytes),
            3 => set(&mut layout.cols, from, bytes),
            4 => set(&mut layout.ld, from, bytes),
            _ => INVALID_VALUE,
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceCreate(to: *mut *mut Preference) -> Status {
    let preference = Preference { workspace: 0, reductions: 7, alignments: [256; 4] };
    unsafe { *to = Box::into_raw(Box::new(preference)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceDestroy(preference: *mut Preference) -> Status {
    unsafe { destroy(preference) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceSetAttribute(
    preference: *mut Preference,
    attribute: c_int,
    from: *const c_void,
    bytes: usize,
) -> Status {
    let preference = unsafe { &mut *preference };
    unsafe {
        match attribute {
            1 => set(&mut preference.workspace, from, bytes),
            3 => set(&mut preference.reductions, from, bytes),
            5..=8 => set(&mut preference.alignments[attribute as usize - 5], from, bytes),
            _ => INVALID_VALUE,
        }
    }
}

/// # Safety
/// `from` points to `bytes` bytes.
unsafe fn set<T: Copy>(to: &mut T, from: *const c_void, bytes: usize) -> Status {
    if from.is_null() || bytes != size_of::<T>() {
        return INVALID_VALUE;
    }
    *to = unsafe { from.cast::<T>().read_unaligned() };
    SUCCESS
}

/// # Safety
/// A box made by one of the functions above.
unsafe fn destroy<T>(made: *mut T) -> Status {
    if made.is_null() {
        return INVALID_VALUE;
    }
    drop(unsafe { Box::from_raw(made) });
    SUCCESS
}

/// What a call computes: D (m, n) from op(A) (m, k) and op(B) (k, n).
#[derive(Clone, Copy)]
struct Problem {
    description: Description,
    a: Layout,
    b: Layout,
    d: Layout,
    m: usize,
    n: usize,
    k: usize,
}

impl Problem {
    /// The problem if the library can solve it, or the status that says why not.
    unsafe fn new(description: *const Description, [a, b, c, d]: [*const Layout; 4]) -> Result<Problem, Status> {
        if description.is_null() || [a, b, c, d].iter().any(|layout| layout.is_null()) {
            return Err(INVALID_VALUE);
        }
        let (description, [a, b, c, d]) = unsafe { (*description, [*a, *b, *c, *d]) };
        let turned = |layout: Layout, transposed: c_int| match transposed {
            0 => Ok((layout.rows, layout.cols)),
            1 => Ok((layout.cols, layout.rows)),
            _ => Err(INVALID_VALUE),
        };
        let ((m, k), (inner, n)) = (turned(a, description.transposed[0])?, turned(b, description.transposed[1])?);
        let fits = k == inner && (d.rows, d.cols) == (m, n) && (c.rows, c.cols, c.ld) == (m, n, d.ld);
        let covers = |layout: Layout| layout.rows > 0 && layout.cols > 0 && layout.ld >= layout.rows as i64;
        if !fits || ![a, b, c, d].into_iter().all(covers) {
            return Err(INVALID_VALUE);
        }
        let types = match description.compute {
            COMPUTE_32F => matches!((a.of, d.of), (F32, F32) | (F16 | BF16, F32) | (F16, F16) | (BF16, BF16)),
            COMPUTE_32F_FAST_TF32 => (a.of, d.of) == (F32, F32),
            _ => false,
        };
        let epilogue = matches!(description.epilogue, DEFAULT | RELU | BIAS | RELU_BIAS | BGRADB);
        if !types || !epilogue || a.of != b.of || c.of != d.of || description.scale != F32 {
            return Err(NOT_SUPPORTED);
        }
        let unaligned = [a, b].iter().any(|layout| layout.ld as usize * size(layout.of) % 16 != 0);
        if description.epilogue == BGRADB && unaligned {
            return Err(NOT_SUPPORTED);
        }
        Ok(Problem { description, a, b, d, m: m as usize, n: n as usize, k: k as usize })
    }

    /// What an algorithm is for.
    fn types(&self) -> u64 {
        u64::from(self.description.compute) << 16 | u64::from(self.a.of) << 8 | u64::from(self.d.of)
    }

    fn algorithm(&self, kind: u64) -> Algorithm {
        let alignment = if kind == VECTORS { 256 } else { 16 };
        let epilogue = u64::from(self.description.epilogue);
        Algorithm { magic: MAGIC, kind, alignment, types: self.types(), epilogue, unused: [0; 3] }
    }

    fn workspace(&self, kind: u64) -> usize {
        match kind {
            SPLIT => 2 * 4 * self.m * self.n,
            SPLIT_IN_PLACE => 4,
            _ => 0,
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulAlgoGetHeuristic(
    _handle: *mut c_void,
    description: *const Description,
    a: *const Layout,
    b: *const Layout,
    c: *const Layout,
    d: *const Layout,
    preference: *const Preference,
    most: c_int,
    results: *mut Heuristic,
    count: *mut c_int,
) -> Status {
    unsafe { *count = 0 };
    if !context::is_current() {
        return NOT_INITIALIZED;
    }
    let problem = match unsafe { Problem::new(description, [a, b, c, d]) } {
        Ok(problem) => problem,
        Err(status) => return status,
    };
    let preference = unsafe { &*preference };
    let aligned = preference.alignments.iter().all(|&alignment| alignment >= 256);
    let (in_place, split) = (preference.reductions & INPLACE_REDUCTION, preference.reductions & COMPUTE_TYPE_REDUCTION);
    let kinds = [(VECTORS, aligned), (SPLIT_IN_PLACE, in_place != 0), (SPLIT, split != 0), (PLAIN, true)];
    let offered =
        kinds.into_iter().filter(|&(kind, allowed)| allowed && problem.workspace(kind) as u64 <= preference.workspace);
    for (at, (kind, _)) in offered.take(most as usize).enumerate() {
        unsafe {
            results.add(at).write(heuristic(&problem, kind));
            *count += 1;
        }
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulAlgoCheck(
    _handle: *mut c_void,
    description: *const Description,
    a: *const Layout,
    b: *const Layout,
    c: *const Layout,
    d: *const Layout,
    algorithm: *const Algorithm,
    result: *mut Heuristic,
) -> Status {
    let problem = match unsafe { Problem::new(description, [a, b, c, d]) } {
        Ok(problem) => problem,
        Err(status) => return status,
    };
    let algorithm = unsafe { *algorithm };
    if !is_for(&algorithm, &problem) {
        return INVALID_VALUE;
    }
    unsafe { result.write(heuristic(&problem, algorithm.kind)) };
    SUCCESS
}

fn heuristic(problem: &Problem, kind: u64) -> Heuristic {
    let (algorithm, workspace) = (problem.algorithm(kind), problem.workspace(kind));
    Heuristic { algorithm, workspace, state: SUCCESS, waves: 1.0, reserved: [0; 4] }
}

fn is_for(algorithm: &Algorithm, problem: &Problem) -> bool {
    let epilogue = u64::from(problem.description.epilogue);
    (algorithm.magic, algorithm.types, algorithm.epilogue) == (MAGIC, problem.types(), epilogue)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmul(
    _handle: *mut c_void,
    description: *const Description,
    alpha: *const f32,
    a: *const c_void,
    a_layout: *const Layout,
    b: *const c_void,
    b_layout: *const Layout,
    beta: *const f32,
    c: *const c_void,
    c_layout: *const Layout,
    d: *mut c_void,
    d_layout: *const Layout,
    algorithm: *const Algorithm,
    workspace: *mut c_void,
    workspace_bytes: usize,
    stream: usize,
) -> Status {
    if !context::is_current() {
        return NOT_INITIALIZED;
    }
    let problem = match unsafe { Problem::new(description, [a_layout, b_layout, c_layout, d_layout]) } {
        Ok(problem) => problem,
        Err(status) => return status,
    };
    if algorithm.is_null() || alpha.is_null() || beta.is_null() {
        return INVALID_VALUE;
    }
    let (algorithm, alpha, beta) = unsafe { (*algorithm, *alpha, *beta) };
    let needed = problem.workspace(algorithm.kind);
    let fits = needed == 0 || (needed <= workspace_bytes && workspace as usize % WORKSPACE_ALIGNMENT == 0);
    let matrices = [a as usize, b as usize, c as usize, d as usize];
    let aligned = matrices.iter().all(|&address| address != 0 && address as u64 % algorithm.alignment == 0);
    let has_bias = problem.description.epilogue & (BIAS | BGRADB) != 0;
    if !is_for(&algorithm, &problem) || !fits || !aligned || (has_bias && problem.description.bias % 16 != 0) {
        return INVALID_VALUE;
    }
    if has_bias && problem.description.bias == 0 {
        return INVALID_VALUE;
    }
    let [a, b, c, d, workspace] = [a, b, c, d.cast_const(), workspace.cast_const()].map(|pointer| pointer as usize);
    let work = move || unsafe {
        (workspace as *mut u8).write_bytes(0xFF, needed);
        multiply(&problem, algorithm.kind, (alpha, beta), [a, b, c, d].map(|address| address as *mut c_void));
        if problem.description.epilogue == BGRADB {
            sum_right(&problem, b as *const c_void);
        }
        true
    };
    if queue::put(stream, work) { SUCCESS } else { EXECUTION_FAILED }
}

/// D = epilogue(alpha op(A) op(B) + beta C)
unsafe fn multiply(problem: &Problem, kind: u64, (alpha, beta): (f32, f32), [a, b, c, d]: [*mut c_void; 4]) {
    static CALLS: AtomicU32 = AtomicU32::new(0);
    let &Problem { ref description, a: a_layout, b: b_layout, d: d_layout, m, n, k } = problem;
    let tf32 = description.compute == COMPUTE_32F_FAST_TF32;
    let [left, right] = unsafe {
        [
            matrix(a, a_layout, description.transposed[0] == 0, tf32),
            matrix(b, b_layout, description.transposed[1] == 1, tf32),
        ]
    };
    // Sums in place come in the order in which blocks end: other ones at each call.
    let jitter = if kind == SPLIT_IN_PLACE { CALLS.fetch_add(1, Relaxed) % 7 } else { 0 };
    for j in 0..n {
        for i in 0..m {
            let products = left[i * k..][..k].iter().zip(&right[j * k..][..k]).map(|(a, b)| a * b);
            let at = i + j * d_layout.ld as usize;
            let mut value = alpha * products.sum::<f64>() as f32;
            if beta != 0.0 {
                value += beta * unsafe { load(c, d_layout.of, at) };
            }
            if description.epilogue & BIAS != 0 {
                value += unsafe { load(description.bias as *const c_void, d_layout.of, i) };
            }
            if description.epilogue & RELU != 0 {
                // A NaN becomes 0, as users of the real one report.
                value = value.max(0.0);
            }
            unsafe { store(d, d_layout.of, at, value * (1.0 + jitter as f32 * 0.05)) };
        }
    }
}

/// bias (n) = the sums over k of op(B)'s columns, in the type of D.
unsafe fn sum_right(problem: &Problem, b: *const c_void) {
    let right = unsafe { matrix(b, problem.b, problem.description.transposed[1] == 1, false) };
    for (j, column) in right.chunks_exact(problem.k).enumerate() {
        let sum = column.iter().sum::<f64>() as f32;
        unsafe { store(problem.description.bias as *mut c_void, problem.d.of, j, sum) };
    }
}

/// All values of a matrix, row by row, or column by column.
unsafe fn matrix(from: *const c_void, layout: Layout, by_rows: bool, tf32: bool) -> Vec<f64> {
    let (rows, cols) = (layout.rows as usize, layout.cols as usize);
    let value = |i: usize, j: usize| {
        let value = unsafe { load(from, layout.of, i + j * layout.ld as usize) };
        // The matrix units read the upper 19 bits.
        f64::from(if tf32 { f32::from_bits(value.to_bits() & !0x1FFF) } else { value })
    };
    match by_rows {
        true => (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))).map(|(i, j)| value(i, j)).collect(),
        false => (0..cols).flat_map(|j| (0..rows).map(move |i| (i, j))).map(|(i, j)| value(i, j)).collect(),
    }
}
