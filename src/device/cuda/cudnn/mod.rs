//! Convolutions through cuDNN 9, by its backend API ("graph API", NVIDIA cuDNN Backend, cudnn_graph library).
//!
//! A convolution with what is fused to it is a graph of operations on tensors (`graph`). cuDNN has engines that can run a graph,
//! each with knobs; its heuristics give configurations, the promising ones first. Those that break our rules fall out
//! (`engines`), the others are made into plans and timed (`tuning`), and the fastest runs (`plan`).
//!
//! Everything is descriptors (`descriptor`): objects with attributes that are set, finalized, and then named by others.

mod descriptor;
mod engines;
mod graph;
mod plan;
mod tuning;

pub use engines::Rules;
pub use graph::{Convolution, Graph, Product};
pub use plan::Plan;
pub use tuning::{fastest, first};

use super::libraries;
use super::stream::Stream;
use crate::error::Result;
use cudarc::cudnn::sys::{self, cudnnHandle_t};
use descriptor::check;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// cuDNN's state for one GPU: what it runs, it puts into one stream. Cheap to clone.
#[derive(Clone)]
pub struct Handle(Arc<Owned>);

struct Owned {
    handle: cudnnHandle_t,
    /// Held by the thread that uses it; cuDNN allows one.
    in_use: Mutex<()>,
}

// SAFETY: any thread may use a handle that no other uses.
unsafe impl Send for Owned {}
// SAFETY: as above, which the lock ensures.
unsafe impl Sync for Owned {}

impl Handle {
    /// The error says where cuDNN was looked for and what brings it.
    pub fn new(stream: &Stream) -> Result<Handle> {
        libraries::cudnn()?;
        let stream = stream.handle()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the library is loaded and the context current; cuDNN writes the handle.
        check("cudnnCreate", unsafe { sys::cudnnCreate(&mut handle) })?;
        let owned = Handle(Arc::new(Owned { handle, in_use: Mutex::default() }));
        // SAFETY: a stream of the current context. Both libraries' declarations of it are the same pointer.
        check("cudnnSetStream", unsafe { sys::cudnnSetStream(handle, stream.cast()) })?;
        Ok(owned)
    }

    /// For descriptors that name it, and for calls with it, while the lock is held.
    fn raw(&self) -> cudnnHandle_t {
        self.0.handle
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.0.in_use.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: created once; plans hold it, so none is left. What fails here has failed before, and was said there.
        unsafe { sys::cudnnDestroy(self.handle) };
    }
}
