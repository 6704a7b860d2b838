//! What is made of times that are known; `tests/bench_step.rs` has the counts of a whole run.

use super::*;
use crate::config::plan::{Plan, Ranks, Samples};
use crate::device::Place;
use crate::model::net::{Net, Options};
use crate::model::spec::NetSpec;
use crate::model::stopwatch::LayerTime;
use crate::train::bench::OnGpu;
use std::time::Duration;

/// 8, 8, no and 48 parameters.
const CONFIG: &str = r#"
[run]
name = "bench"
epochs = 1
[data]
format = "shapes"
[batch]
global = 8
micro = 2
[model]
input = [2, 2, 3]
layers = [
    { type = "conv2d", filters = 2, kernel = 1 },
    { type = "conv2d", filters = 4, kernel = 1, bias = false },
    { type = "flatten" },
    { type = "linear", units = 3, bias = false },
]
[optimizer]
type = "sgd"
lr = 0.01
"#;

const PHASES_IN_JSON: [&str; 4] = ["forward", "backward_data", "backward_weights", "reduce_update"];

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// A rank of two, with two micro-batches of two samples a step.
fn with_measured(transport: &'static str, precision: Precision, check: impl FnOnce(Measured<'_>)) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), CONFIG).unwrap();
    let config = crate::config::load(file.path(), &[]).unwrap();
    let samples = Samples { train: 80, validation: 0, test: 10 };
    let plan = Plan::new(&config, Ranks { size: 2, threads: 1 }, samples).unwrap();
    let spec = NetSpec::new(&config.model).unwrap();
    let options =
        Options { batch: 2, place: Place::Host, threads: 1, seed: 0, precision, training: true, ..Options::default() };
    let net = Net::new(spec, &options).unwrap();
    let layer = |forward: u64, backward: u64, weights_alone: u64| LayerTime {
        forward: ms(forward),
        backward: ms(backward),
        weights_alone: ms(weights_alone),
        host: ms(forward + backward),
    };
    let (linear, all) = (net.table().of_node(3)[0].range.end, net.table().len());
    check(Measured {
        net: &net,
        plan: &plan,
        transport,
        precision,
        overlap: false,
        steps: 5,
        state_tensors: 1,
        samples_per_second: 160.0,
        step: ms(50),
        data: ms(4),
        layers: vec![layer(1, 2, 0), layer(2, 5, 1), layer(1, 1, 0), layer(3, 7, 2)],
        parts: vec![(0..linear, ms(6)), (linear..all, ms(2)), (net.table().tail.clone(), ms(1))],
        finish: ms(8),
        gpu: None,
    });
}

#[test]
fn times_are_those_of_layers_and_phases() {
    with_measured("shm", Precision::F32, |measured| {
        let bench = json("bench", &measured, None);
        let close = |found: &Value, expected: f64| (found.as_f64().unwrap_or(0.0) - expected).abs() <= 1e-9 * expected;
        let layers = bench["layers"].as_array().unwrap();
        for (object, expected) in [
            // Half of their bucket's 2 ms each, and an eighth of the 8 ms that had to wait for all.
            (&layers[0], [1.0, 0.0, 2.0, 2.0]),
            (&layers[1], [2.0, 4.0, 1.0, 2.0]),
            (&layers[2], [1.0, 1.0, 0.0, 0.0]),
            (&layers[3], [3.0, 5.0, 2.0, 12.0]),
            (&bench, [7.0, 10.0, 5.0, 16.0]),
        ] {
            for (phase, expected) in PHASES_IN_JSON.into_iter().zip(expected) {
                assert!(close(&object["phases"][phase]["ms"], expected), "{phase} takes {expected} ms: {object}");
            }
        }
        for (key, expected) in [("step_ms", 50.0), ("layers_ms", 38.0), ("data_ms", 4.0), ("samples_per_second", 160.0)]
        {
            assert!(close(&bench[key], expected), "{key}: {}", bench[key]);
        }
        // 4 samples of 16 inputs and 3 units.
        assert!(close(&layers[3]["phases"]["forward"]["gflop_s"], 384.0 / 3e-3 / 1e9), "{}", layers[3]);
    });
}

