//! A run with its folder, and what it leaves.

use crate::common::{Launched, alive, until};
use crate::configs::small_net;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use tempfile::TempDir;

/// The rest is the small net.
const SECTIONS: &str = r#"
[run]
name = "rehearsal"
steps = 40
[data]
format = "shapes"
train = 640
test = 32
[batch]
global = 64
micro = 16
[eval]
every_steps = 1000
"#;

/// A folder in which runs go on where the one before has ended.
pub struct Rehearsal {
    folder: TempDir,
}

/// A run that has ended.
pub struct Ended {
    pub code: i32,
    pub output: String,
}

impl Rehearsal {
    pub fn new() -> Rehearsal {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.toml"), small_net(SECTIONS)).unwrap();
        Rehearsal { folder }
    }

    /// The run's directory.
    pub fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    /// `trainer -n RANKS`, with the words of `args` behind.
    pub fn start(&self, ranks: usize, args: &str) -> Launched {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
        command
            .args(["-n", &ranks.to_string(), "--config"])
            .arg(self.folder.path().join("config.toml"))
            .arg("--out")
            .arg(self.out());
        Launched::start(command.args(args.split_whitespace()))
    }

    /// The same, to the end.
    pub fn run(&self, ranks: usize, args: &str) -> Ended {
        ended(self.start(ranks, args))
    }

    /// Of the weights that the last run has left.
    pub fn digest(&self) -> String {
        let summary = fs::read_to_string(self.out().join("summary.json")).unwrap();
        let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
        summary["weights_digest"].as_str().unwrap().to_string()
    }

    /// Steps of the checkpoints, ascending.
    pub fn checkpoints(&self) -> Vec<u64> {
        self.steps("checkpoints")
    }

    /// The same of a folder in the run's directory.
    pub fn steps(&self, folder: &str) -> Vec<u64> {
        let entries = fs::read_dir(self.out().join(folder)).into_iter().flatten().flatten();
        let step = |name: String| name.strip_prefix("step-")?.strip_suffix(".safetensors")?.parse().ok();
        let mut steps: Vec<u64> = entries.filter_map(|entry| step(entry.file_name().into_string().ok()?)).collect();
        steps.sort();
        steps
    }
}

/// Waits for the end of a run, after which no rank is left.
pub fn ended(mut launched: Launched) -> Ended {
    let launcher = format!("LOCKSTEP_LAUNCHER={}", launched.pid());
    let code = launched.wait();
    until("all ranks to be gone", || runs_with(&launcher).is_none().then_some(()));
    Ended { code, output: launched.output() }
}

/// A process that has this variable.
fn runs_with(variable: &str) -> Option<i32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(|&pid| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        alive(pid) && environment.split(|byte| *byte == 0).any(|found| found == variable.as_bytes())
    })
}

/// Of the weights of a run in which nothing fails, whatever the number of ranks.
pub fn undisturbed() -> &'static str {
    static DIGEST: OnceLock<String> = OnceLock::new();
    DIGEST.get_or_init(|| {
        let rehearsal = Rehearsal::new();
        let Ended { code, output } = rehearsal.run(1, "");
        assert_eq!(code, 0, "{output}");
        rehearsal.digest()
    })
}
