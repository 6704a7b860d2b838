//! The real sets, where they are: in $LOCKSTEP_DATA, else in ../shared/data beside the repository. Elsewhere these tests
//! say that they skip.

use assert_cmd::Command;
use lockstep::config::raw::{Data, DataShared, Format, ImageFolder};
use lockstep::data::image::Image;
use lockstep::data::{self, Dataset, Reading, Sets, Target};
use lockstep::model::Shape;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The folder of a set, or a word that the test skips.
fn folder(name: &str) -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data");
    let folder = std::env::var_os("LOCKSTEP_DATA").map_or(beside, PathBuf::from).join(name);
    if !folder.is_dir() {
        eprintln!("SKIPPED: {} is not there; set LOCKSTEP_DATA to the folder that holds {name}", folder.display());
        return None;
    }
    Some(folder)
}

fn open(format: Format, input: Shape, outputs: usize) -> Sets {
    data::open(&Data { format, shared: DataShared::default() }, Target { input, outputs }, 0).unwrap()
}

/// Four steps on two ranks with the configuration that the README names.
fn trains(config: &str, path: &Path) {
    let out = tempfile::tempdir().unwrap();
    let mut command = Command::cargo_bin("trainer").unwrap();
    command.args(["-n", "2", "--config", config, "--set", "run.steps=4"]);
    command.arg("--set").arg(format!("data.path={}", path.display())).arg("--out").arg(out.path());
    command.timeout(Duration::from_secs(300)).current_dir(env!("CARGO_MANIFEST_DIR")).assert().success();
}

#[test]
fn fashion_mnist_is_read_and_trained_on() {
    let Some(path) = folder("fashion-mnist") else { return };
    let sets = open(Format::Idx { path: path.clone() }, Shape::new(28, 28, 1), 10);
    assert_eq!((sets.train.len(), sets.test.len()), (60_000, 10_000));
    assert_eq!(data::class_counts(&*sets.train), [6000; 10]);
    assert_eq!(data::class_counts(&*sets.test), [1000; 10]);
    trains("configs/fashion-mnist-small.toml", &path);
}

#[test]
fn cifar_10_is_read_and_trained_on() {
    let Some(path) = folder("cifar-10") else { return };
    let sets = open(Format::Cifar { path: path.clone() }, Shape::new(32, 32, 3), 10);
    assert_eq!(sets.train.len() % 10_000, 0, "whole batches");
    assert!(data::class_counts(&*sets.train).iter().all(|&count| count > 0));
    trains("configs/cifar10.toml", &path);
}

fn images(path: &Path) -> Sets {
    let folder = ImageFolder { path: path.into(), labels: None, train_folder: None, test_folder: None, test: 0.1 };
    open(Format::Images(folder), Shape::new(224, 224, 3), 1000)
}

/// Every photograph of the set, decoded.
fn decoded(set: &dyn Dataset) -> impl Iterator<Item = (Shape, Vec<u8>)> {
    (0..set.len()).map(|index| {
        let mut image = Image::default();
        assert!(matches!(set.read(index, &mut image).unwrap(), Reading::Whole));
        (image.shape(), image.bytes().to_vec())
    })
}

/// The counts are those of the set's README; one of its images lies on its side.
#[test]
fn photographs_of_imagenet_are_read() {
    let Some(path) = folder("imagenet-sample") else { return };
    let sets = images(&path);
    assert_eq!((sets.train.len(), data::class_counts(&*sets.train)[..200].to_vec()), (200, vec![1; 200]));
    let all: Vec<(Shape, Vec<u8>)> = decoded(&*sets.train).collect();
    let sizes: std::collections::HashSet<[usize; 3]> = all.iter().map(|(shape, _)| shape.lengths()).collect();
    assert!(sizes.len() >= 111, "{} sizes", sizes.len());
    let grey = |(_, bytes): &&(Shape, Vec<u8>)| bytes.chunks_exact(3).all(|pixel| pixel == [pixel[0]; 3]);
    assert_eq!(all.iter().filter(grey).count(), 23);
    for (_, bytes) in all {
        let mean = bytes.iter().map(|&byte| u64::from(byte)).sum::<u64>() / bytes.len() as u64;
        assert!((10..245).contains(&mean), "a mean of {mean} is no photograph's");
    }
}

/// Ten photographs of ten classes, each in both parts: the narrow AlexNet learns them by heart, from decoded pixels through
/// augmentation, LRN and dropout to the last layer.
#[test]
fn a_narrow_alexnet_fits_photographs() {
    let Some(path) = folder("imagenet-sample") else { return };
    let work = tempfile::tempdir().unwrap();
    let mut photographs: Vec<PathBuf> = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
    photographs.retain(|file| file.extension().is_some_and(|extension| extension == "JPEG"));
    photographs.sort();
    for file in &photographs[..10] {
        for part in ["train", "test"] {
            let class = work.path().join(part).join(file.file_stem().unwrap());
            std::fs::create_dir_all(&class).unwrap();
            std::fs::copy(file, class.join("photograph.jpg")).unwrap();
        }
    }

    let out = work.path().join("out");
    let mut command = Command::cargo_bin("trainer").unwrap();
    command.args(["-n", "2", "--config", "configs/alexnet-cifar10.toml", "--out"]).arg(&out);
    command.arg("--set").arg(format!("data.path={}", work.path().display()));
    for setting in [
        "batch.global=10",
        "optimizer.lr=0.01",
        "run.epochs=400",
        "run.target_accuracy=1.0",
        "eval.every_epochs=25",
        "checkpoint.every_epochs=400",
    ] {
        command.args(["--set", setting]);
    }
    command.timeout(Duration::from_secs(300)).current_dir(env!("CARGO_MANIFEST_DIR")).assert().success();
    let summary = std::fs::read_to_string(out.join("summary.json")).unwrap();
    assert!(summary.contains(r#""stopped_by": "target_accuracy""#), "{summary}");
}
