//! Whole runs: equal bits whatever the ranks and the transport, and through every interruption.

#[path = "common/runs.rs"]
mod runs;

use assert_cmd::Command;
use runs::{program, summary};
use safetensors::SafeTensors;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// 150 training samples are 4.7 steps of 32, so every epoch ends with a short one; validation, dropout, batch statistics
/// and clipping are all there. Sixteen micro-batches a step serve up to 8 ranks, two each.
const CONFIG: &str = r#"
[run]
name = "run"
seed = 3
epochs = 3
[data]
format = "shapes"
train = 200
test = 70
validation = 0.25
augment = ["random_crop", "horizontal_flip", "normalize"]
[batch]
global = 32
micro = 2
[model]
input = [32, 32, 3]
[[model.layers]]
type = "conv2d"
name = "conv1"
filters = 6
kernel = 3
stride = 4
[[model.layers]]
type = "batch_norm"
activation = "relu"
[[model.layers]]
type = "dropout"
rate = 0.2
[[model.layers]]
type = "conv2d"
name = "conv2"
filters = 12
kernel = 3
stride = 2
activation = "relu"
[[model.layers]]
type = "global_avg_pool"
[[model.layers]]
type = "linear"
units = 10
[optimizer]
type = "adam"
lr = 0.01
clip_norm = 1.0
[parallel]
bucket_mib = 0.001
[log]
every_steps = 1
"#;

fn trainer(out: &Path, ranks: usize, settings: &[&str]) -> Command {
    runs::trainer(CONFIG, out, ranks, settings)
}

/// What `trainer eval` says.
fn eval(out: &Path, checkpoint: &Path, ranks: usize, more: &[&str]) -> String {
    let mut command = program();
    command.args(["-n", &ranks.to_string(), "eval", "--config"]).arg(out.with_extension("toml"));
    let output = command.arg("--checkpoint").arg(checkpoint).args(more).unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn digest(out: &Path) -> String {
    summary(out)["weights_digest"].as_str().unwrap().to_owned()
}

/// A finished run's digest.
fn run(folder: &TempDir, name: &str, ranks: usize, settings: &[&str]) -> String {
    let out = folder.path().join(name);
    trainer(&out, ranks, settings).assert().success();
    digest(&out)
}

#[test]
fn ranks_transports_threads_and_buckets_do_not_change_a_bit() {
    let folder = tempfile::tempdir().unwrap();
    let one = run(&folder, "1", 1, &[]);
    for (name, ranks, settings) in [
        ("again", 1, &[][..]),
        ("2", 2, &[]),
        ("4", 4, &[]),
        ("8", 8, &[]),
        ("tcp2", 2, &["parallel.transport=tcp"]),
        ("tcp4", 4, &["parallel.transport=tcp"]),
        ("late", 2, &["parallel.overlap=false"]),
        ("whole", 2, &["parallel.bucket_mib=64"]),
        ("workers", 2, &["data.workers=3"]),
    ] {
        assert_eq!(run(&folder, name, ranks, settings), one, "{name}");
    }
    assert_ne!(run(&folder, "seed", 1, &["run.seed=4"]), one);
}

#[test]
fn without_micro_batches_two_runs_and_both_transports_still_agree() {
    let folder = tempfile::tempdir().unwrap();
    let settings = |transport| [transport, "batch.micro=16", "batch.global=48"];
    let shm = run(&folder, "shm", 3, &settings("parallel.transport=shm"));
    assert_eq!(run(&folder, "again", 3, &settings("parallel.transport=shm")), shm);
    assert_eq!(run(&folder, "tcp", 3, &settings("parallel.transport=tcp")), shm);
}

/// The same samples, dropout and initial weights: what differs is the rounding of activations.
#[test]
fn bf16_learns_like_f32() {
    let folder = tempfile::tempdir().unwrap();
    let [wide, narrow] = ["f32", "bf16"].map(|precision| {
        let precision_key = format!("run.precision={precision}");
        let easier = ["run.epochs=20", "batch.micro=16", "data.augment=[\"normalize\"]", &precision_key];
        run(&folder, precision, 2, &easier);
        train_losses(&folder.path().join(precision))
    });
    assert_eq!((wide.len(), narrow.len()), (100, 100));
    for steps in [0..20, 40..60, 80..100] {
        let mean = |losses: &[f64]| losses[steps.clone()].iter().sum::<f64>() / steps.len() as f64;
        let (wide, narrow) = (mean(&wide), mean(&narrow));
        assert!((narrow / wide - 1.0).abs() < 0.02, "steps {steps:?}: {narrow} in bf16, {wide} in f32");
    }
    assert!(wide[99] < 0.75 * wide[0], "it learns: {wide:?}");
}

#[test]
fn bf16_gives_the_same_bits_on_all_ranks_transports_and_through_interruptions() {
    let folder = tempfile::tempdir().unwrap();
    let bf16 = "run.precision=bf16";
    let one = run(&folder, "1", 1, &[bf16]);
    assert_ne!(run(&folder, "f32", 1, &[]), one);
    for (name, ranks, settings) in [
        ("2", 2, &[bf16][..]),
        ("4", 4, &[bf16]),
        ("tcp2", 2, &[bf16, "parallel.transport=tcp"]),
        ("whole", 2, &[bf16, "parallel.bucket_mib=64", "parallel.overlap=false"]),
    ] {
        assert_eq!(run(&folder, name, ranks, settings), one, "{name}");
    }
    let pieces = folder.path().join("pieces");
    for (ranks, steps) in [(2, 4), (4, 11), (1, 15)] {
        trainer(&pieces, ranks, &[bf16, &format!("run.steps={steps}")]).assert().success();
    }
    assert_eq!(digest(&pieces), one);
}

#[test]
fn a_checkpoint_goes_on_in_either_precision() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    for (precision, steps) in [("f32", 3), ("bf16", 6), ("f32", 9)] {
        let settings = [format!("run.precision={precision}"), format!("run.steps={steps}")];
        trainer(&out, 2, &settings.each_ref().map(|setting| &setting[..])).assert().success();
    }
    assert_eq!(train_losses(&out).len(), 9);
}

