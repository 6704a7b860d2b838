//! The stub, and tests that run under it. A process loads CUDA's libraries once, so each of these tests runs in a process of its
//! own: this program again, for that one test.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

/// Says in which test a process runs `body`.
const INSIDE: &str = "LOCKSTEP_TEST_INSIDE";

/// Runs `body` in a process with these variables, and no others of CUDA's.
pub fn in_a_process(variables: &[(&str, &Path)], body: impl FnOnce()) {
    let test = thread::current().name().expect("tests have names").to_owned();
    if env::var(INSIDE).is_ok_and(|name| name == test) {
        return body();
    }
    let mut command = assert_cmd::Command::new(env::current_exe().unwrap());
    for name in ["LD_LIBRARY_PATH", "LOCKSTEP_CUDA_PATH", "CUDA_VISIBLE_DEVICES"] {
        command.env_remove(name);
    }
    command.args(["--exact", &test, "--nocapture"]).env(INSIDE, &test).envs(variables.iter().copied());
    let output = command.timeout(Duration::from_secs(300)).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "in the process of {test}: {}\n{out}{err}", output.status);
    eprint!("{err}");
}

/// `in_a_process` where the dynamic linker finds the stub, which has so far compiled nothing. `fault` makes it fail, as `stub`
/// says.
pub fn under_the_stub(fault: &str, body: impl FnOnce()) {
    let cache = tempfile::tempdir().unwrap();
    let variables =
        [("LD_LIBRARY_PATH", &*stub()), ("STUB_CUDA_FAULT", Path::new(fault)), ("XDG_CACHE_HOME", cache.path())];
    in_a_process(&variables, body);
}

/// The folder of the stub's libraries.
pub fn stub() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda/stub/lib.rs");
    library("stub", &["libcuda.so.1", "libnvrtc.so.13"], &source)
}

/// A folder with libraries of these names, all made of this Rust source. It stays, for the next run of the tests.
pub fn library(folder: &str, names: &[&str], source: &Path) -> PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let folder = target.join("cuda").join(folder);
    fs::create_dir_all(&folder).unwrap();
    for name in names.iter().filter(|name| !is_newer(&folder.join(name), source.parent().unwrap())) {
        // Made beside it and renamed, since another process may use the one that is there.
        let fresh = tempfile::tempdir_in(target).unwrap();
        compile(source, name, &fresh.path().join(name));
        fs::rename(fresh.path().join(name), folder.join(name)).unwrap();
        let unversioned = folder.join(format!("{}.so", name.split('.').next().unwrap()));
        let _ = fs::remove_file(&unversioned);
        symlink(name, unversioned).unwrap();
    }
    folder
}

fn compile(source: &Path, name: &str, to: &Path) {
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or("rustc".into()));
    rustc.args(["--edition", "2024", "--crate-type", "cdylib", "--crate-name", "library", "-O", "-D", "warnings"]);
    rustc.arg(format!("-Clink-arg=-Wl,-soname,{name}")).arg("-o").arg(to).arg(source);
    let status = rustc.status().expect("rustc is there where cargo is");
    assert!(status.success(), "{} does not compile", source.display());
}

/// Whether a file is there and no source in the folder is younger.
fn is_newer(built: &Path, sources: &Path) -> bool {
    let modified = |path: &Path| fs::metadata(path).and_then(|data| data.modified());
    let Ok(built) = modified(built) else { return false };
    fs::read_dir(sources).unwrap().all(|entry| modified(&entry.unwrap().path()).unwrap() < built)
}
