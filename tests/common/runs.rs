//! Whole runs of the program, and what they leave.

#[path = "program.rs"]
mod program;

use assert_cmd::Command;
pub use program::program;
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Trains in `out`, with the configuration in a file beside it.
pub fn trainer(config: &str, out: &Path, ranks: usize, settings: &[&str]) -> Command {
    let file = out.with_extension("toml");
    fs::write(&file, config).unwrap();
    let mut command = program();
    command.args(["-n", &ranks.to_string(), "--config"]).arg(file).arg("--out").arg(out);
    for setting in settings {
        command.args(["--set", setting]);
    }
    command
}

/// Of a run that has ended.
pub fn summary(out: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(out.join("summary.json")).unwrap()).unwrap()
}