/// Of every step that the run has made, in order.
fn train_losses(out: &Path) -> Vec<f64> {
    let metrics = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let records = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let train = records.filter(|record| record["kind"] == "train");
    train.map(|record| record["loss"].as_f64().unwrap()).collect()
}

/// Ended after any number of steps and continued on any number of ranks, a run uses the samples of the uninterrupted
/// one: a single sample used twice or left out would change the weights.
#[test]
fn a_run_in_pieces_on_changing_ranks_ends_with_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    let whole = run(&folder, "whole", 2, &[]);
    for (name, pieces) in [("a", [(2, 3), (1, 7)]), ("b", [(2, 6), (4, 11)]), ("c", [(8, 5), (2, 14)])] {
        let out = folder.path().join(name);
        for (ranks, steps) in pieces {
            trainer(&out, ranks, &[&format!("run.steps={steps}")]).assert().success();
            assert_eq!(summary(&out)["stopped_by"], "steps");
        }
        trainer(&out, 4, &[]).assert().success();
        assert_eq!(digest(&out), whole, "{pieces:?}");
        let metrics = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        let steps: Vec<u64> = metrics
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
            .filter(|record| record["kind"] == "train")
            .map(|record| record["step"].as_u64().unwrap())
            .collect();
        assert_eq!(steps, (1..=15).collect::<Vec<_>>());
    }
}

#[test]
fn a_complete_run_says_so_and_how_to_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    trainer(&out, 2, &[]).assert().success();
    let before = fs::read(out.join("summary.json")).unwrap();
    let again = trainer(&out, 2, &[]).assert().success().get_output().clone();
    let said = String::from_utf8_lossy(&again.stdout).into_owned();
    assert!(said.contains("is complete: it has done its 3 epochs") && said.contains("--set run.epochs"), "{said}");
    assert_eq!(fs::read(out.join("summary.json")).unwrap(), before);

    trainer(&out, 2, &["run.epochs=4"]).assert().success();
    assert_eq!(summary(&out)["epochs"], 4);

    let other = trainer(&out, 2, &["optimizer.lr=0.02"]).assert().code(2).get_output().clone();
    let said = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(said.contains("optimizer.lr") && said.contains("--resume none"), "{said}");
    trainer(&out, 2, &["optimizer.lr=0.02"]).args(["--resume", "none"]).assert().success();
    assert!(out.join("checkpoints.1").is_dir(), "the earlier checkpoints are moved, not lost");
}

#[test]
fn an_end_that_was_interrupted_is_made_up() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    trainer(&out, 2, &[]).assert().success();
    let whole = summary(&out);
    fs::remove_file(out.join("summary.json")).unwrap();
    trainer(&out, 2, &[]).assert().success();
    for key in ["weights_digest", "test_accuracy", "val_loss", "steps", "stopped_by"] {
        assert_eq!(summary(&out)[key], whole[key], "{key}");
    }
}

