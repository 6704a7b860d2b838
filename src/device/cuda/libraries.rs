//! CUDA's libraries, each loaded when it is first asked for, once a process.
//!
//! cudarc loads a library by names such as `libnvrtc.so`, `libnvrtc.so.13`, and panics where none is found. So the file is
//! searched for here and loaded by its full path: from then on the dynamic linker takes its name as known, wherever it lay.
//! It stays loaded until the process ends.

use super::call::check;
use super::nccl;
use super::search::{Search, VARIABLE};
use crate::error::{Error, Result};
use cudarc::{cublaslt, cudnn, driver, nvrtc};
use libloading::os::unix::{self, RTLD_LOCAL, RTLD_NOW};
use std::ffi::{CStr, c_int, c_void};
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A library that is loaded.
#[derive(Clone, Debug)]
pub struct Library {
    pub name: &'static str,
    /// As it says itself.
    pub version: Version,
    /// From where the dynamic linker took it.
    pub path: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

/// libcuda, which comes with the GPU's driver. Its version is the newest CUDA that it can serve.
pub fn driver() -> Result<&'static Library> {
    static FOUND: OnceLock<Result<Library>> = OnceLock::new();
    found(&FOUND, &DRIVER)
}

/// The compiler of kernels.
pub fn nvrtc() -> Result<&'static Library> {
    static FOUND: OnceLock<Result<Library>> = OnceLock::new();
    found(&FOUND, &NVRTC)
}

/// Matrix products.
pub fn cublas_lt() -> Result<&'static Library> {
    static FOUND: OnceLock<Result<Library>> = OnceLock::new();
    found(&FOUND, &CUBLAS_LT)
}

/// Convolutions. It loads NVRTC and cuBLASLt by name, so they come first where they are.
pub fn cudnn() -> Result<&'static Library> {
    static FOUND: OnceLock<Result<Library>> = OnceLock::new();
    let _ = (nvrtc(), cublas_lt());
    found(&FOUND, &CUDNN)
}

/// Sums over the ranks' GPUs.
pub fn nccl() -> Result<&'static Library> {
    static FOUND: OnceLock<Result<Library>> = OnceLock::new();
    found(&FOUND, &NCCL)
}

fn found(cell: &'static OnceLock<Result<Library>>, wanted: &Wanted) -> Result<&'static Library> {
    cell.get_or_init(|| wanted.load(&Search::new(|name| std::env::var_os(name)))).as_ref().map_err(Clone::clone)
}

/// A library as it is looked for.
struct Wanted {
    name: &'static str,
    /// Names of its file, the first that is found is taken.
    files: &'static [&'static str],
    /// It comes with these.
    packages: &'static str,
    /// All functions of it that this program calls.
    functions: &'static [&'static str],
    /// By its name, once it is loaded.
    library: unsafe fn() -> Option<&'static libloading::Library>,
    version: fn() -> Result<Version>,
}

