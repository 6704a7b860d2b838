//! Whole runs of the program with `device = "cuda"` against the same on the CPU.

use crate::emulator;
use crate::runs::{summary, trainer};
use assert_cmd::Command;
use lockstep::train::checkpoint;
use safetensors::SafeTensors;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Every kind of layer that AlexNet has, batch normalisation, several buckets, and a last batch of the epoch that is short.
const CONFIG: &str = r#"
[run]
name = "gpu"
steps = 8
[data]
format = "shapes"
train = 40
test = 24
[batch]
global = 16
micro = 4
[parallel]
bucket_mib = 0.002
[model]
input = [32, 32, 3]
[[model.layers]]
type = "conv2d"
filters = 8
kernel = 5
stride = 4
activation = "relu"
[[model.layers]]
type = "max_pool"
size = 2
[[model.layers]]
type = "lrn"
[[model.layers]]
type = "conv2d"
filters = 8
kernel = 3
padding = "same"
bias = false
[[model.layers]]
type = "batch_norm"
activation = "relu"
[[model.layers]]
type = "flatten"
[[model.layers]]
type = "linear"
units = 16
activation = "relu"
[[model.layers]]
type = "dropout"
rate = 0.25
[[model.layers]]
type = "linear"
units = 10
[optimizer]
type = "sgd"
lr = 0.02
momentum = 0.9
[checkpoint]
every_steps = 3
"#;

/// Where runs leave what they have, and the variables with which they find a GPU.
pub struct Runs {
    config: String,
    folder: TempDir,
    variables: Vec<(&'static str, PathBuf)>,
}

impl Runs {
    pub fn new() -> Option<Runs> {
        Runs::of(CONFIG.to_owned())
    }

    pub fn of(config: String) -> Option<Runs> {
        Some(Runs { config, variables: emulator::variables()?, folder: tempfile::tempdir().unwrap() })
    }

