//! Values that no layer takes, and nets that no memory holds: refused with a message, never with a panic.

use assert_cmd::Command;
use lockstep::config;
use std::fs;

const QUICKSTART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/quickstart.toml");

const ONE_LAYER: &str = r#"
[run]
name = "one-layer"
epochs = 1
[data]
format = "shapes"
[batch]
global = 4
[model]
input = [32, 32, 3]
[[model.layers]]
LAYER
[optimizer]
type = "sgd"
lr = 0.1
"#;

#[test]
fn a_value_out_of_range_is_shown_where_it_stands() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for (kind, keys, wrong, expected) in [
        ("conv2d", "filters = 0\nkernel = 3", "filters is 0", "an integer >= 1"),
        ("conv2d", "filters = 4\nkernel = 0", "kernel is 0", "an integer >= 1"),
        ("conv2d", "filters = 4\nkernel = [3, 0]", "kernel.1 is 0", "an integer >= 1"),
        ("conv2d", "filters = 4\nkernel = 3\nstride = 0", "stride is 0", "an integer >= 1"),
        ("conv2d", "filters = 4\nkernel = 3\ngroups = 0", "groups is 0", "an integer >= 1"),
        ("conv2d", "filters = 4\nkernel = 3\npadding = -1", "padding is -1", "an integer >= 0"),
        ("linear", "units = 0", "units is 0", "an integer >= 1"),
        ("linear", "units = 4\ninit = { type = \"normal\", std = -1.0 }", "init.std is -1.0", "a number >= 0"),
        ("max_pool", "size = 0", "size is 0", "an integer >= 1 and <= 16"),
        ("max_pool", "size = 17", "size is 17", "an integer >= 1 and <= 16"),
        ("max_pool", "size = 2\nstride = 0", "stride is 0", "an integer >= 1"),
        ("avg_pool", "size = 0", "size is 0", "an integer >= 1 and <= 65536"),
        ("avg_pool", "size = 4294967296\npadding = \"same\"", "size is 4294967296", "an integer >= 1 and <= 65536"),
        ("avg_pool", "size = 2\nstride = 0", "stride is 0", "an integer >= 1"),
        ("dropout", "rate = 1.0", "rate is 1.0", "a number >= 0 and < 1"),
        ("dropout", "rate = 0.99999999", "rate is 0.99999999", "a number >= 0 and < 1"),
        ("batch_norm", "epsilon = 0.0", "epsilon is 0.0", "a number > 0"),
        ("batch_norm", "momentum = 1.5", "momentum is 1.5", "a number >= 0 and <= 1"),
        ("lrn", "depth_radius = 17", "depth_radius is 17", "an integer >= 0 and <= 16"),
        ("lrn", "bias = 0.0", "bias is 0.0", "a number > 0"),
        ("lrn", "alpha = -1.0", "alpha is -1.0", "a number >= 0"),
        ("lrn", "beta = nan", "beta is nan", "a number >= 0"),
    ] {
        fs::write(&file, ONE_LAYER.replace("LAYER", &format!("type = \"{kind}\"\n{keys}"))).unwrap();
        let error = config::load(file.path(), &[]).err().unwrap_or_else(|| panic!("{kind} {keys} was accepted"));
        let (error, expected) = (error.to_string(), format!("model.layers.0.{wrong}, expected {expected}\n"));
        assert!(error.contains(&expected) && error.contains("| ") && error.contains('^'), "{kind}: {error}");
    }
}

#[test]
fn a_net_that_no_memory_holds_ends_with_exit_code_6() {
    for (set, words) in [
        ("batch.global=100000000", "activations of 100000000 samples hold more than 2^32 values in the input; use a"),
        ("model.layers.0.filters=1000000", "hold more than 2^32 values in layer `conv1`; use a smaller batch"),
        ("batch.global=100000", "activations of 100000 samples: out of memory"),
    ] {
        let out = tempfile::tempdir().unwrap();
        // 8 GiB of addresses, so that the last one fails on any machine, and at once.
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -v 8388608 && exec \"$@\"", "sh", env!("CARGO_BIN_EXE_trainer")]);
        command.args(["--config", QUICKSTART, "--set", set, "--set", "data.train=50", "--set", "data.test=10"]);
        let output = command.arg("--out").arg(out.path()).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(6), "{set}: {error}");
        assert!(error.starts_with("error: ") && error.contains(words), "{set}: {error}");
    }
}
