//! Ranks on several hosts, which are network namespaces of this machine: whole runs, and what becomes of a run when a host
//! dies, is cut off, or is slow.

// Some of it is for other tests.
#[allow(dead_code)]
mod common;
#[path = "common/configs.rs"]
mod configs;
#[path = "common/hosts.rs"]
mod hosts;

use common::{Launched, send, until};
use hosts::Hosts;
use rustix::process::Signal;
use serde_json::Value;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

#[test]
fn a_run_on_several_hosts_ends_with_the_weights_of_one_host() {
    for (count, per_host, mbit) in [(2, 1, 1000), (2, 2, 10_000), (4, 1, 10_000)] {
        let Some(hosts) = Hosts::new(count) else { return };
        if !hosts.shape(mbit, 0.2) {
            eprintln!("without delay: this kernel has no netem");
        }
        let folder = tempfile::tempdir().unwrap();
        let shape = format!("{count} hosts of {per_host} ranks, {mbit} Mb/s");
        let mut run = Run::start(&hosts, per_host, &folder, &["--set", "run.steps=30"]);
        assert_eq!(run.wait(), vec![0; count * per_host], "{shape}\n{}", run.output());
        assert_eq!(digest(&run.out), digest_on_one_host(count * per_host, &["run.steps=30"]), "{shape}");
    }
}

#[test]
fn readmes_commands_for_two_hosts_train() {
    let Some(hosts) = Hosts::new(2) else { return };
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let config = format!("{} --set run.steps=5 --out {}", config(&folder), out.display());
    let commands = include_str!("../README.md").lines().filter(|line| line.contains(" MASTER_ADDR=10.0.0.1 "));
    let start = |(host, command): (usize, &str)| {
        let command = command.replace("10.0.0.1", &hosts::address(0)).replace("FILE", &config);
        let command = command.replace(" trainer ", concat!(" ", env!("CARGO_BIN_EXE_trainer"), " "));
        Launched::start(hosts.command(host, "/bin/sh").args(["-c", &command]))
    };
    let mut ranks: Vec<Launched> = commands.enumerate().map(start).collect();
    let codes: Vec<i32> = ranks.iter_mut().map(Launched::wait).collect();
    assert_eq!(codes, [0, 0], "{}", ranks.iter().map(Launched::output).collect::<String>());
    assert_eq!(summary(&out)["world_size"], 2);
}

#[test]
fn collectives_over_hosts_are_exact() {
    for (count, per_host, mbit) in [(2, 1, 1000), (2, 2, 10_000)] {
        let Some(hosts) = Hosts::new(count) else { return };
        hosts.shape(mbit, 0.0);
        let sizes = ["--min-bytes", "16384", "--max-bytes", "16384"];
        let mut ranks =
            hosts.start_ranks(per_host, &[&["bench-comm", "--transport", "tcp", "--json"], &sizes[..]].concat());
        let codes: Vec<i32> = ranks.iter_mut().map(Launched::wait).collect();
        let output = ranks[0].output();
        assert_eq!(codes, vec![0; count * per_host], "{output}");
        let rows: Vec<Value> = output.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        assert_eq!((&rows[0]["bytes"], &rows[0]["wrong"]), (&Value::from(16384), &Value::from(0)), "{output}");
    }
}

#[test]
fn a_host_that_dies_ends_the_run_within_a_moment_and_is_named() {
    for (count, per_host, victim) in [(2, 2, 1), (4, 1, 0), (4, 1, 3)] {
        let Some(hosts) = Hosts::new(count) else { return };
        let folder = tempfile::tempdir().unwrap();
        let mut run = Run::start(&hosts, per_host, &folder, &[]);
        run.trains();
        let dying = victim * per_host..(victim + 1) * per_host;
        let killed = Instant::now();
        run.ranks[dying.clone()].iter().for_each(|rank| send(rank.pid(), Signal::KILL));
        let codes = run.wait();
        let (took, output) = (killed.elapsed(), run.output());
        assert!(took < Duration::from_secs(1) + CROWDED, "it took {took:?}\n{output}");
        let expected = (0..codes.len()).map(|rank| if dying.contains(&rank) { -1 } else { 4 });
        assert_eq!(codes, expected.collect::<Vec<i32>>(), "{output}");
        let named = |rank: usize| output.contains(&format!("{} was lost", run.name(rank, per_host)));
        assert!(dying.into_iter().any(named), "{output}");
        assert!(output.contains("Last checkpoint: "), "{output}");
    }
}

#[test]
fn a_host_that_is_cut_off_ends_the_run_on_both_sides_within_two_seconds() {
    for (count, victim) in [(2, 1), (4, 2), (4, 0)] {
        let Some(hosts) = Hosts::new(count) else { return };
        let folder = tempfile::tempdir().unwrap();
        let mut run = Run::start(&hosts, 1, &folder, &[]);
        run.trains();
        let cut = Instant::now();
        hosts.cut_off(victim);
        run.expect_cut(cut);
        for rank in 0..count {
            let error = run.error(rank);
            // The one that is cut off may miss any of the others first.
            let named = rank == victim || error.contains(&format!("no acknowledgement from {}", run.name(victim, 1)));
            assert!(named, "{count} hosts, {victim} cut off: {error}");
            assert!(error.contains(" is cut, or host ") && error.contains("Last checkpoint: "), "{error}");
        }
    }
}