    pub fn out(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn command(&self, out: &str, ranks: usize, settings: &[&str]) -> Command {
        // Wherever the ranks are more than the GPUs.
        let settings = [&["parallel.allow_shared_gpu=true"], settings].concat();
        let mut command = trainer(&self.config, &self.out(out), ranks, &settings);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Trains to the end; gives the summary.
    pub fn train(&self, out: &str, ranks: usize, settings: &[&str]) -> Value {
        self.command(out, ranks, settings).assert().success();
        summary(&self.out(out))
    }

    /// The newest checkpoint of a run.
    fn checkpoint(&self, out: &str) -> Vec<u8> {
        let files = fs::read_dir(self.out(out).join("checkpoints")).unwrap().map(|file| file.unwrap().path());
        let tensors = files.filter(|path| path.extension().is_some_and(|end| end == "safetensors"));
        fs::read(tensors.max().unwrap()).unwrap()
    }

    /// Puts a NaN into a tensor of the newest checkpoint of a run.
    fn spoil(&self, out: &str, tensor: &str) {
        let folder = self.out(out).join("checkpoints");
        let (path, mut state) = checkpoint::newest(&folder, |_| Ok(())).unwrap().unwrap();
        let found = state.tensors.iter_mut().find(|found| found.name == tensor);
        found.unwrap_or_else(|| panic!("no {tensor} in {}", path.display())).values[1] = f32::NAN;
        checkpoint::save(&folder, 3, &state).unwrap();
    }

    /// The greatest relative difference (of norms) of a tensor between two runs, parameters and the optimizer's state.
    pub fn difference(&self, one: &str, other: &str) -> (String, f64) {
        let [one, other] = [one, other].map(|out| self.checkpoint(out));
        let [one, other] = [&one, &other].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
        let values = |tensors: &SafeTensors<'_>, name: &str| -> Vec<f64> {
            let (words, _) = tensors.tensor(name).unwrap().data().as_chunks::<4>();
            words.iter().map(|word| f64::from(f32::from_le_bytes(*word))).collect()
        };
        let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
        let of = |name: &str| {
            let (one, other) = (values(&one, name), values(&other, name));
            let gap: Vec<f64> = one.iter().zip(&other).map(|(a, b)| a - b).collect();
            (name.to_owned(), norm(&gap) / norm(&one).max(f64::MIN_POSITIVE))
        };
        assert_eq!(one.len(), other.len());
        one.names().into_iter().map(of).max_by(|(_, a), (_, b)| a.total_cmp(b)).unwrap()
    }
}

#[test]
fn a_run_on_the_gpu_is_that_on_the_cpu_but_for_rounding() {
    let Some(runs) = Runs::new() else { return };
    let cpu = runs.train("cpu", 1, &["run.device=cpu"]);
    let gpu = runs.train("gpu", 1, &["run.device=cuda"]);
    let (tensor, difference) = runs.difference("cpu", "gpu");
    assert!(difference < 1e-4, "{tensor} differs by {difference:e}");
    let accuracy = |summary: &Value| summary["test_accuracy"].clone();
    assert_eq!(accuracy(&cpu), accuracy(&gpu));
}

/// The samples are made on the GPU, of a set that lies there or of what is sent, and scaled ones on the CPU first: the run is that
/// of the CPU, and where they are made, and by how many workers and ranks, changes no bit.
#[test]
fn augmented_samples_are_those_of_the_cpu_wherever_they_are_made() {
    let Some(runs) = Runs::new() else { return };
    let native = "data.augment=['random_crop', 'horizontal_flip', {type='lighting'}, 'normalize']";
    let scaled = "data.augment=[{type='random_resized_crop', scale=[0.5, 1.0]}, 'horizontal_flip', 'normalize']";
    let close_to_the_cpus = |augment: &str, ways: &[(usize, &str)]| -> Vec<Value> {
        let cpu = format!("cpu-of-{}", ways[0].1);
        runs.train(&cpu, 1, &["run.device=cpu", "data.validation=0.2", augment]);
        let train = |&(ranks, resident): &(usize, &str)| {
            let (out, workers) = (format!("{ranks}-{resident}"), format!("data.workers={ranks}"));
            let resident = format!("data.resident={resident}");
            let settings = ["run.device=cuda", "data.validation=0.2", augment, &resident, &workers];
            let summary = runs.train(&out, ranks, &settings);
            let (tensor, difference) = runs.difference(&cpu, &out);
            assert!(difference < 1e-4, "{out}: {tensor} differs by {difference:e}");
            summary["weights_digest"].clone()
        };
        ways.iter().map(train).collect()
    };
    let digests = close_to_the_cpus(native, &[(1, "on"), (2, "off")]);
    assert_eq!(digests[0], digests[1]);
    close_to_the_cpus(scaled, &[(1, "auto")]);
}

#[test]
fn a_set_that_is_scaled_cannot_be_resident() {
    let Some(runs) = Runs::new() else { return };
    let augment = "data.augment=[{type='resize', shorter=40}]";
    let output = runs
        .command("scaled", 1, &["run.device=cuda", "data.resident=on", augment])
        .assert()
        .code(2)
        .get_output()
        .clone();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("data.resident = \"on\" keeps images on the GPU as they are"), "{error}");
}

/// The gradient of one step, which is the momentum after it. Without batch normalisation, which makes much of small
/// differences: what it hands back has no mean, so that the rounding stands out in the sums that follow.
#[test]
fn a_gradient_in_bf16_is_that_of_the_cpu_but_for_rounding() {
    let config = CONFIG.replace("type = \"batch_norm\"\nactivation", "type = \"dropout\"\nrate = 0.0 # activation");
    let Some(runs) = Runs::of(config) else { return };
    for device in ["cpu", "cuda"] {
        let device_is = format!("run.device={device}");
        runs.train(device, 1, &[&device_is, "run.precision=bf16", "run.steps=1"]);
    }
    let (tensor, difference) = runs.difference("cpu", "cuda");
    assert!(difference < 0.03, "{tensor} differs by {difference:e}");
}

/// With micro-batches the sums are one tree, whoever computes its parts; and two runs do the same.
#[test]
fn one_two_and_four_gpu_ranks_end_with_the_same_weights() {
    let Some(runs) = Runs::new() else { return };
    let of = |ranks: usize, more: &[&str]| {
        let settings = [&["run.device=cuda"], more].concat();
        let out = format!("{ranks}-{}", more.concat().replace(['.', '"'], ""));
        runs.train(&out, ranks, &settings)["weights_digest"].clone()
    };
    for rule in [&[][..], &["optimizer.clip_norm=0.5"], &["run.precision=bf16"]] {
        let one = of(1, rule);
        assert_eq!(of(2, rule), one, "{rule:?}");
        if rule.is_empty() {
            assert_eq!(of(4, &["parallel.transport=tcp"]), one);
        }
    }
}

/// A step that is recorded, of one pass or of several, whose last batch of the epoch is short, is the step call by call.
#[test]
fn graphs_give_the_bits_of_single_calls() {
    let Some(runs) = Runs::new() else { return };
    for (ranks, batch) in [(1, "batch.micro=16"), (2, "batch.micro=4")] {
        let of = |graphs: bool| {
            let graphs = format!("run.cuda_graphs={graphs}");
            let settings = ["run.device=cuda", "parallel.bucket_mib=0.01", batch, &graphs];
            runs.train(&format!("{ranks}-{graphs}"), ranks, &settings)["weights_digest"].clone()
        };
        assert_eq!(of(true), of(false), "{ranks} ranks, {batch}");
    }
}

#[test]
fn where_steps_cannot_be_recorded_the_way_around_is_said() {
    let Some(mut runs) = Runs::new() else { return };
    if std::env::var_os("LOCKSTEP_TEST_GPU").is_some() {
        return eprintln!("skipped: a real GPU records all that is asked of it");
    }
    runs.variables.push(("LOCKSTEP_EMULATOR_REFUSES", "capture".into()));
    let output = runs.command("recorded", 1, &["run.device=cuda"]).assert().code(6).get_output().clone();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("run.cuda_graphs = false goes without"), "{said}");
    assert!(said.contains("CUDA_ERROR_NOT_SUPPORTED"), "{said}");
    runs.train("single", 1, &["run.device=cuda", "run.cuda_graphs=false"]);
}

