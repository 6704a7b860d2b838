//! What runs take of a GPU's memory, beside what was planned, and what is said where it is not there.

use crate::emulator;
use crate::runs::{program, summary};
use assert_cmd::Command;
use lockstep::device::cuda::cublaslt::{Epilogue, Matmul, Product};
use lockstep::device::cuda::cudnn::{self, Convolution, Graph, Rules, fastest};
use lockstep::device::cuda::kernels::Element;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use tempfile::TempDir;

/// A net in which activations, parameters and images all take some MiB, or nearly.
const CONFIG: &str = r#"
[run]
name = "memory"
steps = 1
device = "cuda"
[data]
format = "shapes"
train = 256
test = 8
resident = "off"
[batch]
global = 64
[model]
input = [32, 32, 3]
[[model.layers]]
type = "conv2d"
filters = 16
kernel = 3
stride = 2
activation = "relu"
[[model.layers]]
type = "max_pool"
size = 3
stride = 2
[[model.layers]]
type = "batch_norm"
[[model.layers]]
type = "flatten"
[[model.layers]]
type = "linear"
units = 64
[[model.layers]]
type = "linear"
units = 10
[optimizer]
type = "adam"
lr = 0.001
[parallel]
allow_shared_gpu = true
"#;
/// Tables that the plan leaves out.
const TABLES: usize = 16 << 10;
/// The workspaces of this net's algorithms at most.
const WORKSPACES: usize = 1 << 20;

struct Runs {
    variables: Vec<(&'static str, PathBuf)>,
    folder: TempDir,
}

impl Runs {
    fn new() -> Option<Runs> {
        let variables = emulator::is_emulated().then(emulator::variables)??;
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.toml"), CONFIG).unwrap();
        Some(Runs { variables, folder })
    }

    fn command(&self, command: &[&str], settings: &[&str]) -> Command {
        let mut program = program();
        program.args(command).arg("--config").arg(self.folder.path().join("config.toml"));
        program.envs(self.variables.iter().map(|(name, value)| (name, value)));
        for setting in settings {
            program.args(["--set", setting]);
        }
        program
    }

    fn training(&self, ranks: &str, settings: &[&str]) -> Command {
        let mut command = self.command(&["-v", "-n", ranks, "--resume", "none"], settings);
        command.arg("--out").arg(self.folder.path().join("out"));
        command
    }

    /// Trains, on ranks of GPUs with so many MiB; gives the exit code and what was said.
    fn train(&self, ranks: &str, mib: &str, settings: &[&str]) -> (Option<i32>, String) {
        let output = self.training(ranks, settings).env("LOCKSTEP_EMULATOR_MEMORY_MIB", mib).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }

    /// Bytes that `trainer plan` has for a rank, without workspaces: for activations and scratch, and for all else.
    fn planned(&self, ranks: &str, settings: &[&str]) -> (usize, usize) {
        let output = self.command(&["plan", "--np", ranks], settings).assert().success().get_output().stdout.clone();
        let text = String::from_utf8(output).unwrap();
        let (_, table) = text.split_once("# Device memory of a rank").unwrap_or_else(|| panic!("{text}"));
        let rows = table.lines().skip_while(|line| !line.starts_with("| activations"));
        let bytes = |row: &str| row.split('|').nth(2).unwrap().trim().parse::<usize>().unwrap();
        let mut rows = rows.take_while(|line| line.starts_with('|')).map(bytes);
        (rows.next().unwrap(), rows.sum())
    }
}

/// What a run has taken when it begins to train is what was planned, and workspaces.
#[test]
fn a_run_takes_what_trainer_plan_says() {
    let Some(runs) = Runs::new() else { return };
    let nccl = ["parallel.transport=nccl", "run.precision=bf16", "parallel.reduce_dtype=bf16"];
    let mut taken = Vec::new();
    for (ranks, settings) in [
        ("1", &["run.tf32=true"][..]),
        ("1", &["run.precision=bf16"]),
        ("1", &["run.tf32=true", "batch.micro=16"]),
        ("2", &nccl),
        ("2", &[&nccl[..], &["parallel.nccl_update=sharded"]].concat()),
    ] {
        let (net, rest) = runs.planned(ranks, settings);
        let (code, said) = runs.train(ranks, "100", settings);
        assert_eq!(code, Some(0), "{said}");
        let number = |before: &str| {
            let (_, after) = said.split_once(before).unwrap_or_else(|| panic!("{said}"));
            after.split(' ').next().unwrap().parse::<usize>().unwrap()
        };
        let (given, for_net) = (number("GPU 0 (Emulated GPU) has given this run "), number(" bytes, "));
        let what = format!("{settings:?}: {net} and {rest} planned, {given} given, {for_net} to the net");
        assert!(net <= for_net && for_net <= net + WORKSPACES, "{what}");
        assert!(for_net + rest <= given && given <= for_net + rest + TABLES, "{what}");
        assert!(rest > 10 * TABLES && net > 10 * TABLES, "{what}");
        taken.push(rest);
    }
    // Two tensors of state, of which each of two ranks holds a half where they share the update.
    let parameters = 4 * (16 * 28 + 4 * 16 + 64 * (16 * 49 + 1) + 10 * 65);
    assert!((taken[3] - taken[4]).abs_diff(parameters) < TABLES, "{taken:?}, {parameters} of parameters");
}

#[test]
fn a_batch_that_does_not_fit_is_refused_with_one_that_does() {
    let Some(runs) = Runs::new() else { return };
    let settings = ["run.tf32=true", "batch.global=128"];
    let (code, said) = runs.train("2", "5", &settings);
    assert_eq!(code, Some(6), "{said}");
    for words in [
        "rank 0 on ",
        " lacks memory on Emulated GPU (GPU-6c6f636b",
        ": 64 samples at once take ",
        "(activations, their gradients, scratch ",
        ", optimizer state ",
        " of 5.0 MiB, for 2 ranks; 0.0 MiB are taken",
        " samples at once fit: set batch.global = ",
        ", or batch.micro = ",
    ] {
        assert_eq!(said.matches(words).count(), 1, "{words} in {said}");
    }
    let after = |words: &str| said.split_once(words).unwrap().1.trim_start().split(['.', ',', '\n']).next().unwrap();
    for key in ["batch.global", "batch.micro"] {
        let setting = format!("{key}={}", after(&format!("{key} =")));
        let (code, said) = runs.train("2", "5", &[settings[0], settings[1], &setting]);
        assert_eq!(code, Some(0), "{setting}: {said}");
    }
    assert_eq!(summary(&runs.folder.path().join("out"))["world_size"], 2);

    let (code, said) = runs.train("1", "2", &[settings[0], "model.layers.4.units=256"]);
    assert_eq!(code, Some(6), "{said}");
    assert!(said.contains("Not even one sample fits"), "{said}");
}

/// Pinned memory takes milliseconds to get.
#[test]
fn evaluations_share_the_memory_that_the_gpu_copies_from() {
    let Some(runs) = Runs::new() else { return };
    let pinned = |every: &str| {
        let settings = ["run.steps=4", every, "data.validation=0.1"];
        let mut command = runs.training("1", &settings);
        let output = command.env("LOCKSTEP_EMULATOR_TELLS", "pinned").assert().success().get_output().clone();
        let said = String::from_utf8(output.stderr).unwrap();
        said.lines().filter(|line| line.starts_with("pinned ")).count()
    };
    let (once, often) = (pinned("eval.every_steps=4"), pinned("eval.every_steps=1"));
    assert!(once > 0 && often == once, "{once} allocations for one evaluation while training, {often} for four");
}

/// Where buffers of the real lengths, or the workspaces of some algorithms, find no room, the others do.
#[test]
fn what_cannot_be_timed_is_chosen_by_its_need_of_memory() {
    let one = [("LOCKSTEP_EMULATOR_MEMORY_MIB", "1")];
    let test = "memory::what_cannot_be_timed_is_chosen_by_its_need_of_memory";
    let Some(gpu) = emulator::alone_with(test, &one) else { return };
    let rules = Rules { nondeterministic: false, tf32: false, direct: false, workspace: 1 << 20 };
    let convolution = Convolution {
        batch: 3,
        input: [8, 8, 8],
        output: [8, 8, 24],
        kernel: [3, 3],
        stride: [1, 1],
        before: [1, 1],
        after: [1, 1],
        groups: 1,
    };
    let plain = cudnn::Product::Forward { bias: false, relu: false };
    let graph = Arc::new(Graph::new(&gpu.cudnn().unwrap(), convolution, plain, Element::F32).unwrap());
    let buffers: usize = graph.buffers().iter().sum();
    let result = 4 * 3 * 8 * 8 * 24;
    // Its engines want as much workspace as the result has bytes, and 48 bytes more.
    for left in [buffers + result + 16, buffers + 16, 0] {
        let _taken = gpu.allocate(gpu.memory().unwrap().free - left).unwrap();
        let plan = fastest(&gpu, &graph, rules).unwrap();
        assert_eq!((plan.name(), plan.workspace_bytes()), ("eng4_k13=16", result), "with {left} bytes left");
    }

    let _taken = gpu.allocate(gpu.memory().unwrap().free).unwrap();
    let product = Product {
        m: 23,
        n: 16,
        k: 31,
        transpose_left: false,
        transpose_right: true,
        factors: Element::F32,
        result: Element::F32,
        tf32: false,
        epilogue: Epilogue::None,
    };
    assert_eq!(Matmul::new(&gpu, &product).unwrap().workspace_bytes(), 0);
}
