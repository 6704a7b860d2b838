//! Whole runs on folders of photographs: equal bits whatever the ranks and workers, through interruptions, and around files
//! that are no images; and runs on made-up images.

#[path = "common/runs.rs"]
mod runs;

use assert_cmd::Command;
use runs::{program, summary};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// 54 training images are 3.4 steps of 16.
const CONFIG: &str = r#"
[run]
name = "images"
seed = 3
epochs = 3
[data]
format = "images"
path = "overridden"
augment = ["random_resized_crop", "horizontal_flip", "lighting", { type = "normalize", statistics = "imagenet" }]
[batch]
global = 16
micro = 4
[model]
input = [24, 24, 3]
layers = [
    { type = "conv2d", filters = 6, kernel = 5, stride = 4, activation = "relu" },
    { type = "flatten" },
    { type = "linear", units = 8 },
]
[optimizer]
type = "sgd"
lr = 0.01
"#;

/// A generated folder of 60 images of 3 classes, 54 of them for training.
fn pictures(folder: &TempDir) -> PathBuf {
    let path = folder.path().join("pictures");
    let size = ["--images", "60", "--classes", "3", "--size", "60x41", "--seed", "5"];
    program().args(["data", "generate"]).arg(&path).args(size).assert().success();
    path
}

fn trainer(out: &Path, data: &Path, ranks: usize, settings: &[&str]) -> Command {
    let mut command = runs::trainer(CONFIG, out, ranks, settings);
    command.arg("--set").arg(format!("data.path={}", data.display()));
    command
}

/// A finished run's summary.
fn run(folder: &TempDir, name: &str, data: &Path, ranks: usize, settings: &[&str]) -> Value {
    let out = folder.path().join(name);
    trainer(&out, data, ranks, settings).assert().success();
    summary(&out)
}

#[test]
fn ranks_and_workers_and_interruptions_do_not_change_a_bit() {
    let folder = tempfile::tempdir().unwrap();
    let data = pictures(&folder);
    let one = run(&folder, "1", &data, 1, &[]);
    assert_eq!((one["steps"].as_u64(), one["skipped_images"].as_u64()), (Some(12), Some(0)));
    for (name, ranks, settings) in [("workers", 1, &["data.workers=3"][..]), ("2", 2, &["data.workers=2"])] {
        assert_eq!(run(&folder, name, &data, ranks, settings)["weights_digest"], one["weights_digest"], "{name}");
    }
    // In the middle of the second epoch, then on another number of ranks.
    run(&folder, "pieces", &data, 2, &["run.steps=6"]);
    assert_eq!(run(&folder, "pieces", &data, 1, &[])["weights_digest"], one["weights_digest"]);
    assert_ne!(run(&folder, "seed", &data, 1, &["run.seed=4"])["weights_digest"], one["weights_digest"]);
}

#[test]
fn a_damaged_image_stops_the_run_by_name_or_is_skipped_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let data = pictures(&folder);
    let file = |part: &str, class: &str| {
        let mut files: Vec<PathBuf> =
            fs::read_dir(data.join(part).join(class)).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files.remove(0)
    };
    let (training, test) = (file("train", "class-0001"), file("val", "class-0002"));
    let half = fs::read(&training).unwrap();
    fs::write(&training, &half[..half.len() / 2]).unwrap();
    fs::write(&test, "no image").unwrap();

    let failed = trainer(&folder.path().join("error"), &data, 2, &[]).assert().code(3);
    let text = String::from_utf8_lossy(&failed.get_output().stderr).into_owned();
    assert!(text.contains("on_bad_image = \"skip\""), "{text}");
    assert!([&training, &test].iter().any(|path| text.contains(path.to_str().unwrap())), "{text}");

    // Each epoch wants the training image once; after each, and so three times, the test image is wanted.
    let skip = "data.on_bad_image=skip";
    let one = run(&folder, "1", &data, 1, &[skip]);
    assert_eq!((one["steps"].as_u64(), one["skipped_images"].as_u64()), (Some(12), Some(6)));
    let two = run(&folder, "2", &data, 2, &[skip, "data.workers=2"]);
    assert_eq!((&two["weights_digest"], &two["skipped_images"]), (&one["weights_digest"], &one["skipped_images"]));
    let metrics = fs::read_to_string(folder.path().join("2/metrics.jsonl")).unwrap();
    assert!(metrics.lines().any(|line| line.contains("\"eval\"") && line.contains("\"samples\":5")), "{metrics}");
}