/// Whatever order of the streams their events leave open. Late is how the emulator runs them otherwise.
#[test]
fn streams_that_run_in_another_order_do_the_same() {
    let Some(runs) = Runs::new() else { return };
    let digest = |order: &str, ranks: usize, rule: &str| {
        let mut command =
            runs.command(&format!("{order}-{ranks}-{rule}"), ranks, &["run.device=cuda", "run.steps=4", rule]);
        command.env("LOCKSTEP_EMULATOR_STREAMS", order).assert().success();
        summary(&runs.out(&format!("{order}-{ranks}-{rule}")))["weights_digest"].clone()
    };
    for rule in ["optimizer.momentum=0.5", "optimizer.clip_norm=0.5"] {
        let late = digest("late", 1, rule);
        for (order, ranks) in [("eager", 2), ("mixed", 1), ("mixed", 2)] {
            assert_eq!(digest(order, ranks, rule), late, "{order}, {ranks} ranks, {rule}");
        }
    }
}

/// As under a limit on locked memory. The warning is one for all ranks of the host.
#[test]
fn gradients_find_a_way_through_memory_that_is_not_pinned() {
    let Some(runs) = Runs::new() else { return };
    if runs.variables.is_empty() {
        eprintln!("skipped: a real driver pins what it is given");
        return;
    }
    let settings = ["run.device=cuda", "run.steps=3"];
    let pinned = runs.train("pinned", 2, &settings);
    let refused = runs.command("refused", 2, &settings).env("LOCKSTEP_EMULATOR_FAILS", "register").assert().success();
    let said = String::from_utf8(refused.get_output().stderr.clone()).unwrap();
    assert_eq!(said.matches("gradients go to the transport on a slower way").count(), 1, "{said}");
    assert!(said.contains("ulimit -l"), "{said}");
    assert_eq!(summary(&runs.out("refused"))["weights_digest"], pinned["weights_digest"]);
}