/// In a short step the gradients by the parameters alone may seem to take longer than both.
#[test]
fn what_was_too_short_to_be_measured_is_there_all_the_same() {
    with_measured("shm", Precision::F32, |mut measured| {
        measured.layers[3].weights_alone = ms(9);
        let bench = json("bench", &measured, None);
        let phases = &bench["layers"][3]["phases"];
        assert_eq!((&phases["backward_data"]["ms"], &phases["backward_weights"]["ms"]), (&0.0.into(), &7.0.into()));
        assert_eq!(phases["backward_data"]["gflop"].as_f64().map(|gflop| (1e9 * gflop).round()), Some(384.0));
        assert!(phases["backward_data"]["gflop_s"].is_null());
    });
}

/// Of the last layer: 64 values come in and 12 go out, and the 48 parameters are read by each of two micro-batches.
#[test]
fn bytes_are_those_of_precision_and_transport() {
    for (transport, precision, expected) in [
        // Two gradients, and parameter and momentum in and out, of half the parameters.
        ("shm", Precision::F32, [4 * 172, 4 * 172, 4 * 172, 4 * 48 * 6 / 2]),
        // Parameters are also written in bf16; their gradients are f32.
        ("shm", Precision::Bf16, [2 * 172, 2 * 172, 2 * 76 + 4 * 96, (4 * 48 * 6 + 2 * 48) / 2]),
        ("tcp", Precision::F32, [4 * 172, 4 * 172, 4 * 172, 2 * 4 * 48 / 2]),
    ] {
        with_measured(transport, precision, |measured| {
            let bench = json("bench", &measured, None);
            for (phase, expected) in PHASES_IN_JSON.into_iter().zip(expected) {
                let bytes = 1e9 * bench["layers"][3]["phases"][phase]["gb"].as_f64().unwrap();
                assert_eq!(bytes.round(), f64::from(expected), "{phase} over {transport} in {precision:?}");
            }
        });
    }
}

#[test]
fn the_table_leaves_nothing_of_a_step_out() {
    with_measured("shm", Precision::F32, |measured| {
        let text = text("bench", &measured, None);
        let row = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name));
            let line = line.unwrap_or_else(|| panic!("no {name} in\n{text}"));
            line[name.len()..].split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(row("linear_4"), ["linear", "3.00", "5.00", "2.00", "12.00", "22.00", "44.0", "%"]);
        assert_eq!(row("all layers"), ["7.00", "10.00", "5.00", "16.00", "38.00", "76.0", "%"]);
        assert_eq!(row("waiting for data"), ["4.00", "8.0", "%"]);
        assert_eq!(row("loss and the rest"), ["8.00", "16.0", "%"]);
        assert_eq!(row("step"), ["50.00", "100.0", "%"]);
    });
}

/// The host's time is not the layers', and what the device does at once may add up to more than the step.
#[test]
fn a_gpu_has_its_own_lines() {
    with_measured("none", Precision::F32, |mut measured| {
        measured.gpu = Some(OnGpu {
            name: "Some GPU".into(),
            launch: ms(2),
            exposed: ms(1),
            memory_bytes: 3 << 20,
            grown_bytes: 1 << 20,
        });
        measured.step = ms(30);
        let text = text("bench", &measured, Some(2.0));
        for words in [
            "none, on Some GPU, ",
            "TFLOP/s",
            " % of 2\n",
            "2.00 ms of the host",
            "1.000 ms of a step the GPU waits",
            "3 MiB of device memory, 1 of them",
        ] {
            assert!(text.contains(words), "no {words:?} in\n{text}");
        }
        let rest = text.lines().find(|line| line.starts_with("loss and the rest")).unwrap();
        assert!(rest.trim_end().ends_with("0.0 %"), "{rest}");
        let bench = json("bench", &measured, None);
        assert_eq!(bench["device"], "Some GPU");
        assert_eq!([&bench["launch_ms"], &bench["exposed_ms"]], [2.0, 1.0]);
        assert_eq!([&bench["device_memory_mib"], &bench["device_memory_growth_mib"]], [3.0, 1.0]);
        assert!(bench.get("mfu").is_none(), "{bench}");
    });
}
