//! The net's outputs over a set, for `trainer eval --logits`: to look into, or to hold against another program's.

use crate::atomic_file;
use crate::comm::Communicator;
use crate::data::{Batch, Dataset};
use crate::device::SliceMut;
use crate::error::{Context, Kind, Result};
use safetensors::tensor::{Dtype, TensorView};
use std::path::Path;

/// A row of outputs for each sample of a set, in the set's order, on every rank: so many f32 in memory. A rank fills in
/// the rows of its samples, and the sum over ranks is the whole.
pub struct Logits {
    values: Vec<f32>,
    outputs: usize,
}

impl Logits {
    pub fn new(samples: usize, outputs: usize) -> Result<Logits> {
        let (len, mut values) = (samples.saturating_mul(outputs), Vec::new());
        let what = || format!("{outputs} outputs for each of {samples} samples");
        values.try_reserve_exact(len).or_kind(Kind::Device, what())?;
        values.resize(len, 0.0);
        Ok(Logits { values, outputs })
    }

    /// `outputs` (batch, outputs)
    pub fn keep(&mut self, batch: &Batch, outputs: &[f32]) {
        for (&index, row) in batch.indices.iter().zip(outputs.chunks_exact(self.outputs)) {
            self.values[index as usize * self.outputs..][..self.outputs].copy_from_slice(row);
        }
    }

    /// Writes `logits` (samples, outputs) f32 and `labels` (samples) i64 as safetensors, on rank 0. Collective.
    pub fn save(mut self, path: &Path, set: &dyn Dataset, comm: &mut dyn Communicator) -> Result<()> {
        comm.all_reduce(SliceMut::from(&mut self.values[..]))?;
        if comm.rank() != 0 {
            return Ok(());
        }
        let labels: Vec<i64> = (0..set.len()).map(|index| i64::from(set.label(index))).collect();
        let view = |dtype, shape, bytes| TensorView::new(dtype, shape, bytes).expect("values fill their shape");
        let tensors = [
            ("logits", view(Dtype::F32, vec![set.len(), self.outputs], bytemuck::cast_slice(&self.values))),
            ("labels", view(Dtype::I64, vec![set.len()], bytemuck::cast_slice(&labels))),
        ];
        let what = || format!("writing {}", path.display());
        let file = safetensors::serialize(tensors, None).or_kind(Kind::Internal, what())?;
        atomic_file::replace(path, &file).or_kind(Kind::Internal, what())
    }
}
