//! An all-reduce by NCCL, in one or in its two halves, of data that lies on the GPU meanwhile.

use crate::comm::nccl::Nccl;
use crate::device::cuda::nccl::DataType;
use crate::device::cuda::{Gpu, Stream};
use crate::device::{Arena, SliceMut};
use crate::error::Result;

pub struct OnGpu {
    nccl: Nccl,
    stream: Stream,
    memory: Arena,
}

impl OnGpu {
    /// For so many bytes at most, on this rank's GPU.
    pub fn new(nccl: Nccl, bytes: usize) -> Result<OnGpu> {
        let gpu = Gpu::of_this_rank()?;
        Ok(OnGpu { nccl, stream: gpu.stream()?, memory: gpu.allocate(bytes)? })
    }

    pub fn upload(&self, data: SliceMut<'_>) -> Result<()> {
        self.stream.copy_and_wait(data.as_slice(), self.values(data.bytes()))
    }

    /// Of the first so many bytes; returns when the GPU has the sums.
    pub fn all_reduce(&self, bytes: usize) -> Result<()> {
        // SAFETY: waited for here.
        unsafe { self.nccl.all_reduce(self.values(bytes), DataType::Float32, &self.stream) }?;
        self.stream.wait()
    }

    /// The same as a reduce-scatter and an all-gather; so many bytes are equal parts of whole values for all ranks.
    pub fn scatter_and_gather(&self, bytes: usize) -> Result<()> {
        // SAFETY: waited for here.
        unsafe {
            self.nccl.reduce_scatter(self.values(bytes), DataType::Float32, &self.stream)?;
            self.nccl.all_gather(self.values(bytes), &self.stream)?;
        }
        self.stream.wait()
    }

    pub fn download(&self, data: SliceMut<'_>) -> Result<()> {
        self.stream.copy_and_wait(self.values(data.bytes()).into_shared(), data)
    }

    fn values(&self, bytes: usize) -> SliceMut<'_> {
        // SAFETY: one call after the other uses the memory, and waits for the stream.
        unsafe { self.memory.slice_mut(0..bytes) }
    }
}