static DRIVER: Wanted = Wanted {
    name: "the CUDA driver",
    files: &["libcuda.so.1", "libcuda.so"],
    packages: "the GPU's driver (NVIDIA's apt package nvidia-open or cuda-drivers, Debian's nvidia-driver); a container gets it \
               from the host, as by docker run --gpus all",
    functions: &[
        "cuCtxSetCurrent",
        "cuCtxSynchronize",
        "cuDeviceGet",
        "cuDeviceGetAttribute",
        "cuDeviceGetCount",
        "cuDeviceGetName",
        "cuDeviceGetPCIBusId",
        "cuDeviceGetUuid_v2",
        "cuDevicePrimaryCtxRelease_v2",
        "cuDevicePrimaryCtxRetain",
        "cuDeviceTotalMem_v2",
        "cuDriverGetVersion",
        "cuEventCreate",
        "cuEventDestroy_v2",
        "cuEventElapsedTime_v2",
        "cuEventQuery",
        "cuEventRecord",
        "cuEventSynchronize",
        "cuGetErrorName",
        "cuGetErrorString",
        "cuGraphDestroy",
        "cuGraphExecDestroy",
        "cuGraphGetNodes",
        "cuGraphInstantiateWithFlags",
        "cuGraphLaunch",
        "cuInit",
        "cuLaunchKernel",
        "cuMemAlloc_v2",
        "cuMemFreeHost",
        "cuMemFree_v2",
        "cuMemGetInfo_v2",
        "cuMemHostAlloc",
        "cuMemHostRegister_v2",
        "cuMemHostUnregister",
        "cuMemcpyDtoDAsync_v2",
        "cuMemcpyDtoHAsync_v2",
        "cuMemcpyHtoDAsync_v2",
        "cuMemsetD8Async",
        "cuModuleGetFunction",
        "cuModuleLoadData",
        "cuModuleUnload",
        "cuStreamBeginCapture_v2",
        "cuStreamCreate",
        "cuStreamDestroy_v2",
        "cuStreamEndCapture",
        "cuStreamQuery",
        "cuStreamSynchronize",
        "cuStreamWaitEvent",
    ],
    // SAFETY: the caller's promise.
    library: || unsafe { driver::sys::is_culib_present().then(|| driver::sys::culib()) },
    version: || {
        let mut version = 0;
        // SAFETY: `load` has asked for the function.
        check("cuDriverGetVersion", unsafe { driver::sys::cuDriverGetVersion(&mut version) })?;
        let version = version.unsigned_abs();
        Ok(Version { major: version / 1000, minor: version % 1000 / 10, patch: 0 })
    },
};

static NVRTC: Wanted = Wanted {
    name: "NVRTC",
    files: &["libnvrtc.so.13", "libnvrtc.so.12"],
    packages: "pip's nvidia-cuda-nvrtc (CUDA 13) or nvidia-cuda-nvrtc-cu12, or NVIDIA's apt package cuda-nvrtc-13-0",
    functions: &[
        "nvrtcCompileProgram",
        "nvrtcCreateProgram",
        "nvrtcDestroyProgram",
        "nvrtcGetCUBIN",
        "nvrtcGetCUBINSize",
        "nvrtcGetErrorString",
        "nvrtcGetProgramLog",
        "nvrtcGetProgramLogSize",
        "nvrtcVersion",
    ],
    // SAFETY: the caller's promise.
    library: || unsafe { nvrtc::sys::is_culib_present().then(|| nvrtc::sys::culib()) },
    version: || {
        let (mut major, mut minor): (c_int, c_int) = (0, 0);
        // SAFETY: `load` has asked for the function.
        let code = unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) };
        super::kernels::check_nvrtc("nvrtcVersion", code)?;
        Ok(Version { major: major.unsigned_abs(), minor: minor.unsigned_abs(), patch: 0 })
    },
};

static CUBLAS_LT: Wanted = Wanted {
    name: "cuBLASLt",
    files: &["libcublasLt.so.13", "libcublasLt.so.12"],
    packages: "pip's nvidia-cublas (CUDA 13) or nvidia-cublas-cu12, or NVIDIA's apt package libcublas-13-0",
    functions: &[
        "cublasLtCreate",
        "cublasLtGetStatusString",
        "cublasLtGetVersion",
        "cublasLtMatmul",
        "cublasLtMatmulAlgoCheck",
        "cublasLtMatmulAlgoGetHeuristic",
        "cublasLtMatmulDescCreate",
        "cublasLtMatmulDescDestroy",
        "cublasLtMatmulDescSetAttribute",
        "cublasLtMatmulPreferenceCreate",
        "cublasLtMatmulPreferenceDestroy",
        "cublasLtMatmulPreferenceSetAttribute",
        "cublasLtMatrixLayoutCreate",
        "cublasLtMatrixLayoutDestroy",
        "cublasLtMatrixLayoutSetAttribute",
    ],
    // SAFETY: the caller's promise.
    library: || unsafe { cublaslt::sys::is_culib_present().then(|| cublaslt::sys::culib()) },
    // SAFETY: `load` has asked for the function.
    version: || Ok(Version::from_ten_thousands(unsafe { cublaslt::sys::cublasLtGetVersion() })),
};

