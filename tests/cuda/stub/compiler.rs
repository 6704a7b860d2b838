//! NVRTC, whose code is the source with its headers in place.

use crate::fault_is;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

type Status = u32;

const SUCCESS: Status = 0;
const COMPILATION: Status = 6;

static COMPILATIONS: AtomicUsize = AtomicUsize::new(0);

/// For tests: compilations until now.
#[unsafe(no_mangle)]
extern "C" fn stub_compilations() -> usize {
    COMPILATIONS.load(SeqCst)
}

struct Program {
    source: String,
    code: String,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> Status {
    // SAFETY: the caller's contract is passed on, here and below.
    unsafe {
        major.write(13);
        minor.write(0);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetErrorString(_status: Status) -> *const c_char {
    c"NVRTC_ERROR_OF_THE_STUB".as_ptr()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcCreateProgram(
    program: *mut *mut c_void,
    source: *const c_char,
    _name: *const c_char,
    headers: c_int,
    texts: *const *const c_char,
    names: *const *const c_char,
) -> Status {
    let mut source = unsafe { text(source) };
    for i in 0..headers as usize {
        let (name, header) = unsafe { (text(*names.add(i)), text(*texts.add(i))) };
        source = source.replace(&format!("#include \"{name}\""), &header);
    }
    unsafe { program.write(Box::into_raw(Box::new(Program { source, code: String::new() })).cast()) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcCompileProgram(program: *mut c_void, count: c_int, options: *const *const c_char) -> Status {
    if fault_is("compile") {
        return COMPILATION;
    }
    COMPILATIONS.fetch_add(1, SeqCst);
    let program = unsafe { of(program) };
    for i in 0..count as usize {
        let option = unsafe { text(*options.add(i)) };
        if let Some(definition) = option.strip_prefix("--define-macro=") {
            program.code += &format!("#define {}\n", definition.replacen('=', " ", 1));
        }
    }
    program.code = format!("{}{}\0", program.code, program.source);
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetCUBINSize(program: *mut c_void, bytes: *mut usize) -> Status {
    unsafe { bytes.write(of(program).code.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetCUBIN(program: *mut c_void, cubin: *mut u8) -> Status {
    let code = unsafe { &of(program).code };
    unsafe { cubin.copy_from(code.as_ptr(), code.len()) };
    SUCCESS
}

const LOG: &CStr = c"some.cu(3): error: planted by the stub\n\n1 error\n";

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetProgramLogSize(_program: *mut c_void, bytes: *mut usize) -> Status {
    unsafe { bytes.write(LOG.to_bytes_with_nul().len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetProgramLog(_program: *mut c_void, log: *mut c_char) -> Status {
    unsafe { log.copy_from(LOG.as_ptr(), LOG.to_bytes_with_nul().len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcDestroyProgram(program: *mut *mut c_void) -> Status {
    drop(unsafe { Box::from_raw((*program).cast::<Program>()) });
    SUCCESS
}

unsafe fn of<'a>(program: *mut c_void) -> &'a mut Program {
    unsafe { &mut *program.cast() }
}

unsafe fn text(text: *const c_char) -> String {
    unsafe { CStr::from_ptr(text) }.to_str().unwrap().to_owned()
}
