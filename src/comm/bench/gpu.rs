//! An all-reduce by NCCL, of data that lies on the GPU meanwhile.

use crate::comm::nccl::Nccl;
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
        unsafe { self.nccl.sum(self.values(bytes), &self.stream) }?;
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