static CUDNN: Wanted = Wanted {
    name: "cuDNN",
    files: &["libcudnn.so.9"],
    packages: "pip's nvidia-cudnn-cu13 or nvidia-cudnn-cu12, or NVIDIA's apt package cudnn9-cuda-13",
    functions: &[
        "cudnnBackendCreateDescriptor",
        "cudnnBackendDestroyDescriptor",
        "cudnnBackendExecute",
        "cudnnBackendFinalize",
        "cudnnBackendGetAttribute",
        "cudnnBackendSetAttribute",
        "cudnnCreate",
        "cudnnDestroy",
        "cudnnGetErrorString",
        "cudnnGetLastErrorString",
        "cudnnGetVersion",
        "cudnnSetStream",
    ],
    // SAFETY: the caller's promise.
    library: || unsafe { cudnn::sys::is_culib_present().then(|| cudnn::sys::culib()) },
    // SAFETY: `load` has asked for the function.
    version: || Ok(Version::from_ten_thousands(unsafe { cudnn::sys::cudnnGetVersion() })),
};

static NCCL: Wanted = Wanted {
    name: "NCCL",
    files: &["libnccl.so.2"],
    packages: "pip's nvidia-nccl-cu13 or nvidia-nccl-cu12, or NVIDIA's apt package libnccl2",
    functions: nccl::NAMES,
    // SAFETY: the caller's promise.
    library: || unsafe { nccl::library() },
    version: nccl::version,
};

impl Wanted {
    fn load(&self, search: &Search) -> Result<Library> {
        let named = self.open(search)?;
        // SAFETY: loading these libraries runs their constructors, which is what is wanted.
        let library = unsafe { (self.library)() }.ok_or_else(|| {
            Error::lacking(format!(
                "{} was loaded but is not known by its name; put its folder into LD_LIBRARY_PATH",
                self.name
            ))
        })?;
        let path = self.check_functions(library)?;
        if let Some(named) = named.filter(|named| named.canonicalize().ok() != path.canonicalize().ok()) {
            return Err(Error::lacking(format!(
                "{VARIABLE} leads to {}, but the dynamic linker takes {} before it; put the folder into LD_LIBRARY_PATH",
                named.display(),
                path.display()
            )));
        }
        Ok(Library { name: self.name, version: (self.version)()?, path })
    }

    /// Loads the first file that there is; gives its path if it is in a folder that the user has named.
    fn open(&self, search: &Search) -> Result<Option<PathBuf>> {
        if let Some(path) = self.files_in(&search.named).first() {
            return open(path).map(|()| Some(path.clone())).map_err(|why| self.cannot_be_loaded(&[why]));
        }
        // That the linker does not find a bare name is no news.
        if self.files.iter().any(|file| open(Path::new(file)).is_ok()) {
            return Ok(None);
        }
        let mut broken = Vec::new();
        for path in self.files_in(&search.others) {
            match open(&path) {
                Ok(()) => return Ok(None),
                Err(why) => broken.push(why),
            }
        }
        Err(match &broken[..] {
            [] => Error::lacking(format!(
                "{} was not found: {} was looked for in {}. It comes with {}. If it is there, name its folder in {VARIABLE}",
                self.name,
                self.files.join(" or "),
                search.places(),
                self.packages
            )),
            broken => self.cannot_be_loaded(broken),
        })
    }

    fn cannot_be_loaded(&self, why: &[String]) -> Error {
        Error::lacking(format!("{} cannot be loaded: {}. It comes with {}", self.name, why.join("; "), self.packages))
    }

    fn files_in(&self, folders: &[PathBuf]) -> Vec<PathBuf> {
        let files = folders.iter().flat_map(|folder| self.files.iter().map(|file| folder.join(file)));
        files.filter(|path| path.exists()).collect()
    }

