//! The way of the emulators of libraries into the streams of the emulator's driver.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

type Data = *mut c_void;
type Put = unsafe extern "C" fn(usize, unsafe extern "C" fn(Data) -> c_int, Data, unsafe extern "C" fn(Data)) -> c_int;
type Work = Box<dyn Fn() -> bool + Send + Sync>;

/// Whether the stream takes the work, which is done when it is its turn; in a graph again and again. It says whether it is over: if
/// not, its turn comes again.
pub fn put(stream: usize, work: impl Fn() -> bool + Send + Sync + 'static) -> bool {
    unsafe extern "C" fn run(work: Data) -> c_int {
        if unsafe { (*work.cast::<Work>())() } { 0 } else { NOT_READY }
    }
    unsafe extern "C" fn free(work: Data) {
        drop(unsafe { Box::from_raw(work.cast::<Work>()) });
    }
    let Some(put) = driver() else { return false };
    let work: Box<Work> = Box::new(Box::new(work));
    unsafe { put(stream, run, Box::into_raw(work).cast(), free) == 0 }
}

/// `emulator_put` of the libcuda that this process has loaded.
fn driver() -> Option<Put> {
    static PUT: OnceLock<Option<Put>> = OnceLock::new();
    *PUT.get_or_init(|| unsafe {
        let library = dlopen(c"libcuda.so".as_ptr(), RTLD_NOW | RTLD_NOLOAD);
        let put = if library.is_null() { library } else { dlsym(library, c"emulator_put".as_ptr()) };
        (!put.is_null()).then(|| std::mem::transmute::<*mut c_void, Put>(put))
    })
}

/// CUDA_ERROR_NOT_READY
const NOT_READY: c_int = 600;

const RTLD_NOW: c_int = 2;
const RTLD_NOLOAD: c_int = 4;

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}
