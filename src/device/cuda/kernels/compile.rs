//! NVRTC: from a source to the code of one architecture (a cubin). Needs no GPU.

use super::{Element, HEADERS, Source};
use crate::device::cuda::libraries;
use crate::error::{Error, Result};
use cudarc::nvrtc::sys::{self, nvrtcProgram, nvrtcResult};
use std::ffi::{CStr, CString, c_char};
use std::ptr;

/// The code of `source` for an architecture such as `sm_90`. That a source cannot be compiled is a bug in it; the error has the
/// compiler's log.
pub fn compile(source: &Source, element: Element, architecture: &str) -> Result<Vec<u8>> {
    compiled(source, architecture, &options(element, architecture))?.cubin()
}

/// What the assembler says of each kernel: its registers, its memory, what it spills. For tests.
pub fn usage(source: &Source, element: Element, architecture: &str) -> Result<String> {
    let verbose = ["--ptxas-options=-v".to_owned()];
    Ok(compiled(source, architecture, &[&options(element, architecture)[..], &verbose].concat())?.log())
}

fn compiled(source: &Source, architecture: &str, options: &[String]) -> Result<Program> {
    let nvrtc = libraries::nvrtc()?;
    let program = Program::new(source)?;
    let options: Vec<CString> = options.iter().map(|option| c_string(option.as_str())).collect();
    let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    // SAFETY: the program lives, and the options during the call.
    let code = unsafe { sys::nvrtcCompileProgram(program.0, pointers.len() as i32, pointers.as_ptr()) };
    let what = || format!("NVRTC {} ({}), {}.cu for {architecture}", nvrtc.version, nvrtc.path.display(), source.name);
    match code {
        nvrtcResult::NVRTC_ERROR_COMPILATION => {
            return Err(Error::internal(format!("{}: {}", what(), program.log())));
        }
        nvrtcResult::NVRTC_ERROR_INVALID_OPTION => {
            return Err(Error::lacking(format!(
                "{} does not take the options, most likely because it is older than the GPU: install a newer one ({})",
                what(),
                program.log()
            )));
        }
        code => check_nvrtc("nvrtcCompileProgram", code).map_err(|error| error.context(what()))?,
    }
    Ok(program)
}

/// All that is told to the compiler beside the source, so part of the cache's key.
pub(super) fn options(element: Element, architecture: &str) -> [String; 3] {
    [
        format!("--gpu-architecture={architecture}"),
        format!("--define-macro=ELEMENT={}", element.name()),
        "--std=c++17".to_owned(),
    ]
}

pub fn check_nvrtc(function: &str, code: nvrtcResult) -> Result<()> {
    if code == nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: NVRTC gives a string of its own for any code.
    let text = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(code)) }.to_string_lossy().into_owned();
    Err(Error::device(format!("NVRTC's {function} failed with {text} ({})", code as u32)))
}

struct Program(nvrtcProgram);

impl Program {
    fn new(source: &Source) -> Result<Program> {
        let (text, name) = (c_string(source.text), c_string(format!("{}.cu", source.name)));
        let (names, texts) = (HEADERS.map(|(name, _)| c_string(name)), HEADERS.map(|(_, text)| c_string(text)));
        let (names, texts) = (names.each_ref().map(|name| name.as_ptr()), texts.each_ref().map(|text| text.as_ptr()));
        let mut program = ptr::null_mut();
        // SAFETY: all strings live during the call, which copies them.
        let code = unsafe {
            sys::nvrtcCreateProgram(
                &mut program,
                text.as_ptr(),
                name.as_ptr(),
                HEADERS.len() as i32,
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        check_nvrtc("nvrtcCreateProgram", code)?;
        Ok(Program(program))
    }

    fn cubin(&self) -> Result<Vec<u8>> {
        let mut bytes = 0;
        // SAFETY: the program is compiled; NVRTC writes as many bytes as it has said.
        unsafe {
            check_nvrtc("nvrtcGetCUBINSize", sys::nvrtcGetCUBINSize(self.0, &mut bytes))?;
            let mut cubin = vec![0u8; bytes];
            check_nvrtc("nvrtcGetCUBIN", sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast::<c_char>()))?;
            Ok(cubin)
        }
    }

    /// What the compiler says, on one line.
    fn log(&self) -> String {
        let mut bytes = 0;
        // SAFETY: NVRTC writes as many bytes as it has said, the last of them 0.
        let log = unsafe {
            if sys::nvrtcGetProgramLogSize(self.0, &mut bytes) != nvrtcResult::NVRTC_SUCCESS {
                return "it has no log".to_owned();
            }
            let mut log = vec![0u8; bytes];
            sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast::<c_char>());
            log
        };
        let text = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
        text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn c_string(text: impl Into<Vec<u8>>) -> CString {
    CString::new(text).expect("sources and options have no zeros")
}
