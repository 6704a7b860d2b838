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

use super::gpu::Context;
use super::libraries;
use super::stream::Stream;
use crate::error::{Error, Result};
use cudarc::cudnn::sys::{
    self, cudnnBackendAttributeName_t as Name, cudnnBackendDescriptorType_t as Kind, cudnnHandle_t,
};
use descriptor::{Descriptor, check};
use std::ffi::c_char;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// cuDNN's state for one GPU: what it runs, it puts into one stream. Cheap to clone.
#[derive(Clone)]
pub struct Handle(Arc<Owned>);

struct Owned {
    device: Device,
    /// Held by the thread that uses it; cuDNN allows one.
    in_use: Mutex<()>,
}

/// Whose engines are asked for.
enum Device {
    Present {
        handle: cudnnHandle_t,
        context: Arc<Context>,
    },
    /// One that is not here: what it would run can be asked.
    Described(Descriptor),
}

// SAFETY: any thread may use a handle that no other uses.
unsafe impl Send for Owned {}
// SAFETY: as above, which the lock ensures.
unsafe impl Sync for Owned {}

impl Handle {
    /// The error says where cuDNN was looked for and what brings it.
    pub fn new(stream: &Stream) -> Result<Handle> {
        libraries::cudnn()?;
        let (context, stream) = (stream.context().clone(), stream.handle()?);
        let mut handle = ptr::null_mut();
        // SAFETY: the library is loaded and the context current; cuDNN writes the handle.
        check("cudnnCreate", unsafe { sys::cudnnCreate(&mut handle) })?;
        let owned = Handle::of(Device::Present { handle, context });
        // SAFETY: a stream of the current context. Both libraries' declarations of it are the same pointer.
        check("cudnnSetStream", unsafe { sys::cudnnSetStream(handle, stream.cast()) })?;
        Ok(owned)
    }

    /// For a GPU with these properties, as CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION has them: so that the choice of engines
    /// can be tried where there is none. Its plans do not run.
    pub fn described(properties: &str) -> Result<Handle> {
        libraries::cudnn()?;
        let characters: Vec<c_char> = properties.bytes().map(|byte| byte as c_char).collect();
        let descriptor = Descriptor::new(Kind::CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, &characters)?
            .finalized()?;
        Ok(Handle::of(Device::Described(descriptor)))
    }

    fn of(device: Device) -> Handle {
        Handle(Arc::new(Owned { device, in_use: Mutex::default() }))
    }

    /// For calls with it, while the lock is held.
    fn raw(&self) -> Result<cudnnHandle_t> {
        match self.0.device {
            Device::Present { handle, .. } => Ok(handle),
            Device::Described(_) => Err(Error::internal("a GPU that is only described runs nothing")),
        }
    }

    /// For this thread, whose current context becomes the handle's: cuDNN works in that of its caller.
    fn lock(&self) -> Result<MutexGuard<'_, ()>> {
        let alone = self.0.in_use.lock().unwrap_or_else(PoisonError::into_inner);
        match &self.0.device {
            Device::Present { context, .. } => context.bind().map(|()| alone),
            Device::Described(_) => Ok(alone),
        }
    }

    /// A graph for this device.
    fn of_graph(&self, graph: Descriptor) -> Result<Descriptor> {
        match &self.0.device {
            Device::Present { handle, .. } => graph.with(Name::CUDNN_ATTR_OPERATIONGRAPH_HANDLE, &[*handle]),
            Device::Described(_) => Ok(graph),
        }
    }

    /// Heuristics for this device, which a graph with a handle tells already.
    fn of_heuristics(&self, heuristics: Descriptor) -> Result<Descriptor> {
        match &self.0.device {
            Device::Present { .. } => Ok(heuristics),
            Device::Described(device) => heuristics.with(Name::CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, &[device.link()]),
        }
    }

    /// A plan for this device.
    fn of_plan(&self, plan: Descriptor) -> Result<Descriptor> {
        match &self.0.device {
            Device::Present { handle, .. } => plan.with(Name::CUDNN_ATTR_EXECUTION_PLAN_HANDLE, &[*handle]),
            Device::Described(device) => plan.with(Name::CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, &[device.link()]),
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if let Device::Present { handle, context } = &self.device {
            // What fails here has failed before, and was said there.
            let _ = context.bind();
            // SAFETY: created once; plans hold it, so none is left.
            unsafe { sys::cudnnDestroy(*handle) };
        }
    }
}
