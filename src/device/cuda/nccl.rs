//! NCCL's functions, as far as they are called. cudarc declares them too, but looks for the library by names that it has nowhere:
//! its file is `libnccl.so.2`.
//!
//! Its communicators are asked for in their non-blocking form: a call may return `IN_PROGRESS`, goes on in a thread of NCCL's, and
//! is over when `ncclCommGetAsyncError` says so. Then no call keeps a thread for longer than it likes.
//! <https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html>

use super::libraries::{self, Version};
use crate::error::{Error, Kind, Result};
use cudarc::driver::sys::CUstream;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;

/// ncclResult_t, of which these are more than errors.
pub type Code = c_int;
pub const SUCCESS: Code = 0;
/// A peer's process has ended, or the network to it.
const REMOTE_ERROR: Code = 6;
pub const IN_PROGRESS: Code = 7;

/// ncclComm_t
pub type Handle = *mut c_void;

/// By which the ranks of a communicator find each other.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct UniqueId(pub [u32; 32]);

/// ncclDataType_t, those that are asked for.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataType {
    Uint32 = 3,
    Float32 = 7,
    Bfloat16 = 9,
}

impl DataType {
    pub fn bytes(self) -> usize {
        match self {
            DataType::Uint32 | DataType::Float32 => 4,
            DataType::Bfloat16 => 2,
        }
    }
}

/// ncclRedOp_t
pub const SUM: c_int = 0;

/// ncclConfig_t as it began, in NCCL 2.14. A newer one takes no more of it than `size` says, and what came later as not given.
#[repr(C)]
pub struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

impl Config {
    pub fn non_blocking() -> Config {
        Config { size: size_of::<Config>(), magic: 0xcafe_beef, version: 21_400, blocking: 0 }
    }
}

macro_rules! functions {
    ($($name:ident: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// By their names in nccl.h.
        #[allow(non_snake_case, missing_docs)]
        pub struct Functions {
            $(pub $name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        pub(super) const NAMES: &[&str] = &[$(stringify!($name)),*];

        impl Functions {
            fn of(library: &Library) -> Result<Functions, libloading::Error> {
                // SAFETY: the types are those of nccl.h; addresses of a library that is never closed.
                Ok(unsafe { Functions { $($name: *library.get(stringify!($name))?,)* } })
            }
        }
    };
}

functions! {
    ncclGetVersion: fn(*mut c_int) -> Code;
    ncclGetUniqueId: fn(*mut UniqueId) -> Code;
    ncclCommInitRankConfig: fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> Code;
    ncclCommGetAsyncError: fn(Handle, *mut Code) -> Code;
    ncclCommFinalize: fn(Handle) -> Code;
    ncclCommDestroy: fn(Handle) -> Code;
    ncclCommAbort: fn(Handle) -> Code;
    ncclAllReduce: fn(*const c_void, *mut c_void, usize, DataType, c_int, Handle, CUstream) -> Code;
    ncclReduceScatter: fn(*const c_void, *mut c_void, usize, DataType, c_int, Handle, CUstream) -> Code;
    ncclAllGather: fn(*const c_void, *mut c_void, usize, DataType, Handle, CUstream) -> Code;
    ncclGetErrorString: fn(Code) -> *const c_char;
    ncclGetLastError: fn(Handle) -> *const c_char;
}

/// Loads NCCL, or says why not.
pub fn functions() -> Result<&'static Functions> {
    libraries::nccl()?;
    found().ok_or_else(|| Error::internal("NCCL was loaded, and is gone"))
}

pub(super) fn version() -> Result<Version> {
    let nccl = found().ok_or_else(|| Error::internal("NCCL's version was asked for before it was loaded"))?;
    let mut version = 0;
    // SAFETY: NCCL writes the version.
    check(nccl, "ncclGetVersion", unsafe { (nccl.ncclGetVersion)(&mut version) })?;
    Ok(Version::from_ten_thousands(version.unsigned_abs() as usize))
}

fn found() -> Option<&'static Functions> {
    static FUNCTIONS: OnceLock<Option<Functions>> = OnceLock::new();
    // SAFETY: whoever comes here has loaded it.
    FUNCTIONS.get_or_init(|| unsafe { library() }.and_then(|library| Functions::of(library).ok())).as_ref()
}

/// The dynamic linker knows it by this name once it is loaded, wherever it lay.
///
/// # Safety
/// Its constructors may run.
pub(super) unsafe fn library() -> Option<&'static Library> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    // SAFETY: the caller's promise.
    LIBRARY.get_or_init(|| unsafe { Library::new("libnccl.so.2") }.ok()).as_ref()
}

/// What has become of a call: done, `IN_PROGRESS`, or an error.
pub fn check(nccl: &Functions, function: &str, code: Code) -> Result<()> {
    if code == SUCCESS || code == IN_PROGRESS {
        return Ok(());
    }
    let kind = if code == REMOTE_ERROR { Kind::PeerLost } else { Kind::Device };
    // SAFETY: both give a string of NCCL's own, or null; without a communicator the last error of any.
    let [what, last] =
        unsafe { [(nccl.ncclGetErrorString)(code), (nccl.ncclGetLastError)(ptr::null_mut())].map(|text| words(text)) };
    let last = if last.is_empty() { last } else { format!(": {last}") };
    Err(Error::new(kind, format!("NCCL's {function} failed ({code}, {what}){last}; NCCL_DEBUG=INFO has it say more")))
}

/// # Safety
/// A string that ends with a zero, or null.
unsafe fn words(text: *const c_char) -> String {
    match text.is_null() {
        true => String::new(),
        // SAFETY: the caller's promise.
        false => unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned(),
    }
}
