//! Modules, and the launch of their kernels.

use crate::{
    Code, INVALID_HANDLE, INVALID_IMAGE, INVALID_VALUE, LAUNCH_FAILED, NOT_FOUND, NOT_SUPPORTED, Object, driver, fails,
    give, in_context, require, streams,
};
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

/// `emulator_launch` of a module: says in words what is wrong, or gives null.
pub type Launch = unsafe extern "C" fn(*const c_char, *const c_uint, *const c_uint, *mut *mut c_void) -> *const c_char;
/// `emulator_parameters` of a module: how many a kernel has, or less than 0 where there is no such kernel; writes their bytes.
type Parameters = unsafe extern "C" fn(*const c_char, *mut usize) -> c_int;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut usize, image: *const u8) -> Code {
    in_context(|driver| {
        driver.outside_captures()?;
        require(!image.is_null() && !module.is_null(), INVALID_VALUE)?;
        let (library, file) = unsafe { load(image) }.map_err(|error| {
            eprintln!("emulator: a module cannot be loaded: {error}");
            INVALID_IMAGE
        })?;
        unsafe { give(module, driver.add(Object::Module { library, _file: file })) }
    })
}

/// An ELF file in memory as a shared library, and the file that it was put into.
unsafe fn load(image: *const u8) -> Result<(usize, File), String> {
    let field = |at: usize| unsafe { image.add(at).cast::<[u8; 8]>().read() };
    if field(0)[..5] != *b"\x7fELF\x02" {
        return Err("it is not what nvrtc.rs makes".to_owned());
    }
    // The call is not told the length. What the linker writes ends with the table of sections: e_shoff, and at 58 and 60 the
    // size of its entries and their number.
    let sections = field(56);
    let [entry, entries] = [2, 4].map(|at| usize::from(u16::from_le_bytes([sections[at], sections[at + 1]])));
    let bytes = u64::from_le_bytes(field(40)) as usize + entry * entries;
    unsafe {
        let file = memfd_create(c"kernels".as_ptr(), 1);
        if file < 0 {
            return Err(std::io::Error::last_os_error().to_string());
        }
        let mut file = File::from_raw_fd(file);
        file.write_all(std::slice::from_raw_parts(image, bytes)).map_err(|error| error.to_string())?;
        let path = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("no zero");
        let library = dlopen(path.as_ptr(), RTLD_NOW);
        match library.is_null() {
            true => Err(CStr::from_ptr(dlerror()).to_string_lossy().into_owned()),
            false => Ok((library as usize, file)),
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleUnload(module: usize) -> Code {
    streams::run_everything();
    in_context(|driver| {
        let Some(Object::Module { library, .. }) = driver.objects.get(&module) else { return Err(INVALID_HANDLE) };
        unsafe { dlclose(*library as *mut c_void) };
        driver.objects.retain(|handle, object| match object {
            Object::Kernel { module: of, .. } => *of != module,
            _ => *handle != module,
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(kernel: *mut usize, module: usize, name: *const c_char) -> Code {
    in_context(|driver| {
        let Some(Object::Module { library, .. }) = driver.objects.get(&module) else { return Err(INVALID_HANDLE) };
        require(!name.is_null(), INVALID_VALUE)?;
        let mut bytes = vec![0; MOST_PARAMETERS];
        let (name, launch, count) = unsafe {
            let functions =
                [c"emulator_launch", c"emulator_parameters"].map(|f| dlsym(*library as *mut c_void, f.as_ptr()));
            require(functions.iter().all(|function| !function.is_null()), INVALID_IMAGE)?;
            let launch = std::mem::transmute::<*mut c_void, Launch>(functions[0]);
            let parameters = std::mem::transmute::<*mut c_void, Parameters>(functions[1]);
            (CStr::from_ptr(name).to_owned(), launch, parameters(name, bytes.as_mut_ptr()))
        };
        bytes.truncate(usize::try_from(count).map_err(|_| NOT_FOUND)?);
        unsafe { give(kernel, driver.add(Object::Kernel { module, launch, name, parameters: bytes })) }
    })
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
pub unsafe extern "C" fn cuLaunchKernel(
    kernel: usize,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared_bytes: c_uint,
    stream: usize,
    parameters: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Code {
    let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
    let mut found = None;
    let code = in_context(|driver| {
        driver.stream(stream)?;
        let Some(Object::Kernel { launch, name, parameters: bytes, .. }) = driver.objects.get(&kernel) else {
            return Err(INVALID_HANDLE);
        };
        let fits = |lengths: [c_uint; 3], most: [c_uint; 3]| (0..3).all(|i| (1..=most[i]).contains(&lengths[i]));
        let threads = block.iter().map(|&length| u64::from(length)).product::<u64>();
        require(fits(grid, [i32::MAX as c_uint, 65535, 65535]) && fits(block, [1024, 1024, 64]), INVALID_VALUE)?;
        require(threads <= 1024 && extra.is_null(), INVALID_VALUE)?;
        require(shared_bytes == 0, NOT_SUPPORTED)?;
        found = Some((*launch, name.clone(), unsafe { values(parameters, bytes) }));
        Ok(())
    });
    let Some((launch, name, values)) = found else { return code };
    streams::put(stream, Arc::new(move || unsafe { run(launch, &name, grid, block, &values) }))
}

/// What the parameters are at the launch: the caller's memory is only good until it returns.
unsafe fn values(parameters: *mut *mut c_void, bytes: &[usize]) -> Vec<Vec<u64>> {
    let value = |(i, &bytes): (usize, &usize)| unsafe {
        let mut value = vec![0u64; bytes.div_ceil(8)];
        value.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping((*parameters.add(i)).cast::<u8>(), bytes);
        value
    };
    bytes.iter().enumerate().map(value).collect()
}

unsafe fn run(
    launch: Launch,
    name: &CStr,
    grid: [c_uint; 3],
    block: [c_uint; 3],
    values: &[Vec<u64>],
) -> Result<(), Code> {
    let mut pointers: Vec<*mut c_void> = values.iter().map(|value| value.as_ptr().cast_mut().cast()).collect();
    if name.to_str().is_ok_and(fails) {
        return Err(LAUNCH_FAILED);
    }
    let error = unsafe { launch(name.as_ptr(), grid.as_ptr(), block.as_ptr(), pointers.as_mut_ptr()) };
    let error = match error.is_null() {
        true => driver().overrun(),
        false => Some(unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned()),
    };
    let Some(error) = error else { return Ok(()) };
    eprintln!("emulator: kernel {} over {grid:?} blocks of {block:?} threads: {error}", name.to_string_lossy());
    Err(LAUNCH_FAILED)
}

/// More than any kernel has.
const MOST_PARAMETERS: usize = 64;
const RTLD_NOW: c_int = 2;

unsafe extern "C" {
    fn memfd_create(name: *const c_char, flags: c_uint) -> c_int;
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn dlclose(library: *mut c_void) -> c_int;
    fn dlerror() -> *const c_char;
}
