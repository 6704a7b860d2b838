//! What a step decides about itself on the GPU: whether it is halted, and by what the loss is scaled. It lies in device memory,
//! where kernels find it, so that the host need not wait for them to know.

use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::Value;
use crate::device::{Arena, Place, Slice, SliceMut};
use crate::error::Result;
use crate::optim::loss_scale::LossScale;
use std::mem::offset_of;
use std::ops::Range;

pub struct Control {
    gpu: Gpu,
    memory: Arena,
}

/// As in optim.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Words {
    halt: u32,
    scale: f32,
    good_steps: u32,
    skipped: u32,
    skipped_in_a_row: u32,
    broken: u32,
}

impl Value for Words {
    const NAME: &'static str = "Control";
}

impl Control {
    pub(super) fn new(gpu: &Gpu, scale: LossScale) -> Result<Control> {
        let control = Control { gpu: gpu.clone(), memory: gpu.allocate(size_of::<Words>())? };
        control.set_loss_scale(scale)?;
        Ok(control)
    }

    /// The halt word, a u32: while it is not 0, updates change nothing. A kernel that finds something with which the
    /// parameters must not be updated writes it; `Update::begin` clears it. All in the order of the compute stream, and behind
    /// the last loss in that of others which wait for it.
    pub fn halt(&self) -> SliceMut<'_> {
        // SAFETY: used by one stream after the other, as said.
        unsafe { self.memory.slice_mut(word(offset_of!(Words, halt))) }
    }

    /// The loss's scale, an f32; 1 where gradients are not in fp16. It stays during a step.
    pub fn scale(&self) -> Slice<'_> {
        // SAFETY: as above.
        unsafe { self.memory.slice(word(offset_of!(Words, scale))) }
    }

    /// A u32 that is not 0 once an update has made a parameter that is not finite. A ReLU may hide that from the loss, so the
    /// loss's kernel looks here.
    pub fn broken(&self) -> Slice<'_> {
        // SAFETY: as above; updates write it, and the compute stream has waited for them.
        unsafe { self.memory.slice(word(offset_of!(Words, broken))) }
    }

    pub(super) fn words(&self) -> SliceMut<'_> {
        // SAFETY: as above.
        unsafe { self.memory.slice_mut(0..self.memory.bytes()) }
    }

    /// Between steps. Waits for the GPU.
    pub fn loss_scale(&self) -> Result<LossScale> {
        let mut words: Words = bytemuck::Zeroable::zeroed();
        // SAFETY: the words' own bytes, for the time of the call.
        let to = unsafe { SliceMut::from_raw(Place::Host, &raw mut words as usize, size_of::<Words>()) };
        self.gpu.compute().copy_and_wait(self.words().into_shared(), to)?;
        let Words { scale, good_steps, skipped, skipped_in_a_row, .. } = words;
        Ok(LossScale { scale, good_steps, skipped, skipped_in_a_row })
    }

    /// Between steps.
    pub fn set_loss_scale(&self, to: LossScale) -> Result<()> {
        let LossScale { scale, good_steps, skipped, skipped_in_a_row } = to;
        let words = Words { halt: 0, scale, good_steps, skipped, skipped_in_a_row, broken: 0 };
        // SAFETY: as above.
        let from = unsafe { Slice::from_raw(Place::Host, &raw const words as usize, size_of::<Words>()) };
        self.gpu.compute().copy_and_wait(from, self.words())
    }
}

fn word(offset: usize) -> Range<usize> {
    offset..offset + 4
}