#[test]
fn checkpoints_are_never_lost_to_a_run_that_cannot_use_them() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let checkpoints = out.join("checkpoints");
    let saved = |path: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors")).collect()
    };
    trainer(&out, 2, &["checkpoint.keep=3"]).assert().success();
    assert_eq!(saved(&checkpoints).len(), 3);

    let older = checkpoints.join("step-00000005.safetensors");
    let kept = folder.path().join("older");
    fs::copy(&older, &kept).unwrap();
    trainer(&out, 2, &["checkpoint.keep=3"]).arg("--resume").arg(&older).assert().success();
    let aside = saved(&out.join("checkpoints.1")).len();
    assert_eq!((aside, saved(&checkpoints).len()), (3, 3), "the earlier run is whole in checkpoints.1");

    for checkpoint in saved(&checkpoints) {
        fs::write(checkpoint, "not a checkpoint").unwrap();
    }
    let output = trainer(&out, 2, &[]).assert().code(3).get_output().clone();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("none of the checkpoints") && said.contains("--resume none"), "{said}");
    assert_eq!(saved(&checkpoints).len(), 3);
    trainer(&out, 2, &["run.epochs=2"]).arg("--resume").arg(&kept).assert().success();
    assert_eq!(saved(&out.join("checkpoints.2")).len(), 3);
}

#[test]
fn every_sample_is_counted_once_in_metrics_and_evaluation() {
    let folder = tempfile::tempdir().unwrap();
    for ranks in [1, 4] {
        let out = folder.path().join(ranks.to_string());
        trainer(&out, ranks, &["log.every_steps=5"]).assert().success();
        let summary = summary(&out);
        // 150 samples an epoch in the last one; accuracies are whole numbers of samples.
        for (accuracy, samples) in [("train_accuracy", 150.0), ("val_accuracy", 50.0), ("test_accuracy", 70.0)] {
            let correct = summary[accuracy].as_f64().unwrap() * samples;
            assert!((correct - correct.round()).abs() < 1e-6, "{ranks} ranks: {accuracy} is {correct} of {samples}");
        }
    }
}

#[test]
fn eval_gives_the_numbers_of_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    trainer(&out, 2, &[]).assert().success();
    let said = eval(&out, &out.join("checkpoints/step-00000015.safetensors"), 2, &[]);
    let accuracy = format!("accuracy {:.4}", summary(&out)["test_accuracy"].as_f64().unwrap());
    assert!(said.lines().any(|line| line.to_lowercase().starts_with("test") && line.contains(&accuracy)), "{said}");
}

/// The logits are those of the accuracy that is printed, in the order of the set whatever the ranks; and weights that come
/// from elsewhere, without what Lockstep says of a checkpoint, give the same.
#[test]
fn eval_writes_logits_and_reads_weights_of_other_programs() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    trainer(&out, 1, &["run.epochs=1"]).assert().success();
    let checkpoint = out.join("checkpoints/step-00000005.safetensors");
    let weights = folder.path().join("weights.safetensors");
    let file = fs::read(&checkpoint).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap().tensors();
    let params = tensors.into_iter().filter(|(name, _)| !name.starts_with("optimizer."));
    fs::write(&weights, safetensors::serialize(params, None).unwrap()).unwrap();

    let logits = |from: &Path, ranks: usize| {
        let path = folder.path().join(format!("{ranks}.safetensors"));
        let said = eval(&out, from, ranks, &["--logits", path.to_str().unwrap()]);
        (said, fs::read(path).unwrap())
    };
    let (said, file) = logits(&checkpoint, 1);
    assert!(logits(&checkpoint, 4).1 == file && logits(&weights, 1).1 == file);

    let tensors = SafeTensors::deserialize(&file).unwrap();
    let [logits, labels] = ["logits", "labels"].map(|name| tensors.tensor(name).unwrap());
    assert_eq!((logits.shape(), labels.shape()), (&[70, 10][..], &[70][..]));
    let rows = logits.data().as_chunks::<4>().0.chunks_exact(10);
    let largest =
        |row: &[[u8; 4]]| (0..10).max_by(|&a, &b| f32::from_le_bytes(row[a]).total_cmp(&f32::from_le_bytes(row[b])));
    let labels = labels.data().as_chunks::<8>().0.iter().map(|label| i64::from_le_bytes(*label) as usize);
    let correct = rows.zip(labels).filter(|(row, label)| largest(row) == Some(*label)).count();
    assert!(said.contains(&format!("accuracy {:.4}  (70", correct as f64 / 70.0)), "{said}");
}

#[test]
fn a_run_on_the_cpu_tells_of_no_gpu() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("cpu");
    trainer(&out, 2, &["run.steps=2", "run.device=cpu"]).assert().success();
    for file in ["metrics.jsonl", "summary.json"] {
        let text = fs::read_to_string(out.join(file)).unwrap();
        assert!(!text.contains("gpu"), "{file}: {text}");
    }
}

