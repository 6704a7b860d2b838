//! Calls into the driver: a code that is not success becomes an error with the function, the code's name and its text.

use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUresult};
use std::ffi::{CStr, c_char};
use std::ptr;

/// `call!(cuInit(0))`, in an unsafe block.
macro_rules! call {
    ($function:ident($($argument:expr),* $(,)?)) => {
        $crate::device::cuda::call::check(
            stringify!($function),
            cudarc::driver::sys::$function($($argument),*),
        )
    };
}

/// The names of functions are those of the driver API's reference, without the version that the library adds.
pub fn check(function: &str, code: CUresult) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let function = function.split("_v").next().unwrap_or(function);
    let name = text(sys::cuGetErrorName, code).unwrap_or_else(|| "an unknown error".to_owned());
    let description = text(sys::cuGetErrorString, code).map(|text| format!(", {text}")).unwrap_or_default();
    let advice = advice(code).map(|advice| format!("; {advice}")).unwrap_or_default();
    let text = format!("CUDA's {function} failed with {name} ({}){description}{advice}", code as u32);
    Err(if is_lacking(code) { Error::lacking(text) } else { Error::device(text) })
}

fn text(of: unsafe fn(CUresult, *mut *const c_char) -> CUresult, code: CUresult) -> Option<String> {
    let mut text = ptr::null();
    // SAFETY: the driver sets the pointer to a string of its own that lives as long as it, or to null.
    unsafe {
        let found = of(code, &mut text) == CUresult::CUDA_SUCCESS && !text.is_null();
        found.then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
    }
}

/// Whether no GPU has failed, but this machine has none that this process could use.
fn is_lacking(code: CUresult) -> bool {
    matches!(
        code,
        CUresult::CUDA_ERROR_NO_DEVICE
            | CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
            | CUresult::CUDA_ERROR_STUB_LIBRARY
            | CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUresult::CUDA_ERROR_INVALID_IMAGE
    )
}

/// What to do next, where the code alone tells.
fn advice(code: CUresult) -> Option<String> {
    let advice = match code {
        CUresult::CUDA_ERROR_NO_DEVICE => match std::env::var("CUDA_VISIBLE_DEVICES") {
            Ok(visible) => return Some(format!("CUDA_VISIBLE_DEVICES={visible} may hide the GPUs; see nvidia-smi -L")),
            Err(_) => "see nvidia-smi -L; a container must be started with its GPUs, as by docker run --gpus all",
        },
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "libcuda and the kernel's module are of different versions: restart the machine after an update of the driver"
        }
        CUresult::CUDA_ERROR_STUB_LIBRARY => {
            "this libcuda is the toolkit's stub: take its folder out of LD_LIBRARY_PATH, the driver's own is wanted"
        }
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU | CUresult::CUDA_ERROR_INVALID_IMAGE => {
            "NVRTC is newer than the driver, or does not fit the GPU: compare them with trainer info"
        }
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS | CUresult::CUDA_ERROR_LAUNCH_FAILED => {
            "an earlier kernel failed: compute-sanitizer names it"
        }
        CUresult::CUDA_ERROR_ECC_UNCORRECTABLE => "the GPU's memory is damaged: use another GPU, see nvidia-smi -q",
        _ => return None,
    };
    Some(advice.to_owned())
}
