//! `trainer bench-step`: what it counts, and that its stopwatch does not change what is computed.

#[path = "common/program.rs"]
mod program;

use lockstep::config;
use lockstep::device::{Arena, Place};
use lockstep::model::Pass;
use lockstep::model::net::{Net, Options};
use lockstep::model::precision::Precision;
use lockstep::model::spec::NetSpec;
use lockstep::model::stopwatch::Stopwatch;
use program::program;
use serde_json::Value as Json;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;
use tempfile::TempDir;

const CONFIG: &str = r#"
[run]
name = "bench"
epochs = 1
[data]
format = "shapes"
train = 100
test = 10
[batch]
global = 8
[model]
input = [32, 32, 3]
layers = [
    { type = "conv2d", name = "conv1", filters = 6, kernel = 3, stride = 4, activation = "relu" },
    { type = "max_pool", name = "pool", size = 2 },
    { type = "conv2d", name = "conv2", filters = 10, kernel = 2, activation = "relu" },
    { type = "flatten", name = "flat" },
    { type = "linear", name = "classes", units = 10 },
]
[optimizer]
type = "sgd"
lr = 0.01
momentum = 0.9
"#;

/// Operations and bytes by hand, for a rank's 4 samples.
#[test]
fn layers_and_phases_are_counted() {
    let (_folder, config) = config();
    let bench = bench(&["-n", "2"], &config, &["--set", "parallel.overlap=false"]);
    assert_eq!((&bench["ranks"], &bench["local_batch"], &bench["steps"]), (&2.into(), &4.into(), &3.into()));
    let layers = bench["layers"].as_array().unwrap();
    let names: Vec<&str> = layers.iter().map(|layer| layer["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["conv1", "pool", "conv2", "flat", "classes"]);

    let phases: Vec<Vec<&str>> = (layers.iter())
        .map(|layer| layer["phases"].as_object().unwrap().keys().map(String::as_str).collect())
        .collect();
    let learns = ["forward", "backward_data", "backward_weights", "reduce_update"];
    assert_eq!(phases[0], ["forward", "backward_weights", "reduce_update"], "nobody needs the gradient of the data");
    assert_eq!(phases[1], ["forward", "backward_data"]);
    assert_eq!(phases[2], learns);
    assert_eq!(phases[4], learns);

    // conv2: 4x4x6 to 3x3x10 by 2x2, so 2 * 24 operations an output, and 250 parameters.
    let conv2 = |phase: &str, what: &str| layers[2]["phases"][phase][what].as_f64().unwrap() * 1e9;
    let (input, output, params) = (4 * 4 * 4 * 6, 4 * 3 * 3 * 10, 250);
    for phase in ["forward", "backward_data", "backward_weights"] {
        assert_eq!(conv2(phase, "gflop").round(), f64::from(2 * 24 * output), "{phase}");
    }
    for (phase, values) in [
        ("forward", input + params + output),
        ("backward_data", output + params + input),
        // The ReLU in it reads the output.
        ("backward_weights", 2 * output + params + input),
        // Two gradients, parameter and momentum in and out, of half the parameters.
        ("reduce_update", 3 * params),
    ] {
        assert_eq!(conv2(phase, "gb").round(), f64::from(4 * values), "{phase}");
    }
    let positive = |value: &Json| value.as_f64().is_some_and(|value| value > 0.0);
    assert!(["samples_per_second", "step_ms", "layers_ms"].iter().all(|key| positive(&bench[*key])), "{bench}");
}

/// What is reduced behind backward has no rate.
#[test]
fn overlapped_and_lone_ranks_are_measured_too() {
    let (_folder, config) = config();
    let reduce = &bench(&["-n", "2"], &config, &[])["phases"]["reduce_update"];
    assert!(reduce["ms"].is_f64() && reduce.get("gb_s").is_none(), "{reduce}");
    let alone = bench(&[], &config, &["--set", "batch.micro=2"]);
    assert_eq!((&alone["transport"], &alone["local_batch"]), (&"none".into(), &8.into()));
    let mut table = program();
    let output = table.args(["bench-step", "--steps", "1", "--config"]).arg(&config).unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    for words in ["bench: 1 rank ", "backward weights", "waiting for data", "100.0 %", "GFLOP/s", "samples/s"] {
        assert!(text.contains(words), "no {words:?} in\n{text}");
    }
}

#[test]
fn the_step_is_held_against_a_rate_that_is_given() {
    let (_folder, config) = config();
    let bench = bench(&[], &config, &["--peak-tflops", "0.25"]);
    assert_eq!(bench["device"], "cpu");
    let [mfu, tflop_s] = ["mfu", "tflop_s"].map(|key| bench[key].as_f64().unwrap());
    assert!((mfu * 0.25 - tflop_s).abs() < 1e-9 * tflop_s, "{bench}");
    // Forward of all layers, and both parts of backward but the first layer's gradient by the data.
    let gflop: f64 = ["forward", "backward_data", "backward_weights"]
        .map(|phase| bench["phases"][phase]["gflop"].as_f64().unwrap())
        .iter()
        .sum();
    let rate = gflop / bench["step_ms"].as_f64().unwrap();
    assert!((rate - tflop_s).abs() < 1e-6 * rate, "{rate}: {bench}");
    for wrong in ["0", "inf", "fast"] {
        let mut command = program();
        let output = command.args(["bench-step", "--peak-tflops", wrong, "--config"]).arg(&config).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("give a number above 0"), "{wrong}");
    }
}

#[test]
fn a_stopwatch_changes_no_gradient() {
    let (_folder, path) = config();
    let spec = NetSpec::new(&config::load(&path, &[]).unwrap().model).unwrap();
    let options = Options {
        batch: 3,
        place: Place::Host,
        threads: 2,
        seed: 5,
        precision: Precision::F32,
        training: true,
        ..Options::default()
    };
    let mut net = Net::new(spec, &options).unwrap();
    let images: Vec<f32> = (0..3 * 32 * 32 * 3).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
    let pass = Pass { batch: 3, training: true, first_sample: 0, share: 1.0 };
    let gradient = |net: &mut Net| {
        let grads = Arena::host(net.table().len_with_tail() * size_of::<f32>()).unwrap();
        net.forward(&pass, (&images[..]).into()).unwrap();
        let (_, mut output) = net.output_and_gradient(&pass);
        output.f32().iter_mut().enumerate().for_each(|(i, slot)| *slot = (i % 7) as f32 - 3.0);
        net.backward(&pass, (&images[..]).into(), &grads, |_| Ok(())).unwrap();
        // SAFETY: backward is over.
        unsafe { grads.slice(0..grads.bytes()) }.f32().to_vec()
    };
    let plain = gradient(&mut net);
    let mut stopwatch = Stopwatch::new(5, Place::Host).unwrap();
    stopwatch.apart = true;
    *net.stopwatch_mut() = Some(stopwatch);
    assert!(plain.iter().any(|value| *value != 0.0) && gradient(&mut net) == plain);

    let times = net.stopwatch_mut().as_mut().unwrap().take().unwrap();
    let alone: Vec<bool> = times.iter().map(|time| time.weights_alone > Duration::ZERO).collect();
    assert_eq!(alone, [false, false, true, false, true], "conv1 has one gradient, pool and flat have no weights");
    assert!(times.iter().all(|time| time.forward > Duration::ZERO && time.backward > Duration::ZERO), "{times:?}");
    let again = net.stopwatch_mut().as_mut().unwrap().take().unwrap();
    assert!(again.iter().all(|time| *time == Default::default()), "taken times start again from zero");
}

fn bench(before: &[&str], config: &PathBuf, after: &[&str]) -> Json {
    let mut command = program();
    command.args(before).args(["bench-step", "--json", "--steps", "3", "--warmup", "1", "--config"]).arg(config);
    let output = command.args(after).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn config() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bench.toml");
    fs::write(&path, CONFIG).unwrap();
    (folder, path)
}
