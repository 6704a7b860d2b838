//! What the driver measures, from a stub of NVML (`nvml/stub.rs`) to a run's metrics.

use crate::harness::{in_a_process, library, stub};
use crate::program::program;
use lockstep::device::cuda::Gpu;
use lockstep::device::cuda::nvml::Gauge;
use lockstep::device::cuda::probe;
use lockstep::report::budget::{Category, Clock};
use lockstep::report::{Report, Setup, Step};
use serde_json::Value;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

#[test]
fn log_steps_tell_of_rank_0s_gpu() {
    with_nvml("", || {
        assert!(Gauge::of_this_rank().is_none(), "this rank has taken no GPU");
        Gpu::take(0).unwrap();
        let gauge = Gauge::of_this_rank().unwrap();
        let record = record_of_a_step(Some(gauge));
        let told = ["gpu_memory_mib", "gpu_utilization_percent", "gpu_power_watts"].map(|key| record[key].as_f64());
        assert_eq!(told, [Some(512.0), Some(87.0), Some(312.5)], "{record}");
    });
}

#[test]
fn energy_is_counted_from_the_gauge_on() {
    with_nvml("", || {
        let gauge = Gauge::of(&probe::gpus().unwrap().devices[0]).unwrap();
        assert_eq!([(); 2].map(|()| gauge.energy_joules()), [Some(1500.0), Some(3000.0)]);
    });
}

#[test]
fn what_a_gpu_does_not_measure_is_left_out() {
    with_nvml("no-power", || {
        let gauge = Gauge::of(&probe::gpus().unwrap().devices[0]).unwrap();
        assert_eq!((gauge.energy_joules(), gauge.power_limit_watts()), (None, None));
        let record = record_of_a_step(Some(gauge));
        assert_eq!((&record["gpu_memory_mib"], &record["gpu_utilization_percent"]), (&512.into(), &87.into()));
        assert!(record.get("gpu_power_watts").is_none(), "{record}");
    });
}

#[test]
fn without_nvml_nothing_is_told_and_why_is_known() {
    in_a_process(&[("LD_LIBRARY_PATH", &stub())], || {
        let gpu = Gpu::take(0).unwrap();
        let Err(error) = Gauge::of(gpu.device()) else { return eprintln!("skipped: this machine has NVML") };
        let text = error.to_string();
        assert!(text.starts_with("NVML was not found: libnvidia-ml.so.1: ") && text.contains("`utility`"), "{text}");
        assert!(Gauge::of_this_rank().is_none());
        let record = record_of_a_step(None);
        assert!(record.as_object().unwrap().keys().all(|key| !key.starts_with("gpu")), "{record}");
    });
}

#[test]
fn a_driver_that_does_not_answer_is_named() {
    with_nvml("no-driver", || {
        let error = Gauge::of(&probe::gpus().unwrap().devices[0]).unwrap_err().to_string();
        assert_eq!(error, "NVML: NVIDIA driver is not loaded");
    });
}

#[test]
fn a_gpu_that_nvml_does_not_know_is_named() {
    with_nvml("another-gpu", || {
        let error = Gauge::of(&probe::gpus().unwrap().devices[0]).unwrap_err().to_string();
        assert!(error.starts_with("NVML, asked for GPU 0 (Stub): "), "{error}");
    });
}

#[test]
fn info_shows_the_power_limit_and_the_drivers_version() {
    let info = |fault: &str| {
        let mut info = program();
        info.arg("info").env("LD_LIBRARY_PATH", both()).env("STUB_NVML_FAULT", fault);
        String::from_utf8(info.assert().success().get_output().stdout.clone()).unwrap()
    };
    let text = info("");
    assert!(text.contains("0a0b0c0d0e0f, power limit 700 W\n"), "{text}");
    assert!(text.contains("13.580.65.06\n"), "{text}");
    assert!(Path::new("/sys/module/nvidia").exists() || text.contains("driver 580.65.06, for CUDA"), "{text}");
    let text = info("no-driver");
    assert!(text.contains("0a0b0c0d0e0f\n") && text.contains("NVML: NVIDIA driver is not loaded\n"), "{text}");
}

/// In a process with the stubs of CUDA and of NVML.
fn with_nvml(fault: &str, body: impl FnOnce()) {
    in_a_process(&[("LD_LIBRARY_PATH", Path::new(&both())), ("STUB_NVML_FAULT", Path::new(fault))], body);
}

fn both() -> OsString {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda/nvml/stub.rs");
    std::env::join_paths([stub(), library("nvml", &["libnvidia-ml.so.1"], &source)]).unwrap()
}

/// The line of `metrics.jsonl` after one step.
fn record_of_a_step(gauge: Option<Gauge>) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let setup = Setup {
        directory: folder.path().to_owned(),
        run: "metered".to_string(),
        world_size: 1,
        parameters: 1,
        epochs: None,
        total_steps: None,
        first_step: 0,
        log_every: 1,
        quiet: true,
        gauge,
    };
    let mut clock = Clock::start();
    clock.lap(Category::Compute);
    let step = Step { step: 1, epoch: 0, lr: 0.1, loss_sum: 1.0, correct: 1, samples: 1, loss_scale: None };
    Report::start(setup).unwrap().step(&step, clock.budget()).unwrap();
    serde_json::from_str(&fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap()).unwrap()
}
