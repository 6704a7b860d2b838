//! Matrix products through cuBLASLt: planned once, then executed with pointers alone.
//!
//! Matrices of this program are row by row, cuBLASLt's are column by column. Byte for byte, a row-major (r, c) matrix is the
//! column-major (c, r) matrix that is its transpose, both with lines of c values. So what is wanted is, transposed,
//!
//! ```text
//! row-major      C (m, n)    =  L (m, k)    R (k, n)
//! column-major   C^T (n, m)  =  R^T (n, k)  L^T (k, m)
//! ```
//!
//! and cuBLASLt is given R as its A, L as its B and C as its D, with the lengths of each exchanged; no byte moves. A matrix that
//! is transposed here (stored as (k, m) or (n, k)) is transposed there. cuBLASLt adds one bias to each row of its D: a column
//! of C, so a unit of a layer. Its BGRADB sums op(B) over k: here, the rows of op(L).
//!
//! A plan asks the library once for algorithms that fit and keeps the fastest (`tuning`). Left out are those that split k and
//! sum the parts in place, whose order is that in which blocks end, and those that sum parts in 16 bits; so a plan gives equal
//! bits at each execution. An execution allocates nothing and asks for no heuristic, as capturing a step into a CUDA graph
//! demands; only the first one after the number of samples has changed asks whether the algorithm still fits.

mod handles;
mod tuning;

use super::Gpu;
use super::kernels::Element;
use crate::device::{Slice, SliceMut};
use crate::error::{Error, Result};
use cudarc::cublaslt::sys;
use handles::{Layout, Library, Operation, Preference, check};
use std::fmt;
use sys::cublasStatus_t as Status;
use tuning::Algorithm;

/// Where a workspace has to begin.
const WORKSPACE_ALIGNMENT: usize = 256;
/// Every matrix and bias begins at a multiple of so many values, as the arenas lay them out.
const ALIGNMENT_VALUES: usize = 16;
/// Of scratch, at most, that a product needs.
pub const MOST_WORKSPACE_BYTES: usize = tuning::MOST_WORKSPACE + WORKSPACE_ALIGNMENT;
/// Algorithms that are tried.
const CANDIDATES: usize = 8;
/// What is done to C on its way to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    None,
    Relu,
    /// Adds a bias (n), which has the type of C.
    Bias,
    BiasRelu,
    /// Also writes the sums of op(L) over k, (m), in the type of C, where the bias is given otherwise.
    SumLeft,
}

/// C (m, n) = op(L) (m, k) op(R) (k, n), all of them dense.
#[derive(Clone, Debug)]
pub struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// L is stored as (k, m).
    pub transpose_left: bool,
    /// R is stored as (n, k).
    pub transpose_right: bool,
    /// Of L and R.
    pub factors: Element,
    /// Of C.
    pub result: Element,
    /// Whether factors in f32 may be cut to TF32's 10 bits behind the point, which matrix units multiply.
    pub tf32: bool,
    pub epilogue: Epilogue,
}

/// The buffers of one execution.
pub struct Operands<'a> {
    pub left: Slice<'a>,
    pub right: Slice<'a>,
    pub result: SliceMut<'a>,
    /// Address of the bias, or of the sums; 0 where the epilogue has none.
    pub bias: usize,
    /// `Matmul::workspace_bytes`.
    pub workspace: SliceMut<'a>,
}

/// A planned product. The rows in which L is stored are samples, of which an execution may have fewer.
pub struct Matmul {
    gpu: Gpu,
    library: &'static Library,
    product: Product,
    operation: Operation,
    left: Layout,
    right: Layout,
    result: Layout,
    /// The one chosen for the greatest number of samples.
    best: Algorithm,
    /// What the layouts and `algorithm` are set to.
    samples: usize,
    algorithm: Algorithm,
}

