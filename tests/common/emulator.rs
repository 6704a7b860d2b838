//! The GPU of a test: an emulated one, whose libraries are built from tests/emulator when they are first needed. Its memory
//! is the host's, and what is put into a stream has happened when the call returns.

use lockstep::device::cuda::Gpu;
use lockstep::device::{Arena, Slice, SliceMut};
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::{env, fs};

/// Sources in tests/emulator, and the names by which the libraries are looked for.
const LIBRARIES: [(&str, &str); 3] =
    [("driver.rs", "libcuda.so.1"), ("nvrtc.rs", "libnvrtc.so.13"), ("cudnn/lib.rs", "libcudnn.so.9")];

/// The GPU that all tests of this process share.
pub fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| {
        let folder = libraries();
        // SAFETY: the tests of this process that read the environment wait here, in the cell.
        unsafe {
            env::set_var("LOCKSTEP_CUDA_PATH", &folder);
            env::set_var("XDG_CACHE_HOME", cache());
        }
        Gpu::take(0).expect("a GPU")
    })
}

/// Where this process keeps compiled kernels and choices.
pub fn cache() -> &'static Path {
    static CACHE: OnceLock<tempfile::TempDir> = OnceLock::new();
    CACHE.get_or_init(|| tempfile::tempdir().unwrap()).path()
}

/// Device memory with these values, f32 or bf16.
pub fn upload<V>(values: &[V]) -> Arena
where
    for<'a> Slice<'a>: From<&'a [V]>,
{
    let from = Slice::from(values);
    let arena = gpu().allocate(from.bytes()).unwrap();
    // SAFETY: nobody else knows the memory.
    gpu().compute().copy_and_wait(from, unsafe { arena.slice_mut(0..arena.bytes()) }).unwrap();
    arena
}

/// What is in device memory, all work done.
pub fn download<V: Clone + Default>(arena: &Arena) -> Vec<V>
where
    for<'a> SliceMut<'a>: From<&'a mut [V]>,
{
    let mut values = vec![V::default(); arena.bytes() / size_of::<V>()];
    // SAFETY: work that writes it is in the same stream, before the copy.
    let from = unsafe { arena.slice(0..arena.bytes()) };
    gpu().compute().copy_and_wait(from, SliceMut::from(&mut values[..])).unwrap();
    values
}

/// The folder of the emulator's libraries, named after what they are built from.
fn libraries() -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator");
    let mut hasher = DefaultHasher::new();
    hash(&sources, &mut hasher);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("emulator-{:016x}", hasher.finish()));
    if !folder.is_dir() {
        let draft = folder.with_extension(std::process::id().to_string());
        fs::create_dir_all(&draft).unwrap();
        for (source, library) in LIBRARIES {
            let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
            rustc.args(["--edition", "2024", "-O", "--crate-type", "cdylib", "-o"]);
            rustc.arg(draft.join(library)).arg(sources.join(source));
            // cudarc asks for them by name, once they are loaded by their path.
            let output = rustc.arg(format!("-Clink-arg=-Wl,-soname,{library}")).output().expect("rustc");
            assert!(output.status.success(), "{source}: {}", String::from_utf8_lossy(&output.stderr));
        }
        // Another process may have been faster.
        if fs::rename(&draft, &folder).is_err() {
            fs::remove_dir_all(&draft).unwrap();
        }
    }
    folder
}

/// The texts of all files of a folder.
fn hash(folder: &Path, hasher: &mut DefaultHasher) {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        match path.is_dir() {
            true => self::hash(&path, hasher),
            false => fs::read(&path).unwrap().hash(hasher),
        }
    }
}
