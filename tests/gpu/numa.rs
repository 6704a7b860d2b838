//! Ranks near their GPUs, on a machine that is made of files.

use crate::common::{Launched, children};
use crate::devices::Machine;
use rustix::thread::{CpuSet, sched_getaffinity};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// Two GPUs, each next to a node with one core of those that this process may use.
struct Nodes {
    machine: Machine,
    sysfs: TempDir,
    cores: [usize; 2],
}

impl Nodes {
    /// None where the tests are to run on a real GPU, or on one core.
    fn new() -> Option<Nodes> {
        let (machine, sysfs) = (Machine::with("2")?, tempfile::tempdir().unwrap());
        let allowed = sched_getaffinity(None).unwrap();
        let allowed: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)).collect();
        let [first, second, ..] = allowed[..] else {
            eprintln!("skipped: two cores are needed, for a NUMA node each");
            return None;
        };
        for (node, core) in [first, second].into_iter().enumerate() {
            write(&sysfs.path().join(format!("devices/system/node/node{node}/cpulist")), core);
            write(&sysfs.path().join(format!("bus/pci/devices/0000:{node:02x}:00.0/numa_node")), node);
        }
        Some(Nodes { machine, sysfs, cores: [first, second] })
    }

    fn process(&self, arguments: &[&str]) -> std::process::Command {
        let mut process = self.machine.process(arguments);
        process.env("LOCKSTEP_SYSFS", self.sysfs.path());
        process
    }
}

fn write(path: &Path, number: usize) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("{number}\n")).unwrap();
}

/// Those that were there before the rank knew its GPU, and those that came later.
#[test]
fn every_thread_of_a_rank_runs_near_its_gpu() {
    let Some(nodes) = Nodes::new() else { return };
    let settings = ["-n", "2", "--set", "run.steps=1000000", "--set", "log.every_steps=1"];
    let launched = Launched::start(&mut nodes.process(&settings));
    launched.expect(|said| said.contains("step 3/"));
    let ranks = ranks_of(launched.pid());
    assert_eq!(ranks.len(), 2);
    for (rank, pid) in ranks {
        let threads = threads(pid);
        let names: BTreeSet<&str> = threads.iter().map(|(name, _)| name.as_str()).collect();
        for name in ["trainer", "signals", "watch", "compute-0", "data-0", "lockstep-comm"] {
            assert!(names.contains(name), "{name} is not among {names:?}");
        }
        let core = nodes.cores[rank].to_string();
        let away: Vec<&(String, String)> = threads.iter().filter(|(_, cores)| *cores != core).collect();
        assert!(away.is_empty(), "not bound to core {core} of rank {rank}: {away:?}");
        launched.expect(|said| {
            said.contains(&format!("rank {rank} is bound to NUMA node {rank} (cores {core}), next to its GPU"))
        });
    }
}

#[test]
fn a_rank_keeps_its_cores_if_it_is_to() {
    let Some(nodes) = Nodes::new() else { return };
    let mut launched = Launched::start(&mut nodes.process(&["-n", "2", "--set", "run.numa_binding=false"]));
    assert_eq!(launched.wait(), 0);
    assert!(!launched.output().contains("NUMA node"), "{}", launched.output());

    fs::remove_dir_all(nodes.sysfs.path().join("bus")).unwrap();
    let mut launched = Launched::start(&mut nodes.process(&["-n", "2", "--resume", "none"]));
    assert_eq!(launched.wait(), 0);
    let unknown = "rank 1 keeps its cores: the system does not tell which NUMA node its GPU is next to";
    assert!(launched.output().contains(unknown), "{}", launched.output());
}

#[test]
fn info_shows_the_node_of_each_gpu() {
    let Some(nodes) = Nodes::new() else { return };
    let mut info = nodes.machine.command(&["info"]);
    let output = info.env("LOCKSTEP_SYSFS", nodes.sysfs.path()).assert().success().get_output().stdout.clone();
    let text = String::from_utf8(output).unwrap();
    for (node, core) in nodes.cores.into_iter().enumerate() {
        assert!(text.contains(&format!(", NUMA node {node} (cores {core})")), "{text}");
    }
}

/// The numbers and processes of a launcher's ranks.
fn ranks_of(launcher: i32) -> Vec<(usize, i32)> {
    let rank = |pid: &i32| {
        let environment = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
        let rank = environment.split('\0').find_map(|variable| variable.strip_prefix("LOCKSTEP_RANK="));
        rank.unwrap().parse().unwrap()
    };
    children(launcher).into_iter().map(|pid| (rank(&pid), pid)).collect()
}

/// Name and cores of each thread of a process.
fn threads(pid: i32) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    // One that has just ended has no more to say.
    let statuses = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok());
    let field = |status: &str, name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default().trim().to_owned()
    };
    statuses.map(|status| (field(&status, "Name:"), field(&status, "Cpus_allowed_list:"))).collect()
}
