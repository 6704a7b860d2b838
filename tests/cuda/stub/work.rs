//! Streams, events, modules, launches.

use crate::device::context;
use crate::{Code, INVALID_VALUE, LAUNCH_FAILED, NOT_FOUND, SUCCESS, fault_is, give};
use std::ffi::{CStr, c_char, c_float, c_uint, c_void};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Instant;

static STREAMS: AtomicUsize = AtomicUsize::new(0);
static LAUNCHES: AtomicUsize = AtomicUsize::new(0);

/// For tests: launches until now.
#[unsafe(no_mangle)]
extern "C" fn stub_launches() -> usize {
    LAUNCHES.load(SeqCst)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreate(stream: *mut usize, _flags: c_uint) -> Code {
    if let Err(code) = context() {
        return code;
    }
    // SAFETY: the caller's contract is passed on, here and below.
    unsafe { give(stream, 1 + STREAMS.fetch_add(1, SeqCst)) }
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(_stream: usize) -> Code {
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(_stream: usize) -> Code {
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamQuery(_stream: usize) -> Code {
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(_stream: usize, event: *const Option<Instant>, _flags: c_uint) -> Code {
    if event.is_null() { INVALID_VALUE } else { SUCCESS }
}

/// It has no graphs: a caller only finds the functions.
macro_rules! without_graphs {
    ($($function:ident)*) => {
        $(#[unsafe(no_mangle)]
        extern "C" fn $function() -> Code {
            crate::NOT_SUPPORTED
        })*
    };
}
without_graphs!(cuStreamBeginCapture_v2 cuStreamEndCapture cuGraphGetNodes cuGraphInstantiateWithFlags cuGraphLaunch cuGraphDestroy cuGraphExecDestroy);

/// An event is the moment when it was recorded.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventCreate(event: *mut *mut Option<Instant>, _flags: c_uint) -> Code {
    unsafe { give(event, Box::into_raw(Box::new(None))) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventDestroy_v2(event: *mut Option<Instant>) -> Code {
    drop(unsafe { Box::from_raw(event) });
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventRecord(event: *mut Option<Instant>, _stream: usize) -> Code {
    unsafe { give(event, Some(Instant::now())) }
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(_event: *const Option<Instant>) -> Code {
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(_event: *const Option<Instant>) -> Code {
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime_v2(
    ms: *mut c_float,
    start: *const Option<Instant>,
    end: *const Option<Instant>,
) -> Code {
    let (Some(start), Some(end)) = (unsafe { *start }, unsafe { *end }) else { return INVALID_VALUE };
    unsafe { give(ms, (end - start).as_secs_f32() * 1e3) }
}

/// A module: the text that `compiler` made.
struct Module {
    text: String,
}

struct Function {
    name: String,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(module: *mut *mut c_void, image: *const c_char) -> Code {
    if let Err(code) = context() {
        return code;
    }
    let text = unsafe { CStr::from_ptr(image) }.to_string_lossy().into_owned();
    unsafe { give(module, Box::into_raw(Box::new(Module { text })).cast()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleUnload(module: *mut c_void) -> Code {
    drop(unsafe { Box::from_raw(module.cast::<Module>()) });
    SUCCESS
}

/// A function lives as long as the process: there are few.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(function: *mut *mut c_void, module: *mut c_void, name: *const c_char) -> Code {
    let (module, name) = unsafe { (&*module.cast::<Module>(), CStr::from_ptr(name).to_str().unwrap()) };
    if !module.text.contains(&format!("extern \"C\" __global__ void {name}(")) {
        return NOT_FOUND;
    }
    unsafe { give(function, Box::into_raw(Box::new(Function { name: name.to_owned() })).cast()) }
}

#[unsafe(no_mangle)]
#[expect(clippy::too_many_arguments)]
unsafe extern "C" fn cuLaunchKernel(
    function: *mut c_void,
    blocks_x: c_uint,
    blocks_y: c_uint,
    blocks_z: c_uint,
    threads_x: c_uint,
    threads_y: c_uint,
    threads_z: c_uint,
    _shared_bytes: c_uint,
    stream: usize,
    arguments: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> Code {
    if let Err(code) = context() {
        return code;
    }
    let threads = threads_x * threads_y * threads_z;
    let empty = blocks_x * blocks_y * blocks_z * threads == 0;
    if empty || threads > 1024 || stream == 0 || arguments.is_null() {
        return INVALID_VALUE;
    }
    if fault_is("launch") {
        let function = unsafe { &*function.cast::<Function>() };
        eprintln!("the stub fails the launch of {}", function.name);
        return LAUNCH_FAILED;
    }
    LAUNCHES.fetch_add(1, SeqCst);
    SUCCESS
}