#[test]
fn a_test_set_without_a_whole_image_is_said_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let data = pictures(&folder);
    for class in fs::read_dir(data.join("val")).unwrap() {
        for image in fs::read_dir(class.unwrap().path()).unwrap() {
            fs::write(image.unwrap().path(), "no image").unwrap();
        }
    }
    let settings = ["data.on_bad_image=skip", "run.steps=1"];
    let failed = trainer(&folder.path().join("run"), &data, 2, &settings).assert().code(3);
    let text = String::from_utf8_lossy(&failed.get_output().stderr).into_owned();
    assert!(text.contains("every one of the 6 images of the test set is damaged"), "{text}");
    assert!(text.contains("repair or replace these files"), "{text}");
}

#[test]
fn any_configuration_runs_without_data_on_made_up_images() {
    let folder = tempfile::tempdir().unwrap();
    let settings = ["data.format=synthetic", "data.train=64", "data.test=16"];
    let out = folder.path().join("synthetic");
    let config = out.with_extension("toml");
    fs::write(&config, CONFIG).unwrap();
    let mut command = program();
    command.args(["-n", "2", "--config"]).arg(config).arg("--out").arg(&out);
    for setting in settings {
        command.args(["--set", setting]);
    }
    command.assert().success();
}

#[test]
fn going_on_with_other_data_is_warned_of_once() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (pictures(&folder), folder.path().join("run"));
    let warnings = |steps: &str| {
        let done = trainer(&out, &data, 2, &[steps]).assert().success();
        let said = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        said.lines().filter(|line| line.contains("was saved with another training set")).count()
    };
    assert_eq!(["run.steps=3", "run.steps=6"].map(warnings), [0, 0]);
    // The same images under another name, which leaves the order and every number of the set as it was.
    for part in ["train", "val"] {
        fs::rename(data.join(part).join("class-0001"), data.join(part).join("class-0001b")).unwrap();
    }
    assert_eq!(["run.steps=7", "run.steps=8"].map(warnings), [1, 0]);
}

/// Without a word on sizes, on a flat folder whose classes are in the names, with more outputs than classes.
#[test]
fn a_plain_folder_just_works() {
    let folder = tempfile::tempdir().unwrap();
    let data = pictures(&folder);
    let flat = folder.path().join("flat");
    fs::create_dir(&flat).unwrap();
    for class in ["class-0000", "class-0001", "class-0002"] {
        for entry in fs::read_dir(data.join("train").join(class)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, flat.join(format!("{class}_{}", path.file_name().unwrap().to_str().unwrap()))).unwrap();
        }
    }
    let summary = run(&folder, "flat-run", &flat, 1, &["data.augment=[]", "data.test=0.25"]);
    assert!(summary["test_accuracy"].is_number(), "{summary}");
}

/// With more outputs than classes, and one class smaller than the others: `plan` and training alike.
#[test]
fn balance_is_among_the_classes_that_occur() {
    let folder = tempfile::tempdir().unwrap();
    let data = pictures(&folder);
    for entry in fs::read_dir(data.join("train/class-0001")).unwrap().skip(4) {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    let plain = run(&folder, "plain", &data, 1, &[]);
    for setting in ["loss.class_weights=balanced", "data.sampler=balanced"] {
        let mut plan = program();
        plan.args(["plan", "--np", "2", "--config"]).arg(folder.path().join("plain.toml"));
        plan.arg("--set").arg(format!("data.path={}", data.display())).args(["--set", setting]).assert().success();

        let one = run(&folder, &format!("1-{setting}"), &data, 1, &[setting]);
        let two = run(&folder, &format!("2-{setting}"), &data, 2, &[setting]);
        assert_eq!(one["weights_digest"], two["weights_digest"], "{setting}");
        assert_ne!(one["weights_digest"], plain["weights_digest"], "{setting} changes nothing");
        assert!(one["train_loss"].as_f64().is_some_and(|loss| loss.is_finite() && loss > 0.0), "{setting}: {one}");
    }
}
