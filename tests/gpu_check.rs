//! scripts/gpu-check.sh where there is no GPU: it says so, once, and what it needs. Its whole way on the emulator is
//! `scripts/gpu-check.sh --rehearse`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

/// None, and a line that says why, where there is no Python that it takes.
fn check(binaries: &Path, out: &Path) -> Option<Output> {
    if !Command::new("python3").args(["-c", "import tomllib"]).output().is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: there is no python3 of version 3.11 or newer");
        return None;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/gpu-check.sh");
    let mut command = Command::new(script);
    command.arg("--binaries").arg(binaries).arg("--out").arg(out);
    command.env_remove("PYTHON").env("LOCKSTEP_CUDA_PATH", "/nonexistent").env("PYTHONDONTWRITEBYTECODE", "1");
    Some(command.output().unwrap())
}

#[test]
fn without_a_gpu_the_reason_is_said_once() {
    let folder = tempfile::tempdir().unwrap();
    symlink(env!("CARGO_BIN_EXE_trainer"), folder.path().join("trainer")).unwrap();
    fs::write(folder.path().join("gpu-tests"), "").unwrap();
    fs::write(folder.path().join("commit"), "0123456\n").unwrap();
    let out = folder.path().join("out");
    let Some(output) = check(folder.path(), &out) else { return };
    let report = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{report}\n{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(report.matches("the trainer finds no GPU here: GPU none: ").count(), 1, "{report}");
    assert!(report.trim_end() == fs::read_to_string(out.join("gpu-check.md")).unwrap().trim_end());
    assert!(fs::read_to_string(out.join("gpu-check.json")).unwrap().contains("finds no GPU"));
}

#[test]
fn what_must_be_brought_along_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let Some(output) = check(folder.path(), &folder.path().join("out")) else { return };
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("trainer is not there: make it with scripts/gpu-check.sh --build"), "{error}");
}
