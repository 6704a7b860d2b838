//! The program as tests call it.

use assert_cmd::Command;
use std::time::Duration;

/// Without any launcher's variables and without RAYON_NUM_THREADS, under which the tests may run; and without a GPU, of which
/// `device = "auto"` would make use where this machine has one.
pub fn program() -> Command {
    let mut command = Command::cargo_bin("trainer").unwrap();
    command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
    command.env("CUDA_VISIBLE_DEVICES", "");
    command.timeout(Duration::from_secs(300));
    command
}
