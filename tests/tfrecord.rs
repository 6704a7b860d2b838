//! Whole runs on TFRecord files: the program packs a set, and trains on what it has packed.

#[path = "common/runs.rs"]
mod runs;

use runs::{program, summary};
use std::fs;
use std::path::Path;

const CONFIG: &str = r#"
[run]
name = "run"
seed = 3
epochs = 2
[data]
format = "shapes"
train = 200
test = 70
validation = 0.25
augment = ["random_crop", "horizontal_flip", "normalize"]
[batch]
global = 32
micro = 4
[model]
input = [32, 32, 3]
layers = [
    { type = "conv2d", filters = 6, kernel = 3, stride = 4, activation = "relu" },
    { type = "global_avg_pool" },
    { type = "linear", units = 10 },
]
[optimizer]
type = "sgd"
lr = 0.1
momentum = 0.9
"#;

/// Packs the set of `CONFIG` and returns the configuration that trains on it.
fn pack(folder: &Path) -> String {
    let config = folder.join("shapes.toml");
    fs::write(&config, CONFIG).unwrap();
    let packed = folder.join("packed");
    let mut command = program();
    command.args(["data", "pack", "--shards", "3", "--config"]).arg(&config).arg("--out").arg(&packed);
    let said = String::from_utf8(command.assert().success().get_output().stdout.clone()).unwrap();
    assert!(said.lines().any(|line| line.split_whitespace().eq(["7", "20", "7"])), "counts of class 7: {said}");
    assert!(said.lines().any(|line| line.trim_start().starts_with("train") && line.contains("200")), "{said}");
    let section = &said[said.find("[data]").expect("a section to copy")..];
    let shared = "validation = 0.25\naugment = [\"random_crop\", \"horizontal_flip\", \"normalize\"]\n";
    let (before, rest) = CONFIG.split_once("[data]").unwrap();
    format!("{before}{section}{shared}{}", &rest[rest.find("[batch]").unwrap()..])
}

/// Trains and returns the digest of the weights.
fn train(out: &Path, config: &str, ranks: usize, settings: &[&str]) -> String {
    runs::trainer(config, out, ranks, settings).assert().success();
    summary(out)["weights_digest"].as_str().unwrap().to_owned()
}

#[test]
fn training_on_the_packed_set_gives_the_bits_of_the_original() {
    let folder = tempfile::tempdir().unwrap();
    let packed = pack(folder.path());
    let original = train(&folder.path().join("original"), CONFIG, 1, &[]);
    assert_eq!(train(&folder.path().join("a"), &packed, 2, &[]), original);
    let [a, b] = ["original", "a"].map(|out| summary(&folder.path().join(out)));
    assert_eq!(a["test_loss"], b["test_loss"]);
    assert_ne!(train(&folder.path().join("b"), &packed, 2, &["data.shuffle_buffer=40"]), original);
}

/// JPEG files are packed as they are, and decoded and framed from there.
#[test]
fn photographs_train_from_records_as_from_their_folder() {
    let folder = tempfile::tempdir().unwrap();
    let [pictures, packed] = ["pictures", "packed"].map(|name| folder.path().join(name));
    let mut generate = program();
    generate.args(["data", "generate", "--images", "60", "--classes", "3", "--size", "70x50"]).arg(&pictures);
    generate.assert().success();
    let section = |format: &str, path: &Path| {
        let keys =
            "augment = [{ type = \"resize\", shorter = 40 }, \"random_crop\", \"horizontal_flip\", \"lighting\"]\n";
        let (before, rest) = CONFIG.split_once("[data]").unwrap();
        let rest = rest[rest.find("[batch]").unwrap()..].replace("units = 10", "units = 3");
        format!("{before}[data]\nformat = \"{format}\"\npath = {path:?}\n{keys}{rest}")
    };
    let original = section("images", &pictures);
    let config = folder.path().join("images.toml");
    fs::write(&config, &original).unwrap();
    let mut pack = program();
    pack.args(["data", "pack", "--config"]).arg(&config).arg("--out").arg(&packed).assert().success();
    let classes = fs::read_to_string(packed.join("classes.txt")).unwrap();
    assert_eq!(classes.lines().count(), 3, "{classes}");

    let expected = train(&folder.path().join("a"), &original, 1, &[]);
    assert_eq!(train(&folder.path().join("b"), &section("tfrecord", &packed), 2, &[]), expected);
}

/// With a window smaller than the set, and samples drawn more than once, any number of ranks ends with the same weights,
/// through an interruption in mid-epoch too. The indexes are gone, so that the ranks make them anew.
#[test]
fn ranks_and_interruptions_do_not_change_a_bit() {
    let folder = tempfile::tempdir().unwrap();
    let config = pack(folder.path());
    for entry in fs::read_dir(folder.path().join("packed")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "index") {
            fs::remove_file(path).unwrap();
        }
    }
    for settings in [&["data.shuffle_buffer=40"][..], &["data.sampler=balanced"]] {
        let out = |name: &str| folder.path().join(format!("{name}-{}", settings[0]));
        let whole = train(&out("1"), &config, 1, settings);
        for ranks in [2, 4, 8] {
            assert_eq!(train(&out(&ranks.to_string()), &config, ranks, settings), whole, "{ranks} ranks, {settings:?}");
        }
        let pieces = out("pieces");
        for (ranks, steps) in [(2, "run.steps=3"), (1, "run.steps=7")] {
            train(&pieces, &config, ranks, &[settings, &[steps]].concat());
        }
        assert_eq!(train(&pieces, &config, 4, settings), whole, "in pieces, {settings:?}");
    }
}

#[test]
fn an_emptied_file_is_named_once_and_the_others_are_trained_on() {
    let folder = tempfile::tempdir().unwrap();
    let config = pack(folder.path());
    fs::write(folder.path().join("packed/train-00001-of-00003"), "").unwrap();
    let run = runs::trainer(&config, &folder.path().join("run"), 2, &["run.epochs=1"]).assert().success();
    let said = String::from_utf8_lossy(&run.get_output().stderr).into_owned();
    let warnings: Vec<&str> = said.lines().filter(|line| line.contains("packed/train-00001-of-00003")).collect();
    assert!(warnings.len() == 1 && warnings[0].starts_with("warning: 1 of 3 TFRecord files are empty"), "{said}");
}
