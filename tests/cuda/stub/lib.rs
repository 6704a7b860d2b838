//! A stand-in for libcuda and NVRTC on a machine without a GPU. It is one GPU whose memory is host memory: allocations are poisoned
//! and remembered, copies are checked against them and done at once, and a stream is always empty. What NVRTC "compiles" is the
//! source with its headers in place; a module is that text; a launch is counted, and nothing runs.
//!
//! STUB_CUDA_FAULT makes it fail: `no-device`, `mismatch` (of driver and module), `launch`, `register`, `compile`,
//! `old-driver`.

mod compiler;
mod device;
mod memory;
mod work;

use std::env;

pub type Code = u32;

pub const SUCCESS: Code = 0;
pub const INVALID_VALUE: Code = 1;
pub const OUT_OF_MEMORY: Code = 2;
pub const NOT_INITIALIZED: Code = 3;
pub const NO_DEVICE: Code = 100;
pub const INVALID_DEVICE: Code = 101;
pub const INVALID_CONTEXT: Code = 201;
pub const NOT_FOUND: Code = 500;
pub const ALREADY_REGISTERED: Code = 712;
pub const NOT_REGISTERED: Code = 713;
pub const LAUNCH_FAILED: Code = 719;
pub const NOT_SUPPORTED: Code = 801;
pub const MISMATCH: Code = 803;

pub fn fault_is(name: &str) -> bool {
    env::var("STUB_CUDA_FAULT").is_ok_and(|fault| fault == name)
}

/// Writes what a function gives.
///
/// # Safety
/// `to` is an address that the caller may write, or null.
pub unsafe fn give<V>(to: *mut V, value: V) -> Code {
    if to.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: as the caller says.
    unsafe { to.write(value) };
    SUCCESS
}
