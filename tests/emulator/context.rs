//! Whether the calling thread has a context of the emulated libcuda, in which the libraries above it do their work.

use std::ffi::{CStr, c_char, c_int, c_void};

unsafe extern "C" {
    fn dlopen(name: *const c_char, mode: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// The libcuda that is loaded already, by the name that it was built with.
const LIBCUDA: &CStr = c"libcuda.so";
const RTLD_NOW: c_int = 2;
const RTLD_NOLOAD: c_int = 4;

pub fn is_current() -> bool {
    let mut context = 0usize;
    unsafe {
        let library = dlopen(LIBCUDA.as_ptr(), RTLD_NOW | RTLD_NOLOAD);
        assert!(!library.is_null(), "libcuda is loaded before the libraries above it");
        let function = dlsym(library, c"cuCtxGetCurrent".as_ptr());
        let get: unsafe extern "C" fn(*mut usize) -> c_int = std::mem::transmute(function);
        get(&mut context) == 0 && context != 0
    }
}