/// The host is ahead of a GPU, so it learns of a failure at a later call.
#[test]
fn a_kernel_that_fails_is_an_error_of_the_step_in_which_it_is_noticed() {
    let Some(runs) = Runs::new() else { return };
    if runs.variables.is_empty() {
        eprintln!("skipped: a real GPU cannot be told to fail");
        return;
    }
    for ranks in [1, 2] {
        let mut command = runs.command(&ranks.to_string(), ranks, &["run.device=cuda"]);
        command.args(["--max-restarts", "1"]);
        let output = command.env("LOCKSTEP_EMULATOR_FAILS", "update_momentum").assert().code(6).get_output().clone();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains("noticed in step 1: ") || error.contains("noticed in step 2: "), "{error}");
        assert!(error.contains("CUDA_ERROR_LAUNCH_FAILED"), "{error}");
        assert!(
            error.contains("restart 1 of 1") && error.contains("no restart is left"),
            "it may be well again: {error}"
        );
    }
}

#[test]
fn tf32_and_sums_in_any_order_are_used_if_they_are_asked_for() {
    let Some(runs) = Runs::new() else { return };
    let train = |setting: &str| runs.train(setting, 1, &["run.device=cuda", setting]);
    let [exact, tf32, any_order] = ["run.tf32=false", "run.tf32=true", "run.deterministic=false"].map(train);
    let loss = |summary: &Value| summary["test_loss"].as_f64().unwrap();
    for other in [&tf32, &any_order] {
        assert!((loss(other) - loss(&exact)).abs() < 0.02 * loss(&exact), "{other} and {exact}");
    }
    assert_ne!(tf32["weights_digest"], exact["weights_digest"]);
}

/// The first scale overflows, whatever the number of ranks and wherever the run is interrupted; then it trains as in f32.
#[test]
fn fp16_lowers_its_scale_until_nothing_overflows() {
    let Some(runs) = Runs::new() else { return };
    let fp16 = ["run.device=cuda", "run.precision=fp16", "optimizer.loss_scale=1048576", "log.every_steps=2"];
    let train = |out: &str, ranks: usize, more: &[&str]| runs.train(out, ranks, &[&fp16, more].concat());
    let whole = train("whole", 1, &[]);
    let (scale, skipped) = (whole["loss_scale"].as_f64().unwrap(), whole["skipped_updates"].as_i64().unwrap());
    assert!((2..=6).contains(&skipped), "{whole}");
    assert_eq!(scale, 1048576.0 / 2f64.powi(skipped as i32), "{whole}");
    let metrics = fs::read_to_string(runs.out("whole").join("metrics.jsonl")).unwrap();
    let first: Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    assert_eq!((&first["loss_scale"], &first["skipped_updates"]), (&262144.0.into(), &2.into()), "{metrics}");

    let same = |other: Value| {
        for key in ["weights_digest", "loss_scale", "skipped_updates"] {
            assert_eq!(other[key], whole[key], "{key} in {other}");
        }
    };
    same(train("two", 2, &[]));
    same(train("four", 4, &["parallel.transport=tcp"]));
    train("resumed", 2, &["run.steps=1"]);
    train("resumed", 1, &["run.steps=3"]);
    same(train("resumed", 2, &[]));

    let made = format!("run.steps={}", 8 - skipped);
    let f32 = runs.train("f32", 1, &["run.device=cuda", &made]);
    let loss = |summary: &Value| summary["test_loss"].as_f64().unwrap();
    assert!((loss(&f32) - loss(&whole)).abs() < 0.1 * loss(&f32), "{f32} and {whole}");
}

#[test]
fn a_checkpoint_goes_on_on_either_device() {
    let Some(runs) = Runs::new() else { return };
    runs.train("whole", 1, &["run.device=cuda"]);
    runs.train("moved", 2, &["run.device=cuda", "run.steps=3"]);
    runs.train("moved", 1, &["run.device=cpu", "run.steps=6"]);
    runs.train("moved", 2, &["run.device=cuda"]);
    let (tensor, difference) = runs.difference("whole", "moved");
    assert!(difference < 1e-4, "{tensor} differs by {difference:e}");

    let [whole, resumed] = ["whole", "resumed"];
    runs.train(resumed, 2, &["run.device=cuda", "run.steps=3"]);
    runs.train(resumed, 1, &["run.device=cuda"]);
    assert_eq!(summary(&runs.out(whole))["weights_digest"], summary(&runs.out(resumed))["weights_digest"]);
}

