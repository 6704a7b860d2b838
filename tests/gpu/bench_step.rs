//! `trainer bench-step` on a GPU: the same object as on the CPU, with times of the device.

use crate::emulator;
use crate::runs::program;
use serde_json::Value;
use std::fs;

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
    { type = "conv2d", name = "conv", filters = 6, kernel = 3, stride = 4, activation = "relu" },
    { type = "max_pool", name = "pool", size = 2 },
    { type = "flatten", name = "flat" },
    { type = "linear", name = "hidden", units = 12, activation = "relu" },
    { type = "linear", name = "classes", units = 10 },
]
[optimizer]
type = "sgd"
lr = 0.01
momentum = 0.9
"#;

#[test]
fn a_step_on_a_gpu_is_timed_as_one_on_the_cpu() {
    let Some(variables) = emulator::variables() else { return };
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("bench.toml");
    fs::write(&config, CONFIG).unwrap();
    let bench = |device: &str| -> Value {
        let mut command = program();
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        command.args(["bench-step", "--json", "--steps", "3", "--warmup", "1", "--peak-tflops", "0.5", "--config"]);
        let output = command.arg(&config).args(["--set", &format!("run.device={device}")]).assert().success();
        serde_json::from_slice(&output.get_output().stdout).unwrap()
    };
    let [cpu, gpu] = ["cpu", "cuda"].map(bench);
    let keys = |object: &Value| object.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let counts = |bench: &Value| {
        let of = |layer: &Value| {
            let phases = layer["phases"].as_object().unwrap().iter();
            let phases = phases.map(|(name, phase)| (name.clone(), phase["gflop"].clone(), phase["gb"].clone()));
            (layer["name"].clone(), phases.collect::<Vec<_>>())
        };
        bench["layers"].as_array().unwrap().iter().map(of).collect::<Vec<_>>()
    };
    assert_eq!(counts(&cpu), counts(&gpu), "operations and bytes are those of the layers");
    let more = ["device_memory_growth_mib", "device_memory_mib", "exposed_ms", "launch_ms"].map(str::to_owned);
    let all = keys(&gpu);
    assert_eq!(all.iter().filter(|key| !more.contains(key)).cloned().collect::<Vec<_>>(), keys(&cpu));

    let positive = |value: &Value| value.as_f64().is_some_and(|value| value > 0.0);
    for key in ["samples_per_second", "step_ms", "tflop_s", "launch_ms", "device_memory_mib"] {
        assert!(positive(&gpu[key]), "{key}: {gpu}");
    }
    let [mfu, rate] = ["mfu", "tflop_s"].map(|key| gpu[key].as_f64().unwrap());
    assert!((mfu * 0.5 - rate).abs() < 1e-9 * rate, "{gpu}");
    assert!(positive(&gpu["phases"]["reduce_update"]["ms"]), "{gpu}");
    for layer in gpu["layers"].as_array().unwrap() {
        assert!(positive(&layer["phases"]["forward"]["ms"]), "{layer}");
    }
    assert!(gpu["exposed_ms"].is_number(), "{gpu}");
    assert_eq!(gpu["device_memory_growth_mib"], 0.0, "all memory is there before the steps");
    // Parameters, momentum and gradients at least: 6,604 bytes of each, and more of the activations.
    assert!(gpu["device_memory_mib"].as_f64().unwrap() > 0.02, "{gpu}");
}
