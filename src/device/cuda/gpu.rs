//! The GPU that this rank works on.

use super::cudnn;
use super::kernels::{Element, Module, Source};
use super::probe::{self, Device};
use super::registered::Registered;
use super::stream::{Event, Stream};
use crate::device::{Arena, Place};
use crate::error::{Error, Kind, Result};
use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdeviceptr, CUevent_flags, CUresult};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// A handle that is cheap to clone. The GPU is given back when the last one, and all memory on it, is gone.
#[derive(Clone)]
pub struct Gpu(Arc<Parts>);

struct Parts {
    device: Device,
    context: Arc<Context>,
    compute: Stream,
    copies: Stream,
    modules: Mutex<HashMap<(&'static str, Element), Arc<Module>>>,
    cudnn: OnceLock<Result<cudnn::Handle>>,
    /// See `set_plan`.
    plan: OnceLock<String>,
}

/// Memory of a GPU, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    pub free: usize,
    pub total: usize,
}

/// The part of a GPU's memory that a workspace may be at most. Not of what is free: a choice must not depend on the neighbours.
pub const WORKSPACE_PART: usize = 16;

/// The one GPU of this process.
static RANKS_GPU: OnceLock<Gpu> = OnceLock::new();

impl Gpu {
    /// Takes the GPU with this number for this rank, which has one: `Place::Cuda` is its memory. Called once, before all that
    /// works on it.
    pub fn take(ordinal: usize) -> Result<Gpu> {
        let gpu = Gpu::open(ordinal)?;
        assert!(RANKS_GPU.set(gpu.clone()).is_ok(), "this rank has taken a GPU before");
        Ok(gpu)
    }

    /// The GPU that this rank has taken.
    pub fn of_this_rank() -> Result<Gpu> {
        let none = || Error::internal("memory of a GPU was asked for before this rank took one");
        RANKS_GPU.get().cloned().ok_or_else(none)
    }

    /// Its primary context, the one that CUDA's libraries use, and two streams.
    fn open(ordinal: usize) -> Result<Gpu> {
        let device = probe::gpus()?.device(ordinal)?.clone();
        let context = Arc::new(Context::retain(ordinal).map_err(|error| error.context(&device))?);
        let (compute, copies) = (Stream::new(&context)?, Stream::new(&context)?);
        Ok(Gpu(Arc::new(Parts {
            device,
            context,
            compute,
            copies,
            modules: Mutex::default(),
            cudnn: OnceLock::new(),
            plan: OnceLock::new(),
        })))
    }

    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The stream of forward and backward.
    pub fn compute(&self) -> &Stream {
        &self.0.compute
    }

    /// The stream of copies that go on beside them.
    pub fn copies(&self) -> &Stream {
        &self.0.copies
    }

    /// One more stream.
    pub fn stream(&self) -> Result<Stream> {
        Stream::new(&self.0.context)
    }

    /// Zeroed memory of the GPU.
    pub fn allocate(&self, bytes: usize) -> Result<Arena> {
        self.allocate_if_free(bytes)?.ok_or_else(|| self.out_of_memory(bytes))
    }