impl Matmul {
    /// The error may be that the library has no algorithm for it. Waits for the GPU's stream; not for use within a step.
    pub fn new(gpu: &Gpu, product: &Product) -> Result<Matmul> {
        // The library takes the GPU that is this thread's current one.
        gpu.compute().handle()?;
        let library = Library::get()?;
        let operation = Operation::new(product)?;
        let [left, right, result] = product.stored();
        let mut plan = Matmul {
            gpu: gpu.clone(),
            library,
            operation,
            left: Layout::new(product.factors, left)?,
            right: Layout::new(product.factors, right)?,
            result: Layout::new(product.result, result)?,
            best: NO_ALGORITHM,
            samples: left.0,
            algorithm: NO_ALGORITHM,
            product: product.clone(),
        };
        plan.best = plan.chosen()?;
        plan.algorithm = plan.best;
        Ok(plan)
    }

    /// Of scratch memory that `run` needs, at any address.
    pub fn workspace_bytes(&self) -> usize {
        match self.best.workspace {
            0 => 0,
            bytes => bytes + WORKSPACE_ALIGNMENT,
        }
    }

    /// Enqueues the product of `samples` on the compute stream.
    pub fn run(&mut self, samples: usize, operands: Operands<'_>) -> Result<()> {
        self.gpu.compute().handle()?;
        self.fit(samples)?;
        let stored = self.product.with_samples(samples).stored();
        let factors = self.product.factors;
        let matrices = [
            (operands.left.bytes(), factors, stored[0]),
            (operands.right.bytes(), factors, stored[1]),
            (operands.result.bytes(), self.product.result, stored[2]),
        ];
        for (bytes, values, (rows, columns)) in matrices {
            assert!(bytes >= rows * columns * values.bytes(), "{bytes} bytes for ({rows}, {columns}) in {values:?}");
        }
        assert_eq!(operands.bias != 0, self.product.epilogue.has_bias());
        assert!(operands.workspace.bytes() >= self.workspace_bytes());
        let addresses = [operands.left.address(), operands.right.address(), operands.result.address()];
        let workspace = operands.workspace.address().next_multiple_of(WORKSPACE_ALIGNMENT);
        self.execute(&self.algorithm.handle, addresses, operands.bias, (workspace, self.best.workspace))
    }
}

impl Matmul {
    /// Sets the lengths to those of `samples`, and an algorithm that can do them: the chosen one, if it can.
    fn fit(&mut self, samples: usize) -> Result<()> {
        if samples == self.samples {
            return Ok(());
        }
        let [left, right, result] = self.product.with_samples(samples).stored();
        self.left.set(left)?;
        self.right.set(right)?;
        self.result.set(result)?;
        self.algorithm = match self.can(&self.best, self.best.workspace) {
            true => self.best,
            false => {
                let others = self.candidates(self.best.workspace)?;
                let what = || format!("cuBLASLt has no algorithm for {}", self.product.with_samples(samples));
                others.into_iter().next().ok_or_else(|| Error::device(what()))?
            }
        };
        self.samples = samples;
        Ok(())
    }

