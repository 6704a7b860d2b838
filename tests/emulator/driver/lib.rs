//! libcuda for the emulator: GPUs whose memory is host memory, whose streams work as late as they may, and whose modules are
//! the shared libraries that nvrtc.rs makes.
//!
//! It is strict. A handle that is not alive, a null pointer, a copy beyond an allocation, a call without a context are
//! refused as the driver's reference says. Before and behind each allocation lies a page without access, so that a kernel that
//! reads or writes there ends the test; the few bytes between its end and that page are watched for writes. Memory is full of
//! 0xFF, NaNs, until it is written.

mod devices;
mod graphs;
mod kernels;
mod memory;
mod streams;

use graphs::{Capture, Graph};
use kernels::Launch;
use memory::Allocation;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint};
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use streams::{Event, Stream};

/// A CUresult, by its name and number in cuda.h.
type Code = c_int;
const SUCCESS: Code = 0;
const INVALID_VALUE: Code = 1;
const OUT_OF_MEMORY: Code = 2;
const NOT_INITIALIZED: Code = 3;
const INVALID_DEVICE: Code = 101;
const INVALID_IMAGE: Code = 200;
const INVALID_CONTEXT: Code = 201;
const INVALID_HANDLE: Code = 400;
const NOT_FOUND: Code = 500;
const NOT_READY: Code = 600;
const ALREADY_REGISTERED: Code = 712;
const NOT_REGISTERED: Code = 713;
const LAUNCH_FAILED: Code = 719;
const CAPTURED_EVENT: Code = 907;
const NOT_SUPPORTED: Code = 801;

/// All that is alive.
struct Driver {
    initialized: bool,
    /// How often the primary context of a GPU was retained.
    retained: BTreeMap<c_int, usize>,
    device_memory: BTreeMap<usize, Allocation>,
    host_memory: BTreeMap<usize, Allocation>,
    /// Host memory that the program has made and registered: bytes by address.
    registered: BTreeMap<usize, usize>,
    /// By handles, which are never used again.
    objects: BTreeMap<usize, Object>,
    default_stream: Stream,
    /// Under way, by number.
    captures: BTreeMap<usize, Capture>,
    /// How work of a thread has failed.
    failed: Vec<(ThreadId, Code)>,
    next_handle: usize,
}

enum Object {
    Stream(Stream),
    Event(Event),
    Graph(Arc<Graph>),
    /// A graph that can be launched.
    Executable(Arc<Graph>),
    /// The file is what the library was loaded from: its path must not come to name another while it is loaded.
    Module {
        library: usize,
        _file: File,
    },
    Kernel {
        module: usize,
        launch: Launch,
        name: CString,
        /// The bytes of each.
        parameters: Vec<usize>,
    },
}

static DRIVER: Mutex<Driver> = Mutex::new(Driver {
    initialized: false,
    retained: BTreeMap::new(),
    device_memory: BTreeMap::new(),
    host_memory: BTreeMap::new(),
    registered: BTreeMap::new(),
    objects: BTreeMap::new(),
    default_stream: Stream::new(),
    captures: BTreeMap::new(),
    failed: Vec::new(),
    next_handle: 0x1000,
});

thread_local! {
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

fn driver() -> MutexGuard<'static, Driver> {
    DRIVER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For calls that need a context that is current and alive.
fn in_context(call: impl FnOnce(&mut Driver) -> Result<(), Code>) -> Code {
    let mut driver = driver();
    let done = match () {
        () if !driver.initialized => Err(NOT_INITIALIZED),
        () if !driver.is_context(CURRENT.get()) => Err(INVALID_CONTEXT),
        () => call(&mut driver),
    };
    done.err().unwrap_or(SUCCESS)
}

/// Writes where the caller asked for.
unsafe fn give<V>(to: *mut V, value: V) -> Result<(), Code> {
    match to.is_null() {
        true => Err(INVALID_VALUE),
        false => Ok(unsafe { to.write(value) }),
    }
}

fn require(fits: bool, otherwise: Code) -> Result<(), Code> {
    if fits { Ok(()) } else { Err(otherwise) }
}

/// Whether a test has ordered a failure with `LOCKSTEP_EMULATOR_FAILS`: of `register`, or of a kernel by its name.
fn fails(what: &str) -> bool {
    std::env::var("LOCKSTEP_EMULATOR_FAILS").is_ok_and(|ordered| ordered == what)
}

impl Driver {
    fn add(&mut self, object: Object) -> usize {
        self.next_handle += 0x10;
        self.objects.insert(self.next_handle, object);
        self.next_handle
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuInit(flags: c_uint) -> Code {
    driver().initialized |= flags == 0;
    if flags == 0 { SUCCESS } else { INVALID_VALUE }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Code {
    unsafe { give(version, 13_000) }.err().unwrap_or(SUCCESS)
}

/// Name and text of the codes that this driver returns.
fn words(code: Code) -> Option<[&'static CStr; 2]> {
    Some(match code {
        SUCCESS => [c"CUDA_SUCCESS", c"no error"],
        INVALID_VALUE => [c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"],
        OUT_OF_MEMORY => [c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"],
        NOT_INITIALIZED => [c"CUDA_ERROR_NOT_INITIALIZED", c"initialization error"],
        INVALID_DEVICE => [c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"],
        INVALID_IMAGE => [c"CUDA_ERROR_INVALID_IMAGE", c"device kernel image is invalid"],
        INVALID_CONTEXT => [c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context"],
        INVALID_HANDLE => [c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle"],
        NOT_FOUND => [c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"],
        NOT_READY => [c"CUDA_ERROR_NOT_READY", c"device not ready"],
        ALREADY_REGISTERED => [
            c"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
            c"part or all of the requested memory range is already mapped",
        ],
        NOT_REGISTERED => {
            [c"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", c"pointer does not correspond to a registered memory region"]
        }
        LAUNCH_FAILED => [c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure"],
        graphs::UNSUPPORTED => {
            [c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", c"operation not permitted when stream is capturing"]
        }
        graphs::INVALIDATED => {
            [c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", c"operation failed due to a previous error during capture"]
        }
        graphs::UNJOINED => [c"CUDA_ERROR_STREAM_CAPTURE_UNJOINED", c"capturing stream has unjoined work"],
        graphs::ISOLATION => {
            [c"CUDA_ERROR_STREAM_CAPTURE_ISOLATION", c"dependency created on uncaptured work in another stream"]
        }
        CAPTURED_EVENT => {
            [c"CUDA_ERROR_CAPTURED_EVENT", c"operation not permitted on an event last recorded in a capturing stream"]
        }
        graphs::WRONG_THREAD => [
            c"CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
            c"attempt to terminate a thread-local capture sequence from another thread",
        ],
        NOT_SUPPORTED => [c"CUDA_ERROR_NOT_SUPPORTED", c"operation not supported"],
        _ => return None,
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(code: Code, text: *mut *const c_char) -> Code {
    let Some([name, _]) = words(code) else { return INVALID_VALUE };
    unsafe { give(text, name.as_ptr()) }.err().unwrap_or(SUCCESS)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(code: Code, text: *mut *const c_char) -> Code {
    let Some([_, description]) = words(code) else { return INVALID_VALUE };
    unsafe { give(text, description.as_ptr()) }.err().unwrap_or(SUCCESS)
}
