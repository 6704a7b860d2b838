//! What NCCL asks of the driver: the emulator's libcuda, which this process has loaded.

use std::ffi::{c_char, c_int, c_void};

/// The context of this thread; 0 where there is none.
pub fn current_context() -> usize {
    let mut context = 0;
    unsafe {
        let get: unsafe extern "C" fn(*mut usize) -> c_int = std::mem::transmute(function(c"cuCtxGetCurrent".as_ptr()));
        get(&mut context);
    }
    context
}

pub fn set_current_context(context: usize) {
    unsafe {
        let set: unsafe extern "C" fn(usize) -> c_int = std::mem::transmute(function(c"cuCtxSetCurrent".as_ptr()));
        set(context);
    }
}

/// What two ranks on one GPU have in common: the machine, unless a variable gives it another name, and the GPU.
pub fn gpu() -> Vec<u8> {
    let (mut device, mut uuid) = (0, [0u8; 16]);
    unsafe {
        let device_of: unsafe extern "C" fn(*mut c_int) -> c_int =
            std::mem::transmute(function(c"cuCtxGetDevice".as_ptr()));
        let uuid_of: unsafe extern "C" fn(*mut [u8; 16], c_int) -> c_int =
            std::mem::transmute(function(c"cuDeviceGetUuid_v2".as_ptr()));
        device_of(&mut device);
        uuid_of(&mut uuid, device);
    }
    let host = std::env::var("NCCL_HOSTID").unwrap_or_default();
    let shared = std::env::var("NCCL_MULTI_RANK_GPU_ENABLE").is_ok_and(|value| value == "1");
    let own = if shared { format!("{}-{:?}", std::process::id(), std::thread::current().id()) } else { String::new() };
    [host.as_bytes(), &uuid[..], own.as_bytes()].join(&b'/')
}

/// Runs what is in a stream.
pub fn run(stream: usize) {
    unsafe {
        let run: unsafe extern "C" fn(usize) = std::mem::transmute(function(c"emulator_run".as_ptr()));
        run(stream);
    }
}

unsafe fn function(name: *const c_char) -> *mut c_void {
    unsafe {
        let library = dlopen(c"libcuda.so".as_ptr(), RTLD_NOW | RTLD_NOLOAD);
        let function = if library.is_null() { library } else { dlsym(library, name) };
        assert!(!function.is_null(), "NCCL was called before the emulator's driver was loaded");
        function
    }
}

const RTLD_NOW: c_int = 2;
const RTLD_NOLOAD: c_int = 4;

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}