    /// Whether an algorithm can do what the layouts say with so many bytes of workspace.
    fn can(&self, algorithm: &Algorithm, workspace: usize) -> bool {
        let mut result = no_heuristic();
        // SAFETY: all handles are alive, and the result is written before it is read.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.library.handle(),
                self.operation.handle(),
                self.right.handle(),
                self.left.handle(),
                self.result.handle(),
                self.result.handle(),
                &algorithm.handle,
                &mut result,
            )
        };
        let success = Status::CUBLAS_STATUS_SUCCESS;
        status == success && result.state == success && result.workspaceSize <= workspace
    }

    /// What the library's heuristic offers, the best first by its estimate.
    fn candidates(&self, workspace: usize) -> Result<Vec<Algorithm>> {
        let alignment = |values: Element| (ALIGNMENT_VALUES * values.bytes()) as u32;
        let preference = Preference::new(workspace, alignment(self.product.factors), alignment(self.product.result))?;
        let (mut results, mut count) = ([no_heuristic(); CANDIDATES], 0);
        // SAFETY: all handles are alive, and there is room for so many results.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.library.handle(),
                self.operation.handle(),
                self.right.handle(),
                self.left.handle(),
                self.result.handle(),
                self.result.handle(),
                preference.handle(),
                CANDIDATES as i32,
                results.as_mut_ptr(),
                &mut count,
            )
        };
        // Which of the two an epilogue gets that a version does not have for these types is not documented.
        if matches!(status, Status::CUBLAS_STATUS_INVALID_VALUE | Status::CUBLAS_STATUS_NOT_SUPPORTED) {
            tracing::debug!(
                "cuBLASLt offers nothing for {} with {:?}: {status:?}",
                self.product,
                self.product.epilogue
            );
            return Ok(Vec::new());
        }
        check("cublasLtMatmulAlgoGetHeuristic", status).map_err(|error| error.context(&self.product))?;
        let usable = |result: &sys::cublasLtMatmulHeuristicResult_t| {
            result.state == Status::CUBLAS_STATUS_SUCCESS && result.workspaceSize <= workspace
        };
        let found = results.into_iter().take(count as usize).filter(usable);
        Ok(found.map(|result| Algorithm { handle: result.algo, workspace: result.workspaceSize }).collect())
    }

    /// Enqueues one execution over what the layouts say.
    fn execute(
        &self,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        [left, right, result]: [usize; 3],
        bias: usize,
        (workspace, workspace_bytes): (usize, usize),
    ) -> Result<()> {
        static ONE: f32 = 1.0;
        static ZERO: f32 = 0.0;
        if bias != 0 {
            self.operation.set_bias(bias)?;
        }
        // SAFETY: all handles are alive; the caller has memory of the layouts' lengths at these addresses.
        let status = unsafe {
            sys::cublasLtMatmul(
                self.library.handle(),
                self.operation.handle(),
                (&raw const ONE).cast(),
                right as *const _,
                self.right.handle(),
                left as *const _,
                self.left.handle(),
                (&raw const ZERO).cast(),
                result as *const _,
                self.result.handle(),
                result as *mut _,
                self.result.handle(),
                algorithm,
                workspace as *mut _,
                workspace_bytes,
                self.gpu.compute().handle()?.cast(),
            )
        };
        check("cublasLtMatmul", status).map_err(|error| error.context(&self.product))
    }
}

/// Before one is chosen.
const NO_ALGORITHM: Algorithm = Algorithm { handle: sys::cublasLtMatmulAlgo_t { data: [0; 8] }, workspace: 0 };

/// Before the library has written it.
fn no_heuristic() -> sys::cublasLtMatmulHeuristicResult_t {
    sys::cublasLtMatmulHeuristicResult_t {
        algo: NO_ALGORITHM.handle,
        workspaceSize: 0,
        state: Status::CUBLAS_STATUS_NOT_SUPPORTED,
        wavesCount: 0.0,
        reserved: [0; 4],
    }
}

impl Product {
    /// Rows and columns of L, R and C in memory.
    fn stored(&self) -> [(usize, usize); 3] {
        let &Product { m, n, k, transpose_left, transpose_right, .. } = self;
        let left = if transpose_left { (k, m) } else { (m, k) };
        let right = if transpose_right { (n, k) } else { (k, n) };
        [left, right, (m, n)]
    }

    fn with_samples(&self, samples: usize) -> Product {
        match self.transpose_left {
            true => Product { k: samples, ..self.clone() },
            false => Product { m: samples, ..self.clone() },
        }
    }
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Product { m, n, k, factors, result, .. } = self;
        write!(f, "the product of ({m}, {k}) and ({k}, {n}) in {factors:?} to {result:?}")
    }
}

impl Epilogue {
    fn has_bias(self) -> bool {
        !matches!(self, Epilogue::None | Epilogue::Relu)
    }
}
