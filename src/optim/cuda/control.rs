//! What a step decides about itself on the GPU. It lies in device memory, where kernels find it, so that the host need not wait
//! for them to know.

use crate::device::cuda::Gpu;
use crate::device::{Arena, SliceMut};
use crate::error::Result;

pub struct Control {
    memory: Arena,
}

impl Control {
    pub(super) fn new(gpu: &Gpu) -> Result<Control> {
        Ok(Control { memory: gpu.allocate(size_of::<u32>())? })
    }

    /// The halt word, a u32: while it is not 0, updates change nothing. A kernel that finds something with which the
    /// parameters must not be updated writes it; `Update::begin` clears it. All in the order of the compute stream.
    pub fn halt(&self) -> SliceMut<'_> {
        // SAFETY: used by the compute stream alone, in its order.
        unsafe { self.memory.slice_mut(0..size_of::<u32>()) }
    }
}