/// `CONFIG` with its two linear layers alone.
pub fn two_layers() -> String {
    let (before, rest) = CONFIG.split_once("[[model.layers]]\ntype = \"conv2d\"").unwrap();
    let (_, behind) = rest.split_once("[[model.layers]]\ntype = \"flatten\"").unwrap();
    format!("{before}[[model.layers]]\ntype = \"flatten\"{behind}")
}

/// Batches, passes and the host's reading of losses wait for each other, whatever is done first where they need not.
#[test]
fn streams_in_any_order_give_the_same_samples_and_losses() {
    let Some(runs) = Runs::of(two_layers()) else { return };
    let settings = ["run.device=cuda", "data.augment=['random_crop', 'horizontal_flip']", "data.resident=off"];
    let settings = [&settings[..], &["data.train=136", "data.prefetch=1"]].concat();
    let [lazy, eager, mixed] = ["lazy", "eager", "mixed"].map(|order| {
        runs.command(order, 1, &settings).env("LOCKSTEP_EMULATOR_STREAMS", order).assert().success();
        let summary = summary(&runs.out(order));
        (summary["weights_digest"].clone(), summary["train_loss"].clone())
    });
    assert_eq!(lazy, eager);
    assert_eq!(mixed, eager);
}

/// The first update makes the weights so large that the last layer's output overflows. When the host knows of the loss, it has
/// asked for the update with its gradient; the weights must still be those that made the loss.
#[test]
fn a_loss_that_is_not_finite_halts_its_update_and_is_traced() {
    let Some(runs) = Runs::of(two_layers()) else { return };
    let settings = ["run.device=cuda", "optimizer.lr=1e30"];
    let before = runs.train("before", 1, &[&settings[..], &["run.steps=1"]].concat());
    let output = runs.command("after", 1, &settings).assert().code(5).get_output().clone();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("in step 2: on rank 0, it arose in the output of layer `linear"), "{error}");
    assert_eq!(summary(&runs.out("after"))["weights_digest"], before["weights_digest"]);
}

#[test]
fn without_a_gpu_the_reason_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = Path::new("/nonexistent");
    let mut command = trainer(CONFIG, &folder.path().join("none"), 2, &["run.device=cuda"]);
    let output = command.env("LOCKSTEP_CUDA_PATH", nowhere).assert().failure().get_output().clone();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("libcuda.so.1") || error.contains("LOCKSTEP_CUDA_PATH"), "{error}");
}

/// A ReLU that a library fuses into its product may make a NaN 0: the emulated cuBLASLt's does. So the loss alone does not tell of a
/// parameter that is not finite, and the run must end all the same. Which one is named is open: the NaN spreads.
#[test]
fn a_parameter_that_is_not_finite_ends_the_run_though_a_relu_hides_it() {
    let (before, rest) = CONFIG.split_once("[[model.layers]]\ntype = \"max_pool\"").unwrap();
    let (_, behind) = rest.split_once("[[model.layers]]\ntype = \"flatten\"").unwrap();
    let config = format!("{before}[[model.layers]]\ntype = \"flatten\"{behind}");
    let Some(runs) = Runs::of(config) else { return };
    let train = |out: &str, ranks: usize, steps: &str, more: &[&str]| {
        let settings = [&["run.device=cuda", "batch.micro=8", steps], more].concat();
        let output = runs.command(out, ranks, &settings).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let sharded = ["parallel.transport=nccl", "parallel.nccl_update=sharded"];
    for (layer, ranks, more) in [
        ("conv2d_1", 1, &["run.precision=f32"][..]),
        ("linear_3", 1, &["run.precision=f32"]),
        ("conv2d_1", 1, &["run.precision=bf16"]),
        ("linear_3", 1, &["run.precision=bf16"]),
        ("conv2d_1", 2, &sharded),
        ("linear_3", 2, &sharded),
    ] {
        let out = format!("{layer}-{ranks}-{}", more.concat());
        let begun = train(&out, ranks, "run.steps=3", more);
        assert_eq!(begun.0, Some(0), "{}", begun.1);
        runs.spoil(&out, &format!("{layer}.weight"));
        let (code, said) = train(&out, ranks, "run.steps=8", more);
        assert_eq!(code, Some(5), "{out}: {said}");
        assert!(said.contains("` is not finite: an earlier update broke it"), "{out}: {said}");
    }
}