#[test]
fn target_accuracy_and_minutes_end_a_run_in_order() {
    let folder = tempfile::tempdir().unwrap();
    for (name, setting) in [("target_accuracy", "run.target_accuracy=0.01"), ("max_minutes", "run.max_minutes=1e-9")] {
        let out = folder.path().join(name);
        trainer(&out, 2, &[setting]).assert().success();
        let summary = summary(&out);
        assert_eq!(summary["stopped_by"], name);
        assert!(summary["test_accuracy"].is_f64() && summary["steps"].as_u64().unwrap() < 15, "{summary}");
    }
}

/// Three steps of an epoch of five. What a setting does is the matter of other tests; here, that it reaches the run: it
/// trains, its losses are finite, and the weights are others than without it.
#[test]
fn every_setting_trains() {
    let folder = tempfile::tempdir().unwrap();
    let elsewhere = folder.path().join("elsewhere");
    let directory = format!("checkpoint.directory={}", elsewhere.display());
    let losses = |name: &str, settings: &[&str]| {
        let out = folder.path().join(name);
        trainer(&out, 2, &[settings, &["run.steps=3"]].concat()).assert().success();
        let metrics = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        let records: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(records.len() >= 5, "three steps and two evaluations: {metrics}");
        for record in records {
            assert!(record["loss"].as_f64().is_some_and(f64::is_finite), "{name}: {record}");
        }
        digest(&out)
    };
    let plain = losses("plain", &[]);
    assert_eq!(losses("directory", &[&directory]), plain);
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 1, "the checkpoint is where checkpoint.directory says");

    let local = losses("local", &["batch={ local = 10, micro = 2 }"]);
    // Of 200 samples every class has as many as the others, and its balanced weight is 1.
    let uneven = losses("uneven", &["data.train=203"]);
    let rows: &[(&str, &[&str])] = &[
        ("balanced", &["loss.class_weights=balanced", "data.train=203"]),
        ("weights", &["loss.class_weights=[1, 2, 3, 4, 5, 6, 7, 8, 9, 0]"]),
        ("smoothing", &["loss.label_smoothing=0.1"]),
        ("kl_divergence", &["loss={ type = \"kl_divergence\", label_smoothing = 0.2 }"]),
        ("mse", &["loss.type=mse"]),
        ("scaled", &["batch={ local = 10, micro = 2 }", "schedule.scale_lr_with_world=true"]),
        ("warm", &["schedule={ type = \"constant\", warmup_steps = 2 }"]),
        ("every", &["schedule={ type = \"step\", every_epochs = 0.2 }"]),
        ("at", &["schedule={ type = \"step\", at_epochs = [0.2] }"]),
        ("exponential", &["schedule={ type = \"exponential\", gamma = 0.5 }"]),
        ("polynomial", &["schedule={ type = \"polynomial\", power = 2 }"]),
        ("cosine", &["schedule={ type = \"cosine\", end_lr = 0.001 }"]),
        ("sgd", &["optimizer={ type = \"sgd\", lr = 0.1 }"]),
        ("nesterov", &["optimizer={ type = \"sgd\", lr = 0.1, momentum = 0.9, nesterov = true }"]),
        ("adamw", &["optimizer={ type = \"adamw\", lr = 0.01, weight_decay = 0.1 }"]),
        ("adagrad", &["optimizer={ type = \"adagrad\", lr = 0.01, lr_decay = 0.1 }"]),
        ("adadelta", &["optimizer={ type = \"adadelta\", lr = 1 }"]),
        ("rho", &["optimizer={ type = \"adadelta\", lr = 0.01, rho = 1 }"]),
        ("lars", &["optimizer={ type = \"lars\", lr = 1 }"]),
        ("clip_value", &["optimizer.clip_value=0.001"]),
        ("l1", &["optimizer.l1=0.1"]),
        ("weight_decay", &["optimizer.weight_decay=0.1"]),
    ];
    let mut seen = vec![plain, local, uneven];
    for (name, settings) in rows {
        let digest = losses(name, settings);
        assert!(!seen.contains(&digest), "{name} changes nothing");
        seen.push(digest);
    }
}

#[test]
fn a_loss_that_is_not_finite_ends_with_code_5_and_names_step_and_layer() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let settings = ["optimizer.type=\"sgd\"", "optimizer.lr=1e30", "optimizer.clip_norm=1e30"];
    let output = trainer(&out, 2, &settings).assert().code(5).get_output().clone();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("not finite") || said.contains("NaN") || said.contains("inf"), "{said}");
    assert!(said.contains("in step 2") || said.contains("in step 3"), "{said}");
    assert!(said.contains("layer `") || said.contains("parameter `"), "{said}");
    assert_eq!(summary(&out)["stopped_by"], "error");
}
