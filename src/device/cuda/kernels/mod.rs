//! Kernels. A `.cu` file stands beside the layer that launches it and is embedded in the program. NVRTC compiles it for the GPU
//! at hand when a layer is built, once: the code is kept in the user's cache (`cache`). Sources include no header of CUDA,
//! only `common.cuh` and, by name, those in `HEADERS`.
//!
//! The values that a layer computes with are of the type `T` in a source, which `Element` chooses: f32, bf16 or f16. A kernel is
//! looked up once, by its name and the types of its arguments, which are held against its declaration in the source:
//!
//! ```text
//! extern "C" __global__ void activation_forward(const T* x, T* y, u32 activation, u64 n)
//!
//! let forward: Kernel<(Read<T>, Write<T>, u32, u64)> = module.kernel("activation_forward")?;
//! unsafe { forward.launch(gpu.compute(), gpu.grid_over(n), (x.into(), y.into(), activation, n as u64)) }?;
//! ```

mod cache;
mod compile;
mod launch;
mod signature;

pub(super) use cache::cache_folder;
pub(super) use compile::check_nvrtc;
pub use compile::{compile, usage};
pub use launch::{Argument, Arguments, Grid, Kernel, Read, T, Value, Write};

use super::gpu::Context;
use super::libraries;
use crate::error::{Error, Result};
use cudarc::driver::sys::{CUfunction, CUmodule};
use std::ffi::CString;
use std::ptr;
use std::sync::Arc;

/// A `.cu` file. `Source { name: "lrn", text: include_str!("lrn.cu") }`
pub struct Source {
    pub name: &'static str,
    pub text: &'static str,
}

/// What a source may include: its name and its text.
pub const HEADERS: [(&str, &str); 5] = [
    ("common.cuh", include_str!("common.cuh")),
    ("activation.cuh", include_str!("../../../model/layers/activation/activation.cuh")),
    ("channel_sums.cuh", include_str!("../../../model/layers/channel_sums/channel_sums.cuh")),
    ("lanes.cuh", include_str!("../../../model/layers/lanes.cuh")),
    ("window.cuh", include_str!("../../../model/layers/window/window.cuh")),
];

/// The type `T` of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    F32,
    Bf16,
    F16,
}

impl Element {
    pub const ALL: [Element; 3] = [Element::F32, Element::Bf16, Element::F16];

    /// Its name in `common.cuh`.
    pub fn name(self) -> &'static str {
        match self {
            Element::F32 => "float",
            Element::Bf16 => "bf16",
            Element::F16 => "f16",
        }
    }

    pub fn bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::Bf16 | Element::F16 => 2,
        }
    }
}

/// A compiled source on the GPU.
pub struct Module {
    handle: CUmodule,
    source: &'static Source,
    context: Arc<Context>,
}

// SAFETY: a module belongs to its context, which any thread may use.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    pub(super) fn load(
        source: &'static Source,
        element: Element,
        architecture: &str,
        context: &Arc<Context>,
    ) -> Result<Module> {
        let nvrtc = libraries::nvrtc()?;
        let driver = libraries::driver()?;
        if nvrtc.version.major > driver.version.major {
            return Err(Error::lacking(format!(
                "NVRTC {} ({}) makes code that a driver for CUDA {} does not take: install NVRTC {}, or a newer driver",
                nvrtc.version,
                nvrtc.path.display(),
                driver.version,
                driver.version.major
            )));
        }
        let image = cache::cubin(source, element, architecture, nvrtc.version)?;
        context.bind()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the image is whole, as its hash says, and is copied by the call.
        let loaded = unsafe { call!(cuModuleLoadData(&mut handle, image.as_ptr().cast())) };
        loaded.map_err(|error| error.context(format_args!("loading {}.cu for {architecture}", source.name)))?;
        Ok(Module { handle, source, context: context.clone() })
    }

    /// The kernel of this name. Its declaration in the source must have these arguments.
    pub fn kernel<A: Arguments>(self: &Arc<Self>, name: &'static str) -> Result<Kernel<A>> {
        signature::check(self.source, name, &A::types());
        let text = CString::new(name).expect("a kernel's name has no zero");
        let mut function: CUfunction = ptr::null_mut();
        self.context.bind()?;
        // SAFETY: the module lives; the driver writes the handle.
        unsafe { call!(cuModuleGetFunction(&mut function, self.handle, text.as_ptr())) }
            .map_err(|error| error.context(format_args!("kernel {name} of {}.cu", self.source.name)))?;
        Ok(Kernel::new(function, name, self.clone()))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // What fails here has failed before, and was said there.
        let _ = self.context.bind();
        // SAFETY: loaded once; its kernels hold it, so none is left.
        let _ = unsafe { call!(cuModuleUnload(self.handle)) };
    }
}
