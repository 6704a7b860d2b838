//! libnvrtc for the emulator: hands CUDA sources to the C++ compiler of the machine (`$CXX`, or else `c++`), behind cuda.hpp.
//!
//! What it returns as a cubin is a shared library. It exports `emulator_launch`, which finds a kernel by its name, and
//! `emulator_parameters`, which says what to copy at a launch; the names are read from the source after the preprocessor.

use std::ffi::{CStr, CString, c_char, c_int};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

const SUCCESS: c_int = 0;
const INVALID_INPUT: c_int = 3;
const COMPILATION: c_int = 6;

pub struct Program {
    source: String,
    /// What it may include: names and texts.
    headers: Vec<(String, String)>,
    binary: Vec<u8>,
    log: CString,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> c_int {
    unsafe { (*major, *minor) = (13, 0) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcGetErrorString(result: c_int) -> *const c_char {
    let text = match result {
        SUCCESS => c"NVRTC_SUCCESS",
        COMPILATION => c"NVRTC_ERROR_COMPILATION",
        _ => c"NVRTC_ERROR_INVALID_INPUT",
    };
    text.as_ptr()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCreateProgram(
    program: *mut *mut Program,
    source: *const c_char,
    _name: *const c_char,
    count: c_int,
    texts: *const *const c_char,
    names: *const *const c_char,
) -> c_int {
    if program.is_null() || source.is_null() {
        return INVALID_INPUT;
    }
    let text = |text: *const c_char| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    let header = |i: usize| unsafe { (text(*names.add(i)), text(*texts.add(i))) };
    let headers = (0..count as usize).map(header).collect();
    let new = Program { source: text(source), headers, binary: Vec::new(), log: CString::default() };
    unsafe { *program = Box::into_raw(Box::new(new)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcDestroyProgram(program: *mut *mut Program) -> c_int {
    unsafe { drop(Box::from_raw(*program)) };
    SUCCESS
}

/// Of the options only definitions mean something here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCompileProgram(
    program: *mut Program,
    count: c_int,
    options: *const *const c_char,
) -> c_int {
    let program = unsafe { &mut *program };
    let option = |i: usize| unsafe { CStr::from_ptr(*options.add(i)) }.to_string_lossy().into_owned();
    let definition =
        |option: String| option.strip_prefix("--define-macro=").map(|definition| format!("-D{definition}"));
    let definitions: Vec<String> = (0..count as usize).map(option).filter_map(definition).collect();
    match compile(program, &definitions) {
        Ok(binary) => {
            program.binary = binary;
            SUCCESS
        }
        Err(log) => {
            program.log = CString::new(log.replace('\0', "")).unwrap_or_default();
            COMPILATION
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBINSize(program: *mut Program, size: *mut usize) -> c_int {
    unsafe { *size = (*program).binary.len() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBIN(program: *mut Program, to: *mut u8) -> c_int {
    let binary = unsafe { &(*program).binary };
    unsafe { to.copy_from_nonoverlapping(binary.as_ptr(), binary.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLogSize(program: *mut Program, size: *mut usize) -> c_int {
    unsafe { *size = (*program).log.as_bytes_with_nul().len() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLog(program: *mut Program, to: *mut u8) -> c_int {
    let log = unsafe { &(*program).log }.as_bytes_with_nul();
    unsafe { to.copy_from_nonoverlapping(log.as_ptr(), log.len()) };
    SUCCESS
}

/// The shared library, or what the compiler says.
fn compile(program: &Program, definitions: &[String]) -> Result<Vec<u8>, String> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let name = format!("lockstep-emulator-{}-{}", std::process::id(), NUMBER.fetch_add(1, Relaxed));
    let folder = std::env::temp_dir().join(name);
    fs::create_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let compiled = compile_in(&folder, program, definitions);
    let _ = fs::remove_dir_all(&folder);
    compiled
}

fn compile_in(folder: &Path, program: &Program, definitions: &[String]) -> Result<Vec<u8>, String> {
    let write = |name: &str, text: &str| fs::write(folder.join(name), text).map_err(|error| error.to_string());
    write("kernels.cu", &program.source)?;
    write("cuda.hpp", include_str!("cuda.hpp"))?;
    program.headers.iter().try_for_each(|(name, text)| write(name, text))?;
    let run = |arguments: &[&str]| {
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
        let mut command = Command::new(&compiler);
        command.current_dir(folder).args(["-x", "c++", "-std=c++17"]).args(definitions).args(arguments);
        let output = command.output().map_err(|error| format!("{compiler}: {error}"))?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    };
    // `__global__` is a plain word to the preprocessor as long as cuda.hpp is not there.
    let names = kernels(&run(&["-E", "-P", "kernels.cu"])?);
    let known = names.iter().map(|name| {
        format!(
            "{{\"{name}\", [](void **p) {{ emulator::call({name}, p); }}, \
             [](size_t *to) {{ return emulator::parameters({name}, to); }}}},"
        )
    });
    let main = format!(
        "#include \"cuda.hpp\"\n\
         #include \"kernels.cu\"\n\
         static const struct {{ const char *name; void (*call)(void **); int (*parameters)(size_t *); }} KERNELS[] = {{\n\
             {} {{nullptr, nullptr, nullptr}} }};\n\
         // Their number, and the bytes of each; less than 0 where there is no such kernel.\n\
         extern \"C\" int emulator_parameters(const char *name, size_t *bytes) {{\n\
             for (auto &kernel : KERNELS) {{\n\
                 if (kernel.name && strcmp(kernel.name, name) == 0) return kernel.parameters(bytes);\n\
             }}\n\
             return -1;\n\
         }}\n\
         // An error in words, or null.\n\
         extern \"C\" const char *emulator_launch(const char *name, const unsigned *grid, const unsigned *block, void **p) {{\n\
             for (auto &kernel : KERNELS) {{\n\
                 if (!kernel.name || strcmp(kernel.name, name) != 0) continue;\n\
                 return emulator::launch(kernel.call, {{grid[0], grid[1], grid[2]}}, {{block[0], block[1], block[2]}}, p);\n\
             }}\n\
             return \"no such kernel\";\n\
         }}\n",
        known.collect::<String>()
    );
    write("main.cpp", &main)?;
    // Warnings for what nvcc would refuse; contraction into fused multiply-adds as on a GPU is left to the code.
    // Libraries with unique symbols would share their variables, and could not be unloaded.
    run(&["-O1", "-ffp-contract=off", "-fno-gnu-unique", "-fPIC", "-shared", "-o", "kernels.so", "main.cpp"])?;
    fs::read(folder.join("kernels.so")).map_err(|error| error.to_string())
}

/// The names behind `__global__ void`, launch bounds or not between them.
fn kernels(preprocessed: &str) -> Vec<String> {
    let declarations = preprocessed.split("__global__").skip(1);
    declarations
        .filter_map(|text| {
            let text = text.trim_start().strip_prefix("void").unwrap_or(text).trim_start();
            let text = match text.strip_prefix("__launch_bounds__") {
                Some(bounds) => bounds.split_once(')')?.1,
                None => text,
            };
            let text = text.trim_start().strip_prefix("void").unwrap_or(text);
            let name = text.split_once('(')?.0.trim();
            Some(name.to_owned())
        })
        .collect()
}
