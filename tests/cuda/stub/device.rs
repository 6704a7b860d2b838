//! The driver, its one GPU, the GPU's primary context.

use crate::{Code, INVALID_CONTEXT, INVALID_DEVICE, MISMATCH, NO_DEVICE, NOT_INITIALIZED, SUCCESS, fault_is, give};
use std::cell::Cell;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering::SeqCst};

pub const MEMORY_BYTES: usize = 1 << 30;
const CONTEXT: usize = 0xC0;

static INITIALIZED: AtomicBool = AtomicBool::new(false);
static RETAINED: AtomicIsize = AtomicIsize::new(0);

thread_local! {
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// What a call that needs a context gives where this thread has none.
pub fn context() -> Result<(), Code> {
    if CURRENT.get() == CONTEXT { Ok(()) } else { Err(INVALID_CONTEXT) }
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(_flags: c_uint) -> Code {
    if fault_is("no-device") {
        return NO_DEVICE;
    }
    if fault_is("mismatch") {
        return MISMATCH;
    }
    INITIALIZED.store(true, SeqCst);
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Code {
    // SAFETY: the caller's contract is passed on, here and below.
    unsafe { give(version, if fault_is("old-driver") { 12080 } else { 13000 }) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Code {
    if !INITIALIZED.load(SeqCst) {
        return NOT_INITIALIZED;
    }
    unsafe { give(count, 1) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Code {
    if ordinal != 0 {
        return INVALID_DEVICE;
    }
    unsafe { give(device, 0) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, _device: c_int) -> Code {
    let text = b"Stub\0";
    assert!(len as usize >= text.len());
    unsafe { name.copy_from(text.as_ptr().cast(), text.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetPCIBusId(id: *mut c_char, len: c_int, _device: c_int) -> Code {
    let text = b"0000:3B:00.0\0";
    assert!(len as usize >= text.len());
    unsafe { id.copy_from(text.as_ptr().cast(), text.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> Code {
    unsafe { give(bytes, MEMORY_BYTES) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], _device: c_int) -> Code {
    unsafe { give(uuid, std::array::from_fn(|i| i as u8)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, _device: c_int) -> Code {
    const MULTIPROCESSORS: c_uint = 16;
    const CAPABILITY_MAJOR: c_uint = 75;
    let of_attribute = match attribute {
        MULTIPROCESSORS => 2,
        CAPABILITY_MAJOR => 9,
        _ => 0,
    };
    unsafe { give(value, of_attribute) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, _device: c_int) -> Code {
    RETAINED.fetch_add(1, SeqCst);
    unsafe { give(context, CONTEXT) }
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> Code {
    RETAINED.fetch_sub(1, SeqCst);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: usize) -> Code {
    CURRENT.set(context);
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorName(code: Code, name: *mut *const c_void) -> Code {
    let text = match code {
        crate::OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
        NO_DEVICE => c"CUDA_ERROR_NO_DEVICE",
        crate::LAUNCH_FAILED => c"CUDA_ERROR_LAUNCH_FAILED",
        MISMATCH => c"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        _ => c"CUDA_ERROR_OF_THE_STUB",
    };
    unsafe { give(name, text.as_ptr().cast()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorString(_code: Code, text: *mut *const c_void) -> Code {
    unsafe { give(text, c"said by the stub".as_ptr().cast()) }
}