    /// The library's path, if it has all functions.
    fn check_functions(&self, library: &'static libloading::Library) -> Result<PathBuf> {
        // SAFETY: an address that is only compared and looked up.
        let address =
            |name: &str| unsafe { library.get::<unsafe extern "C" fn()>(name).ok().map(|function| *function) };
        let missing: Vec<&str> = self.functions.iter().copied().filter(|name| address(name).is_none()).collect();
        let present = self.functions.iter().find_map(|name| address(name));
        let path = present.and_then(|function| file_of(function as *const c_void)).unwrap_or_default();
        match &missing[..] {
            [] => Ok(path),
            [first, ..] => Err(Error::lacking(format!(
                "{} in {} is too old, or not what its name says: it lacks {first} and {} other functions of {}. A newer one \
                 comes with {}",
                self.name,
                if present.is_some() { path.display().to_string() } else { "the dynamic linker's path".to_owned() },
                missing.len() - 1,
                self.functions.len(),
                self.packages
            ))),
        }
    }
}

impl Version {
    /// From a number such as 130100 or 91002; cuDNN 9, cuBLASLt 12 and NCCL 2.9 on write them so.
    pub(super) fn from_ten_thousands(version: usize) -> Version {
        let version = u32::try_from(version).unwrap_or(0);
        Version { major: version / 10_000, minor: version % 10_000 / 100, patch: version % 100 }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.patch {
            0 => write!(f, "{}.{}", self.major, self.minor),
            patch => write!(f, "{}.{}.{patch}", self.major, self.minor),
        }
    }
}

/// Loads a file for good: functions of it are called until the process ends. An error is what the dynamic linker says.
fn open(path: &Path) -> Result<(), String> {
    // SAFETY: loading these libraries runs their constructors, which is what is wanted.
    let library = unsafe { unix::Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) };
    library
        .map(std::mem::forget)
        .map_err(|error| std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string))
}

/// The file that a function was loaded from.
fn file_of(function: *const c_void) -> Option<PathBuf> {
    let mut info = MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: `info` is written by the call; the name it points to lives as long as the library, which is never closed.
    unsafe {
        if libc::dladdr(function, info.as_mut_ptr()) == 0 || info.assume_init_ref().dli_fname.is_null() {
            return None;
        }
        Some(PathBuf::from(CStr::from_ptr(info.assume_init_ref().dli_fname).to_string_lossy().into_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// cudarc panics at a call of a function that the library lacks, so `load` must ask for every one.
    #[test]
    fn every_function_that_is_called_is_asked_for_when_its_library_is_loaded() {
        let asked: Vec<&str> =
            [&DRIVER, &NVRTC, &CUBLAS_LT, &CUDNN].iter().flat_map(|wanted| wanted.functions).copied().collect();
        let sources = glob::glob(concat!(env!("CARGO_MANIFEST_DIR"), "/src/**/*.rs")).unwrap();
        let mut calls = 0;
        for path in sources.map(Result::unwrap) {
            let text = fs::read_to_string(&path).unwrap();
            for name in names_before_parentheses(&text).filter(|name| is_of_cuda(name)) {
                assert!(asked.contains(&name), "{} calls {name}, which is not in libraries.rs", path.display());
                calls += 1;
            }
        }
        assert!(calls > 30, "only {calls} calls were found");
    }

    fn names_before_parentheses(text: &str) -> impl Iterator<Item = &str> {
        let name =
            |before: &str| before.len() - before.trim_end_matches(|c: char| c.is_alphanumeric() || c == '_').len();
        text.match_indices('(').map(move |(end, _)| &text[end - name(&text[..end])..end])
    }

    fn is_of_cuda(name: &str) -> bool {
        let rest = ["cublasLt", "cudnn", "nvrtc", "cu"].iter().find_map(|prefix| name.strip_prefix(prefix));
        rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_uppercase()))
    }

    #[test]
    fn versions_are_read_as_the_libraries_write_them() {
        assert_eq!(Version::from_ten_thousands(91_002).to_string(), "9.10.2");
        assert_eq!(Version::from_ten_thousands(130_100).to_string(), "13.1");
    }
}
