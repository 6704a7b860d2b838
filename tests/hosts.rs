//! Ranks on several hosts, which are network namespaces of this machine: whole runs, and what becomes of a run when a host
//! dies, is cut off, or is slow.

mod common;
#[path = "common/hosts.rs"]
mod hosts;

use common::Launched;
use hosts::Hosts;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const CONFIG: &str = r#"
[run]
name = "hosts"
steps = 1000000
[data]
format = "shapes"
train = 960
test = 64
[batch]
global = 48
[model]
input = [32, 32, 3]
[[model.layers]]
type = "conv2d"
filters = 4
kernel = 3
stride = 4
activation = "relu"
[[model.layers]]
type = "global_avg_pool"
[[model.layers]]
type = "linear"
units = 10
[loss]
type = "softmax_cross_entropy"
[optimizer]
type = "sgd"
lr = 0.01
[checkpoint]
every_steps = 10
[eval]
every_epochs = 50
[log]
every_steps = 5
[parallel]
transport = "tcp"
"#;

#[test]
fn a_run_on_several_hosts_ends_with_the_weights_of_one_host() {
    for (count, per_host, mbit) in [(2, 1, 1000), (2, 2, 10_000), (4, 1, 10_000)] {
        let Some(hosts) = Hosts::new(count) else { return };
        hosts.shape(mbit, 0.2);
        let folder = tempfile::tempdir().unwrap();
        let shape = format!("{count} hosts of {per_host} ranks, {mbit} Mb/s");
        let mut run = Run::start(&hosts, per_host, &folder, &["run.steps=30"]);
        assert_eq!(run.wait(), vec![0; count * per_host], "{shape}\n{}", run.output());
        assert_eq!(digest(&run.out), digest_on_one_host(count * per_host, &["run.steps=30"]), "{shape}");
    }
}

/// Ranks on hosts, and where they write.
struct Run {
    ranks: Vec<Launched>,
    out: PathBuf,
}

impl Run {
    fn start(hosts: &Hosts, per_host: usize, folder: &TempDir, settings: &[&str]) -> Run {
        let out = folder.path().join("out");
        let mut arguments = vec!["--config".to_owned(), config(folder), "--out".to_owned(), out.display().to_string()];
        arguments.extend(settings.iter().flat_map(|setting| ["--set".to_owned(), setting.to_string()]));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Run { ranks: hosts.start_ranks(per_host, &arguments), out }
    }

    /// The exit codes, by rank.
    fn wait(&mut self) -> Vec<i32> {
        self.ranks.iter_mut().map(Launched::wait).collect()
    }

    fn output(&self) -> String {
        let output = |(rank, launched): (usize, &Launched)| format!("rank {rank}:\n{}", launched.output());
        self.ranks.iter().enumerate().map(output).collect()
    }
}

fn digest_on_one_host(ranks: usize, settings: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
    command.args(["-n", &ranks.to_string(), "--config", &config(&folder), "--out"]).arg(&out);
    command.args(["--set", "parallel.transport=shm"]).args(settings.iter().flat_map(|setting| ["--set", setting]));
    let mut run = Launched::start(&mut command);
    assert_eq!(run.wait(), 0, "{}", run.output());
    digest(&out)
}

fn config(folder: &TempDir) -> String {
    let path = folder.path().join("hosts.toml");
    fs::write(&path, CONFIG).unwrap();
    path.display().to_string()
}

fn digest(out: &Path) -> String {
    let summary = fs::read_to_string(out.join("summary.json")).unwrap();
    let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
    summary["weights_digest"].as_str().unwrap().to_owned()
}
