//! What `loss_scale` says is to be done when gradients are summed.

use super::control::{Control, Words};
use super::{Chunk, Measured, blocks, whole};
use crate::device::cuda::Stream;
use crate::device::cuda::kernels::{Grid, Kernel, Module, Read, Write};
use crate::error::Result;
use crate::optim::loss_scale::Scaling;
use std::sync::Arc;

pub struct Overflow {
    scaling: Scaling,
    find: Find,
    settle: Kernel<(Write<Words>, u32)>,
}

/// grads, chunks, running, control
type Find = Kernel<(Read<f32>, Read<Chunk>, Read<f32>, Write<Words>)>;

impl Overflow {
    pub fn new(module: &Arc<Module>, scaling: Scaling) -> Result<Overflow> {
        Ok(Overflow { scaling, find: module.kernel("find_overflow")?, settle: module.kernel("settle_scale")? })
    }

    pub fn is_fixed(&self) -> bool {
        self.scaling.growth_every == 0
    }

    /// Halts the step if a gradient is not finite, and settles the scale of the next one.
    ///
    /// # Safety
    /// The gradients stay allocated, and nobody else writes them, until the stream has come past this.
    pub unsafe fn judge(&self, stream: &Stream, grads: Measured<'_>, control: &Control) -> Result<()> {
        let chunks = grads.chunks.bytes() / size_of::<Chunk>();
        let one = Grid { blocks: [1; 3], threads: [1; 3], shared_bytes: 0 };
        let found = (
            grads.values.into(),
            whole(grads.chunks).into(),
            whole(grads.running).into(),
            (&mut control.words()).into(),
        );
        // SAFETY: gradients of all chunks; the caller vouches for them.
        unsafe {
            self.find.launch(stream, blocks(chunks), found)?;
            self.settle.launch(stream, one, ((&mut control.words()).into(), self.scaling.growth_every))
        }
    }
}
