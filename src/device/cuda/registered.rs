//! Host memory that something else has made, a transport say, and that the GPU copies from and to without the CPU.

use super::gpu::Context;
use crate::device::{Arena, Place};
use crate::error::Result;
use std::ffi::c_void;
use std::sync::Arc;

/// Keeps the pages of an arena where they are: as long as it lives, copies between them and the GPU go on by themselves. Drop it
/// when no stream has such a copy before it.
pub struct Registered {
    arena: Arc<Arena>,
    context: Arc<Context>,
}

impl Registered {
    pub(super) fn new(context: &Arc<Context>, arena: &Arc<Arena>) -> Result<Registered> {
        assert_eq!(arena.place(), Place::Host, "only host memory is registered with a GPU");
        context.bind()?;
        // The driver refuses a length of 0, and memory of none has a page all the same.
        let (address, bytes) = (arena.address() as *mut c_void, arena.bytes().max(1));
        // SAFETY: mapped memory that stays so until `drop`.
        let done = unsafe { call!(cuMemHostRegister_v2(address, bytes, 0)) };
        done.map_err(|error| error.context(format_args!("pinning {bytes} bytes of host memory")))?;
        Ok(Registered { arena: arena.clone(), context: context.clone() })
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // What fails here has failed before, and was said there.
        let _ = self.context.bind();
        // SAFETY: registered by `new`, and still mapped.
        let _ = unsafe { call!(cuMemHostUnregister(self.arena.address() as *mut c_void)) };
    }
}