#[test]
fn a_short_interruption_is_survived() {
    const SHORT: Duration = Duration::from_millis(300);
    let Some(hosts) = Hosts::new(2) else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut run = Run::start(&hosts, 1, &folder, &[]);
    run.trains();
    let cut = Instant::now();
    hosts.cut(0, 1);
    thread::sleep(SHORT);
    hosts.mend(0, 1);
    if cut.elapsed() > 2 * SHORT {
        eprintln!("skipped: this machine is too crowded for a short interruption");
        return;
    }
    let before = run.newest_checkpoint();
    until("steps after the interruption", || (run.newest_checkpoint() > before).then_some(()));
    send(run.ranks[0].pid(), Signal::TERM);
    assert_eq!(run.wait(), [75, 75], "{}", run.output());
}

#[test]
fn a_link_that_is_cut_between_two_ranks_names_both_though_rank_0_reaches_them() {
    let Some(hosts) = Hosts::new(4) else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut run = Run::start(&hosts, 1, &folder, &[]);
    run.trains();
    let cut = Instant::now();
    hosts.cut(2, 3);
    run.expect_cut(cut);
    let [two, three] = [2, 3].map(|rank| run.name(rank, 1));
    for rank in 0..4 {
        let error = run.error(rank);
        let said = |from: &str, to: &str| {
            error.contains(&format!("no acknowledgement from {from}")) && error.contains(&format!("it and {to} is cut"))
        };
        assert!(said(&two, &three) || said(&three, &two), "{error}");
    }
}

#[test]
fn a_stopped_rank_is_waited_for_and_the_run_goes_on() {
    let Some(hosts) = Hosts::new(2) else { return };
    for victim in [0, 1] {
        let folder = tempfile::tempdir().unwrap();
        let mut run = Run::start(&hosts, 1, &folder, &[]);
        run.trains();
        send(run.ranks[victim].pid(), Signal::STOP);
        run.ranks[1 - victim].expect(|output| output.contains("has not been heard of for"));
        send(run.ranks[victim].pid(), Signal::CONT);
        run.ranks[1 - victim].expect(|output| output.contains("goes on after"));
        send(run.ranks[0].pid(), Signal::TERM);
        assert_eq!(run.wait(), [75, 75], "{}", run.output());
    }
}

#[test]
fn a_slow_host_is_named_with_what_it_costs() {
    let Some(hosts) = Hosts::new(3) else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut run = Run::start(&hosts, 1, &folder, &["--inject", "delay:rank=2:100ms"]);
    let warning = "is the slowest rank: in the last ";
    run.ranks[0].expect(|output| output.contains(warning));
    send(run.ranks[0].pid(), Signal::TERM);
    assert_eq!(run.wait(), [75; 3], "{}", run.output());
    assert!(run.output().contains(&format!("{} {warning}", run.name(2, 1))), "{}", run.output());
    let summary = summary(&run.out);
    assert_eq!(summary["slowest_rank"], 2, "{}", run.output());
    assert!(summary["slowest_rank_ms"].as_f64().unwrap() > 50.0, "{summary}");
    assert!(run.output().contains("waiting for the slowest rank (rank 2)"), "{}", run.output());
}

/// What a crowded machine may take longer than what is promised.
const CROWDED: Duration = Duration::from_secs(3);

/// Ranks on hosts, and where they write.
struct Run {
    ranks: Vec<Launched>,
    out: PathBuf,
}

impl Run {
    fn start(hosts: &Hosts, per_host: usize, folder: &TempDir, more: &[&str]) -> Run {
        let out = folder.path().join("out");
        let (config, out_name) = (config(folder), out.display().to_string());
        let arguments = [&["--config", &config, "--out", &out_name], more].concat();
        Run { ranks: hosts.start_ranks(per_host, &arguments), out }
    }

    /// Waits until steps are being done and all ranks know of a checkpoint, of which rank 0 tells with its heartbeats, five
    /// a second.
    fn trains(&self) {
        until("a checkpoint", || self.newest_checkpoint());
        thread::sleep(Duration::from_secs(1));
    }

    /// Its step.
    fn newest_checkpoint(&self) -> Option<u64> {
        let names = fs::read_dir(self.out.join("checkpoints")).ok()?.flatten().map(|entry| entry.file_name());
        let step = |name: OsString| name.to_str()?.strip_prefix("step-")?.strip_suffix(".safetensors")?.parse().ok();
        names.filter_map(step).max()
    }

    /// `rank 2 (pid 4711 on host c)`
    fn name(&self, rank: usize, per_host: usize) -> String {
        format!("rank {rank} (pid {} on host {})", self.ranks[rank].pid(), hosts::name(rank / per_host))
    }

    /// All ranks end, because of the cut, in the time that is promised for it.
    fn expect_cut(&mut self, cut: Instant) {
        let codes = self.wait();
        let (took, output) = (cut.elapsed(), self.output());
        assert_eq!(codes, vec![4; codes.len()], "{output}");
        assert!(took < Duration::from_secs(2) + CROWDED, "it took {took:?}\n{output}");
    }

    /// What a rank said at its end.
    fn error(&self, rank: usize) -> String {
        let output = self.ranks[rank].output();
        output.lines().find(|line| line.starts_with("error: ")).unwrap_or_default().to_owned()
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
    fs::write(&path, configs::endless() + "[parallel]\ntransport = \"tcp\"\n").unwrap();
    path.display().to_string()
}

fn digest(out: &Path) -> String {
    summary(out)["weights_digest"].as_str().unwrap().to_owned()
}

fn summary(out: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(out.join("summary.json")).unwrap()).unwrap()
}
