//! Which rank takes which GPU, on machines with several of them.

use crate::configs::small_net;
use crate::emulator;
use crate::runs::{program, summary};
use assert_cmd::Command;
use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use tempfile::TempDir;

/// Two steps of next to nothing.
const SECTIONS: &str = r#"
[run]
name = "devices"
steps = 2
device = "cuda"
[data]
format = "shapes"
train = 16
test = 8
[batch]
global = 8
"#;

/// A machine with so many GPUs.
pub struct Machine {
    variables: Vec<(&'static str, PathBuf)>,
    gpus: &'static str,
    folder: TempDir,
}

impl Machine {
    /// None where the tests are to run on this machine's own.
    pub fn with(gpus: &'static str) -> Option<Machine> {
        let variables = emulator::is_emulated().then(emulator::variables)??;
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.toml"), small_net(SECTIONS)).unwrap();
        Some(Machine { variables, gpus, folder })
    }

    /// The program as it sees this machine.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = program();
        command.envs(self.variables.iter().map(|(name, value)| (name, value))).env("LOCKSTEP_EMULATOR_GPUS", self.gpus);
        command.args(arguments);
        command
    }

    fn trainer(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(&["-v", "--config"]);
        command.arg(self.folder.path().join("config.toml"));
        command.arg("--out").arg(self.folder.path().join("out")).args(arguments);
        command
    }

    /// Training, in a process that the test does not wait for at once.
    pub fn process(&self, arguments: &[&str]) -> std::process::Command {
        let given = self.trainer(arguments);
        let mut command = std::process::Command::new(given.get_program());
        command.env_clear().args(given.get_args());
        command.envs(given.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command
    }

    /// The exit code, and what was said.
    fn run(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output = self.trainer(arguments).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }

    fn ranks(&self) -> u64 {
        summary(&self.folder.path().join("out"))["world_size"].as_u64().unwrap()
    }
}

#[test]
fn a_rank_takes_the_gpu_of_its_place_on_the_machine() {
    let Some(machine) = Machine::with("2") else { return };
    let (code, said) = machine.run(&["-n", "2"]);
    assert_eq!(code, Some(0), "{said}");
    for rank in 0..2 {
        assert!(said.contains(&format!("rank {rank} computes on GPU {rank} (Emulated GPU)")), "{said}");
    }
    assert!(!said.contains("share a GPU"), "{said}");
}

#[test]
fn auto_is_a_gpu_where_each_rank_has_one_to_itself() {
    const AUTO: [&str; 4] = ["-n", "2", "--set", "run.device=auto"];
    let Some(two) = Machine::with("2") else { return };
    let (code, said) = two.run(&AUTO);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("rank 1 computes on GPU 1") && !said.contains("computing on the CPU"), "{said}");

    let one = Machine::with("1").unwrap();
    let (code, said) = one.run(&AUTO);
    assert_eq!(code, Some(0), "{said}");
    let why = "warning: computing on the CPU, though there is a GPU: ranks 0 and 1 on";
    assert!(said.contains(why) && !said.contains("computes on GPU"), "{said}");

    let output = one.trainer(&AUTO).env("CUDA_VISIBLE_DEVICES", "").args(["--resume", "none"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("computing on the CPU: there is no GPU 0") && !said.contains("though"), "{said}");
}

#[test]
fn a_rank_for_each_gpu_is_started_if_that_is_asked_for() {
    let Some(machine) = Machine::with("3") else { return };
    let (code, said) = machine.run(&["-n", "gpus", "--set", "batch.global=9"]);
    assert_eq!((code, machine.ranks()), (Some(0), 3), "{said}");

    let mut none = machine.trainer(&["-n", "gpus"]);
    let output = none.env("CUDA_VISIBLE_DEVICES", "").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(6), "{said}");
    assert!(said.contains("-n gpus: there is no GPU 0: this process sees 0"), "{said}");
}

#[test]
fn a_machine_that_lacks_something_is_not_tried_again() {
    let Some(machine) = Machine::with("0") else { return };
    let (code, said) = machine.run(&["-n", "2", "--max-restarts", "3"]);
    assert_eq!(code, Some(6), "{said}");
    assert_eq!(said.matches("there is no GPU 0: this process sees 0").count(), 1, "{said}");
    assert!(said.ends_with("no restart: what is lacking would be lacking again\n"), "{said}");
}

#[test]
fn ranks_share_a_gpu_only_if_they_may() {
    let Some(machine) = Machine::with("2") else { return };
    let (code, said) = machine.run(&["-n", "4"]);
    assert_eq!(code, Some(2), "{said}");
    let shared = "ranks 0 and 2 on ";
    let why = "share a GPU, Emulated GPU (GPU-6c6f636b-7374-6570-656d-756c61746530): it is number 0 of the 2 that rank 0 sees";
    for words in [shared, why, "trainer -n gpus", "--gpus-per-task", "parallel.allow_shared_gpu = true"] {
        assert_eq!(said.matches(words).count(), 1, "{words} in {said}");
    }
    let (code, said) = machine.run(&["-n", "4", "--set", "parallel.allow_shared_gpu=true"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains(shared), "{said}");
}

/// As Slurm binds one GPU to each task.
#[test]
fn ranks_that_are_shown_one_gpu_each_take_it() {
    let Some(machine) = Machine::with("4") else { return };
    for (shown, code) in [(["3", "1"], 0), (["2", "2"], 2)] {
        let port = free_port();
        let start = |rank: usize| {
            let mut command = machine.process(&["--resume", "none"]);
            command.env("CUDA_VISIBLE_DEVICES", shown[rank]).env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port);
            command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
            command.env("WORLD_SIZE", "2").env("LOCAL_WORLD_SIZE", "2");
            command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let outputs = [0, 1].map(start).map(|rank| rank.wait_with_output().unwrap());
        for output in outputs {
            let said = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(code), "{shown:?}: {said}");
            let words = if code == 0 {
                "computes on GPU 0 ("
            } else {
                "number 0 of the 1 that rank 0 sees, by CUDA_VISIBLE_DEVICES=2"
            };
            assert!(said.contains(words), "{shown:?}: {said}");
        }
    }
}

fn free_port() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string()
}
