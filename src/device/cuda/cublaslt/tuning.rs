//! Which of several algorithms a plan uses: the fastest, by the GPU's clock, over memory of the real lengths.
//!
//! Two may be so close that now one and now the other comes out first, and their sums are in different orders. So the choice is
//! written down (`choices`) for later runs and the other ranks of the host, which then compute the same bits.

use super::handles::REDUCTIONS;
use super::{ALIGNMENT_VALUES, Matmul, Product, WORKSPACE_ALIGNMENT};
use crate::device::Arena;
use crate::device::cuda::choices::{self, untimed};
use crate::device::cuda::kernels::Element;
use crate::device::cuda::{Gpu, libraries};
use crate::error::{Error, Result};
use cudarc::cublaslt::sys;

/// Bytes of workspace that an algorithm may use: what NVIDIA recommends for Hopper.
pub const MOST_WORKSPACE: usize = 32 << 20;
/// Timed executions of each algorithm.
const RUNS: usize = 5;

/// A way to compute a product, of the library's version that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Algorithm {
    pub handle: sys::cublasLtMatmulAlgo_t,
    /// Bytes that it needs.
    pub workspace: usize,
}

impl Matmul {
    /// The algorithm to use. The error may be that there is none.
    pub(super) fn chosen(&self) -> Result<Algorithm> {
        // The heuristic does not follow the pointer, but expects of later ones what it sees of its alignment.
        self.operation.set_bias(ALIGNMENT_VALUES * self.product.result.bytes())?;
        let key = self.key()?;
        let usable = |text: &str| Algorithm::parse(text).filter(|standing| self.can(standing, standing.workspace));
        if let Some(standing) = choices::read(&key).and_then(|text| usable(&text)) {
            return Ok(standing);
        }
        let candidates = self.candidates(MOST_WORKSPACE)?;
        let Some(fastest) = self.fastest(&candidates)? else {
            let least = candidates.into_iter().min_by_key(|candidate| candidate.workspace);
            let least = least.ok_or_else(|| self.no_algorithm(None))?;
            let (device, product) = (self.gpu.device(), &self.product);
            tracing::warn!("{}", untimed(device, product, "the algorithm"));
            return Ok(least);
        };
        let standing = choices::keep_first(&key, &fastest.text(), |text| usable(text).is_some());
        Ok(usable(&standing).unwrap_or(fastest))
    }

    /// All that the choice depends on.
    fn key(&self) -> Result<String> {
        let device = self.gpu.device();
        Ok(format!(
            "cuBLASLt {} on {} ({}): {:?}, alignment {ALIGNMENT_VALUES}, workspace {MOST_WORKSPACE}, reductions {REDUCTIONS}",
            libraries::cublas_lt()?.version,
            device.name,
            device.architecture(),
            self.product
        ))
    }

    /// None where there is no memory to try them in.
    fn fastest(&self, candidates: &[Algorithm]) -> Result<Option<Algorithm>> {
        let workspace = candidates.iter().map(|candidate| candidate.workspace).max().unwrap_or(0);
        let Some(trial) = Trial::new(&self.gpu, &self.product, workspace)? else { return Ok(None) };
        // An algorithm that cannot be run has been offered by mistake.
        let (mut timed, mut failure) = (Vec::new(), None);
        for candidate in candidates {
            match self.time(candidate, &trial) {
                Ok(ms) => timed.push((ms, candidate)),
                Err(error) => failure = Some(error),
            }
        }
        let fastest = timed.into_iter().min_by(|(a, _), (b, _)| a.total_cmp(b));
        let (ms, algorithm) = fastest.ok_or_else(|| self.no_algorithm(failure))?;
        tracing::debug!("{}: {ms:.3} ms with {} bytes of workspace", self.product, algorithm.workspace);
        Ok(Some(*algorithm))
    }

    /// With the failure of the last one that was tried, if there was one.
    fn no_algorithm(&self, failure: Option<Error>) -> Error {
        let last = failure.map_or(String::new(), |error| format!(" (the last one tried: {error})"));
        let (product, device) = (&self.product, self.gpu.device());
        Error::lacking(format!("cuBLASLt has no algorithm for {product} on {device}{last}: install a newer one"))
    }

    /// The shortest of some executions after a first one, in milliseconds.
    fn time(&self, algorithm: &Algorithm, trial: &Trial) -> Result<f32> {
        let (stream, start, end) = (self.gpu.compute(), self.gpu.timer()?, self.gpu.timer()?);
        let run = || self.execute(&algorithm.handle, trial.matrices, trial.bias, trial.workspace);
        run()?;
        (0..RUNS).try_fold(f32::INFINITY, |shortest, _| {
            stream.record(&start)?;
            run()?;
            stream.record(&end)?;
            end.wait()?;
            Ok(shortest.min(end.ms_since(&start)?))
        })
    }
}

/// "This structure can be trivially serialized and later restored for use with the same version of cuBLAS library" (cuBLAS
/// documentation, cublasLtMatmulAlgo_t).
impl Algorithm {
    fn text(&self) -> String {
        let words = self.handle.data.iter().map(|word| format!(" {word:016x}")).collect::<String>();
        format!("{}{words}", self.workspace)
    }

    fn parse(text: &str) -> Option<Algorithm> {
        let (workspace, words) = text.split_once(' ')?;
        let words = words.split(' ').map(|word| u64::from_str_radix(word, 16));
        let data = words.collect::<Result<Vec<_>, _>>().ok()?.try_into().ok()?;
        Some(Algorithm { handle: sys::cublasLtMatmulAlgo_t { data }, workspace: workspace.parse().ok()? })
    }
}

/// Memory for trying algorithms, zeroed.
struct Trial {
    _memory: Arena,
    /// L, R and C.
    matrices: [usize; 3],
    bias: usize,
    /// Address and bytes.
    workspace: (usize, usize),
}

impl Trial {
    /// None where there is no room for it.
    fn new(gpu: &Gpu, product: &Product, workspace: usize) -> Result<Option<Trial>> {
        let bytes = |element: Element, (rows, columns)| element.bytes() * rows * columns;
        let [left, right, result] = product.stored();
        // A bias is no longer than C's columns, or L's rows.
        let bias = (1, product.n.max(product.m));
        let lengths = [
            bytes(product.factors, left),
            bytes(product.factors, right),
            bytes(product.result, result),
            bytes(product.result, bias),
            workspace,
        ];
        let mut end = 0;
        let offsets = lengths.map(|bytes| {
            let start = end;
            end += bytes.next_multiple_of(WORKSPACE_ALIGNMENT);
            start
        });
        let Some(memory) = gpu.allocate_if_free(end + WORKSPACE_ALIGNMENT)? else { return Ok(None) };
        let start = memory.address().next_multiple_of(WORKSPACE_ALIGNMENT);
        let [left, right, result, bias, behind] = offsets.map(|offset| start + offset);
        Ok(Some(Trial { _memory: memory, matrices: [left, right, result], bias, workspace: (behind, workspace) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_algorithm_goes_to_text_and_back() {
        let data = [1, u64::MAX, 0, 3, 4, 5, 0xabc, 7];
        let algorithm = Algorithm { handle: sys::cublasLtMatmulAlgo_t { data }, workspace: 4096 };
        assert_eq!(Algorithm::parse(&algorithm.text()), Some(algorithm));
        for damaged in ["", "4096", "4096 1 2", "x 0 0 0 0 0 0 0 0", "1 0 0 0 0 0 0 0 g"] {
            assert_eq!(Algorithm::parse(damaged), None, "{damaged}");
        }
    }
}
