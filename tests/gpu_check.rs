//! scripts/gpu-check.sh where there is no GPU: it says so, once, and what it needs. Its whole way on the emulator is
//! `scripts/gpu-check.sh --rehearse`.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output};

/// None, and a line that says why, where there is no Python that it takes.
fn check(binaries: &Path, out: &Path, options: &[&str]) -> Option<Output> {
    if !Command::new("python3").args(["-c", "import tomllib"]).output().is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: there is no python3 of version 3.11 or newer");
        return None;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/gpu-check.sh");
    let mut command = Command::new(script);
    command.arg("--binaries").arg(binaries).arg("--out").arg(out).args(options);
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
    let Some(output) = check(folder.path(), &out, &[]) else { return };
    let report = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{report}\n{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(report.matches("the trainer finds no GPU here: GPU none: ").count(), 1, "{report}");
    assert!(report.trim_end() == fs::read_to_string(out.join("gpu-check.md")).unwrap().trim_end());
    assert!(fs::read_to_string(out.join("gpu-check.json")).unwrap().contains("finds no GPU"));
}

#[test]
fn what_must_be_brought_along_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let Some(output) = check(folder.path(), &folder.path().join("out"), &[]) else { return };
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("trainer is not there: make it with scripts/gpu-check.sh --build"), "{error}");
}

/// Nothing of what this project wants to show is passed over in silence: each line of BENCHMARKS.md's table has its goals, and one
/// that no part has come to is said to be open.
#[test]
fn a_goal_is_open_until_it_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let trainer = folder.path().join("trainer");
    fs::write(&trainer, "#!/bin/sh\necho 'GPU 0: some GPU'\n").unwrap();
    fs::set_permissions(&trainer, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(folder.path().join("gpu-tests"), "").unwrap();
    fs::write(folder.path().join("commit"), "0123456\n").unwrap();
    let Some(output) = check(folder.path(), &folder.path().join("out"), &["--only", "^none$"]) else { return };
    let report = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{report}\n{}", String::from_utf8_lossy(&output.stderr));
    let (_, goals) = report.split_once("### Goals").unwrap_or_else(|| panic!("{report}"));
    // Two for each of six times AlexNet and of the Fashion-MNIST net in two precisions, five of a step, four of results, four of ranks.
    assert_eq!(goals.matches("|  | not measured |").count(), 29, "{goals}");
    for goal in
        ["AlexNet without LRN, bf16, batch 1024, beside PyTorch's fastest | >= 1.3 |", "a killed NCCL rank is named"]
    {
        assert_eq!(goals.matches(goal).count(), 1, "{goal} in {goals}");
    }
}