    /// The same; None where it is not to be had.
    pub fn allocate_if_free(&self, bytes: usize) -> Result<Option<Arena>> {
        self.0.context.bind()?;
        let mut address = 0;
        // SAFETY: the driver writes the address. It refuses a length of 0.
        let code = unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) };
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Ok(None);
        }
        super::call::check("cuMemAlloc", code)?;
        self.0.context.allocated.fetch_add(bytes, Relaxed);
        let owner = DeviceMemory { address, bytes, context: self.0.context.clone() };
        // SAFETY: as many bytes that the owner frees; the driver aligns to 256 bytes.
        let arena = unsafe { Arena::from_raw(Place::Cuda, address as usize, bytes, Box::new(owner)) };
        // SAFETY: nobody else knows the memory, and the wait is over before anybody does.
        unsafe { self.compute().zero(arena.slice_mut(0..bytes)) }?;
        self.compute().wait()?;
        Ok(Some(arena))
    }

    /// An error where less than so many bytes are free.
    pub fn check_room(&self, bytes: usize) -> Result<()> {
        if bytes <= self.memory()?.free { Ok(()) } else { Err(self.out_of_memory(bytes)) }
    }

    /// What is said behind an error that memory is out: of the whole that is planned, and of what would fit. Once.
    pub fn set_plan(&self, text: String) {
        assert!(self.0.plan.set(text).is_ok(), "this rank has planned before");
    }

    /// Zeroed host memory that the GPU copies from and to without the CPU. It cannot be swapped out, so it is for staging.
    pub fn allocate_pinned(&self, bytes: usize) -> Result<Arena> {
        self.0.context.bind()?;
        let mut address = ptr::null_mut();
        // Without flags: memory that the CPU caches, since it reads it too.
        // SAFETY: the driver writes the address.
        let allocated = unsafe { call!(cuMemHostAlloc(&mut address, bytes.max(1), 0)) };
        allocated.map_err(|error| error.context(format_args!("{} of pinned host memory", mib(bytes))))?;
        let owner = PinnedMemory { address: address as usize, context: self.0.context.clone() };
        // SAFETY: as many bytes, which nobody else knows.
        unsafe { ptr::write_bytes(address.cast::<u8>(), 0, bytes) };
        // SAFETY: the owner frees them; they are aligned to pages.
        Ok(unsafe { Arena::from_raw(Place::Host, address as usize, bytes, Box::new(owner)) })
    }

    /// Host memory of something else's making, pinned for as long as what is returned lives. Fails where a limit on locked
    /// memory, or the kind of memory, forbids it.
    pub fn register(&self, arena: &Arc<Arena>) -> Result<Registered> {
        Registered::new(&self.0.context, arena)
    }

    /// Bytes that this process has allocated and not given back.
    pub fn allocated(&self) -> usize {
        self.0.context.allocated.load(Relaxed)
    }

    /// What is free now, for all processes on this GPU, and what there is.
    pub fn memory(&self) -> Result<Memory> {
        self.0.context.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the driver writes both.
        unsafe { call!(cuMemGetInfo_v2(&mut free, &mut total)) }?;
        Ok(Memory { free, total })
    }

    /// An event for order between streams.
    pub fn event(&self) -> Result<Event> {
        Event::new(&self.0.context, CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// An event with a time.
    pub fn timer(&self) -> Result<Event> {
        Event::new(&self.0.context, CUevent_flags::CU_EVENT_DEFAULT)
    }

    /// A source's kernels for values of this type: compiled the first time, on this machine or in this process.
    pub fn module(&self, source: &'static Source, element: Element) -> Result<Arc<Module>> {
        let mut modules = self.0.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(&(source.name, element)) {
            return Ok(module.clone());
        }
        let module = Arc::new(Module::load(source, element, &self.0.device.architecture(), &self.0.context)?);
        modules.insert((source.name, element), module.clone());
        Ok(module)
    }

    /// cuDNN on the compute stream, loaded when it is first asked for.
    pub fn cudnn(&self) -> Result<cudnn::Handle> {
        self.0.cudnn.get_or_init(|| cudnn::Handle::new(self.compute())).clone()
    }

    fn out_of_memory(&self, bytes: usize) -> Error {
        let left = match self.memory() {
            Ok(Memory { free, total }) => format!("{} of {} are free", mib(free), mib(total)),
            Err(error) => format!("what is free cannot be said ({error})"),
        };
        let message = format!(
            "out of memory on {}: {} were asked for at once, {left}; {}",
            self.device(),
            mib(bytes),
            self.0.plan.get().map_or("take a smaller batch, or end what else runs there (nvidia-smi)", |plan| plan)
        );
        Error::new(Kind::Device, message)
    }
}

/// A GPU's primary context. Each thread's calls go to the context that is current there.
pub(super) struct Context {
    handle: CUcontext,
    device: CUdevice,
    /// Bytes.
    allocated: AtomicUsize,
}

// SAFETY: a context may be current in several threads.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    fn retain(ordinal: usize) -> Result<Context> {
        let (device, mut handle) = (probe::handle(ordinal)?, ptr::null_mut());
        // SAFETY: the driver writes the handle.
        unsafe { call!(cuDevicePrimaryCtxRetain(&mut handle, device)) }?;
        Ok(Context { handle, device, allocated: AtomicUsize::new(0) })
    }

    /// Makes it the current one of this thread, which costs some nanoseconds.
    pub(super) fn bind(&self) -> Result<()> {
        // SAFETY: the context lives until `drop`.
        unsafe { call!(cuCtxSetCurrent(self.handle)) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by `retain`; nothing of it is left.
        let _ = unsafe { call!(cuDevicePrimaryCtxRelease_v2(self.device)) };
    }
}

struct DeviceMemory {
    address: CUdeviceptr,
    bytes: usize,
    context: Arc<Context>,
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // What fails here has failed before, and was said there.
        let _ = self.context.bind();
        // SAFETY: allocated by `allocate_if_free`, freed once.
        let _ = unsafe { call!(cuMemFree_v2(self.address)) };
        self.context.allocated.fetch_sub(self.bytes, Relaxed);
    }
}

struct PinnedMemory {
    address: usize,
    context: Arc<Context>,
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        // As above.
        let _ = self.context.bind();
        // SAFETY: allocated by `allocate_pinned`, freed once.
        let _ = unsafe { call!(cuMemFreeHost(self.address as *mut c_void)) };
    }
}

/// For people.
pub fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
