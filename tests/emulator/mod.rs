//! A GPU for tests. On a machine without one it is the emulator: libraries that stand in for CUDA's, built once for all tests
//! by the compilers at hand. With `LOCKSTEP_TEST_GPU` set it is the machine's own.

use lockstep::device::cuda::Gpu;
use lockstep::device::{Arena, Slice, SliceMut};
use std::collections::hash_map::DefaultHasher;
use std::ffi::OsString;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// A source in this folder, the library that it stands for, and the name by which that is asked for first, so that a real
/// library of this machine does not come before it.
const LIBRARIES: [(&str, &str, &str); 5] = [
    ("driver/lib.rs", "libcuda.so.1", "libcuda.so"),
    ("nvrtc.rs", "libnvrtc.so.13", "libnvrtc.so"),
    ("cublaslt/lib.rs", "libcublasLt.so.13", "libcublasLt.so"),
    ("cudnn/lib.rs", "libcudnn.so.9", "libcudnn.so"),
    ("nccl/lib.rs", "libnccl.so.2", "libnccl.so.2"),
];

/// The GPU of this process. None, and a line that says why, where there is no compiler for kernels.
pub fn gpu() -> Option<Gpu> {
    static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
    let start = || {
        for (name, value) in variables()? {
            // SAFETY: every test of a process that touches CUDA comes here first and waits; no other thread reads these.
            unsafe { std::env::set_var(name, value) };
        }
        Some(Gpu::take(0).unwrap_or_else(|error| panic!("{error}")))
    };
    GPU.get_or_init(start).clone()
}

/// Whether the GPU is the emulator's.
pub fn is_emulated() -> bool {
    std::env::var_os("LOCKSTEP_TEST_GPU").is_none()
}

/// Whether its streams work as late as they may (driver/streams.rs).
pub fn is_lazy() -> bool {
    is_emulated() && std::env::var_os("LOCKSTEP_EMULATOR_STREAMS").is_none()
}

/// The GPU for a test that no other may disturb, as those do who wait for the same streams: the test runs in a process of its own,
/// where this gives the GPU. None in the process that waits for that one, and as above. `test`: its name, with its modules.
pub fn alone(test: &str) -> Option<Gpu> {
    alone_with(test, &[])
}

/// The same on a GPU that these variables describe (driver/devices.rs, driver/memory.rs).
pub fn alone_with(test: &str, described: &[(&str, &str)]) -> Option<Gpu> {
    const ALONE: &str = "LOCKSTEP_TEST_ALONE";
    let variables = variables()?;
    if std::env::var_os(ALONE).is_some() {
        return gpu();
    }
    let mut process = Command::new(std::env::current_exe().expect("this test's program"));
    process.args(["--exact", test, "--nocapture"]).env(ALONE, "1").envs(variables).envs(described.iter().copied());
    assert!(process.status().expect("this test's program").success(), "{test}: see above");
    None
}

/// By these a real GPU and its libraries are found, and what was made for it before.
const OF_A_GPU: [&str; 8] = [
    "LOCKSTEP_CUDA_PATH",
    "LD_LIBRARY_PATH",
    "CUDA_HOME",
    "CUDA_PATH",
    "CONDA_PREFIX",
    "CUDA_VISIBLE_DEVICES",
    "HOME",
    "XDG_CACHE_HOME",
];

/// With these in its environment a process finds the GPU. None as above.
pub fn variables() -> Option<Vec<(&'static str, PathBuf)>> {
    // As many as there are: what follows the first that there is not does not count.
    let all = ("CUDA_VISIBLE_DEVICES", PathBuf::from("0,1,2,3,4,5,6,7"));
    if std::env::var_os("LOCKSTEP_TEST_GPU").is_some() {
        let set = |name| Some((name, PathBuf::from(std::env::var_os(name)?)));
        return Some([all].into_iter().chain(OF_A_GPU.into_iter().filter_map(set)).collect());
    }
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    if Command::new(&compiler).arg("--version").output().is_err() {
        eprintln!("skipped: there is no C++ compiler ({compiler}, or $CXX), which the emulator of a GPU needs");
        return None;
    }
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(build);
    Some(vec![("LOCKSTEP_CUDA_PATH", folder.clone()), ("XDG_CACHE_HOME", folder.join("cache")), all])
}

/// The folder of the libraries, which is made anew when a source changes.
fn build() -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator");
    let mut hash = DefaultHasher::new();
    hash_folder(&sources, &mut hash);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("emulator-{:016x}", hash.finish()));
    fs::create_dir_all(&folder).expect("a folder for the emulator");
    for (source, name, soname) in LIBRARIES.into_iter().filter(|(_, name, _)| !folder.join(name).exists()) {
        // Another test may be at the same.
        let unfinished = folder.join(format!("{name}.{}", std::process::id()));
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| OsString::from("rustc"));
        let mut command = Command::new(rustc);
        command
            .args(["--edition", "2024", "-O", "--crate-type", "cdylib"])
            .arg(format!("-Clink-arg=-Wl,-soname,{soname}"));
        let output = command.arg("-o").arg(&unfinished).arg(sources.join(source)).output().expect("rustc");
        assert!(output.status.success(), "{source}: {}", String::from_utf8_lossy(&output.stderr));
        fs::rename(&unfinished, folder.join(name)).expect("the library in its place");
    }
    folder
}

fn hash_folder(folder: &Path, hash: &mut DefaultHasher) {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(folder).expect("the emulator").map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    for path in paths {
        match path.is_dir() {
            true => hash_folder(&path, hash),
            false => fs::read(&path).expect("a source").hash(hash),
        }
    }
}

pub fn whole(arena: &Arena) -> Slice<'_> {
    // SAFETY: whoever gets it writes only what it gets as a SliceMut.
    unsafe { arena.slice(0..arena.bytes()) }
}

pub fn whole_mut(arena: &mut Arena) -> SliceMut<'_> {
    // SAFETY: borrowed mutably.
    unsafe { arena.slice_mut(0..arena.bytes()) }
}

/// Host memory on the GPU.
pub fn upload(gpu: &Gpu, from: &Arena) -> Arena {
    let mut to = gpu.allocate(from.bytes()).expect("memory of the GPU");
    gpu.compute().copy_and_wait(whole(from), whole_mut(&mut to)).expect("a copy to the GPU");
    to
}

/// A GPU's memory on the host, when all that was asked of it before is done.
pub fn download(gpu: &Gpu, from: &Arena) -> Arena {
    let mut to = Arena::host(from.bytes()).expect("host memory");
    gpu.compute().copy_and_wait(whole(from), whole_mut(&mut to)).expect("a copy from the GPU");
    to
}
