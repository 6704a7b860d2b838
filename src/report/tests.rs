use super::budget::{Clock, Merged};
use super::*;
use serde_json::Value;
use std::fs;
use std::time::Duration;

fn setup(directory: &Path, first_step: u64) -> Setup {
    Setup {
        directory: directory.to_path_buf(),
        run: "test".to_string(),
        world_size: 2,
        parameters: 61_706,
        epochs: Some(2),
        total_steps: Some(8),
        first_step,
        log_every: 2,
        quiet: false,
        gauge: None,
    }
}

fn step(number: u64) -> Step {
    Step {
        step: number,
        epoch: (number - 1) / 4,
        lr: 0.1,
        loss_sum: 64.0 * number as f64,
        correct: 32,
        samples: 64,
        loss_scale: None,
    }
}

fn evaluation(set: Set, step: u64) -> Evaluation {
    Evaluation { set, step, epoch: 0, loss_sum: 5.0, correct: 9, samples: 10 }
}

fn ending(clock: &Clock) -> Ending {
    Ending {
        stopped_by: StoppedBy::Epochs,
        exit_reason: "2 epochs are complete".to_string(),
        epochs: 2,
        weights_digest: "ab".repeat(32),
        budget: Merged::from_sum(&Merged::contribution(clock.budget(), 0, 1)),
        skipped_images: 3,
        job_restarts: 1,
        gpu_energy_joules: Some(2.5),
        loss_scale: None,
    }
}

fn records(directory: &Path) -> Vec<Value> {
    let text = fs::read_to_string(directory.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_run_leaves_its_metrics_and_its_summary() {
    let folder = tempfile::tempdir().unwrap();
    let mut clock = Clock::start();
    let mut report = Report::start(setup(folder.path(), 0)).unwrap();
    for number in 1..=8 {
        clock.lap(Category::Data);
        std::thread::sleep(Duration::from_millis(1));
        clock.lap(Category::Compute);
        report.step(&step(number), clock.budget()).unwrap();
        if number == 4 {
            report.evaluated(&evaluation(Set::Validation, 4)).unwrap();
            clock.lap(Category::Evaluation);
        }
    }
    report.evaluated(&evaluation(Set::Test, 8)).unwrap();
    let summary = report.finish(ending(&clock)).unwrap();

    let records = records(folder.path());
    let steps: Vec<_> = records.iter().map(|r| (r["kind"].as_str().unwrap(), r["step"].as_u64().unwrap())).collect();
    assert_eq!(steps, [("train", 2), ("train", 4), ("eval", 4), ("train", 6), ("train", 8), ("eval", 8)]);
    assert_eq!((records[1]["loss"].as_f64(), records[1]["accuracy"].as_f64()), (Some(3.5), Some(0.5)));
    assert_eq!((records[2]["set"].as_str(), records[2]["accuracy"].as_f64()), (Some("validation"), Some(0.9)));

    let written: Value = serde_json::from_slice(&fs::read(folder.path().join("summary.json")).unwrap()).unwrap();
    // Through text on both sides: serde_json reads some numbers one last bit off.
    let expected: Value = serde_json::from_str(&serde_json::to_string(&summary).unwrap()).unwrap();
    assert_eq!(written, expected);
    for (key, expected) in [
        ("world_size", Value::from(2)),
        ("steps", 8.into()),
        ("epochs", 2.into()),
        // Of the second epoch: steps 5 to 8.
        ("train_loss", 6.5.into()),
        ("val_accuracy", 0.9.into()),
        ("test_loss", 0.5.into()),
        ("test_accuracy", 0.9.into()),
        ("parameters", 61_706.into()),
        ("stopped_by", "epochs".into()),
        ("weights_digest", "ab".repeat(32).into()),
        ("exit_reason", "2 epochs are complete".into()),
        ("job_restarts", 1.into()),
        ("gpu_energy_joules", 2.5.into()),
        ("exposed_communication", 0.0.into()),
    ] {
        assert_eq!(written[key], expected, "{key}");
    }
    let speed = 512.0 / ending(&clock).budget.mean().training_seconds();
    assert_eq!(summary.samples_per_second, speed);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "two files and nothing temporary");
}

#[test]
fn a_run_that_ends_before_its_first_step_still_has_a_summary() {
    let folder = tempfile::tempdir().unwrap();
    let report = Report::start(setup(folder.path(), 0)).unwrap();
    let ending = Ending { stopped_by: StoppedBy::Error, ..ending(&Clock::start()) };
    report.finish(ending).unwrap();
    let written: Value = serde_json::from_slice(&fs::read(folder.path().join("summary.json")).unwrap()).unwrap();
    assert_eq!((&written["train_loss"], &written["stopped_by"]), (&Value::Null, &"error".into()));
}

#[test]
fn a_resumed_run_goes_on_in_the_same_file() {
    let folder = tempfile::tempdir().unwrap();
    for (first_step, last_step) in [(0, 7), (4, 8)] {
        let mut clock = Clock::start();
        let mut report = Report::start(setup(folder.path(), first_step)).unwrap();
        for number in first_step + 1..=last_step {
            clock.lap(Category::Compute);
            report.step(&step(number), clock.budget()).unwrap();
        }
    }
    let steps: Vec<_> = records(folder.path()).iter().map(|r| r["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [2, 4, 6, 8]);
}

#[test]
fn scores_stay_short_where_a_run_diverges() {
    let shown = |loss| Scores { loss, accuracy: 0.25 }.to_string();
    assert_eq!(shown(0.123_46), "loss 0.1235  accuracy 0.2500");
    assert_eq!(shown(5.583e25), "loss 5.583e25  accuracy 0.2500");
    assert_eq!(shown(f64::NAN), "loss NaN  accuracy 0.2500");
}
