//! Mistakes that a user makes, and what the program says to them: one clear message, exit code 2.

use assert_cmd::Command;
use std::io::Write;

const QUICKSTART: &str = include_str!("../configs/quickstart.toml");

fn trainer(args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("trainer").unwrap();
    command.args(args).env_remove("RANK").env_remove("WORLD_SIZE");
    command
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

/// Runs it, expects a refusal, and returns what it said.
fn refusal(args: &[&str]) -> String {
    let output = trainer(args).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "trainer {args:?} said: {error}");
    assert!(error.starts_with("error: "), "{error}");
    error
}

#[test]
fn mistakes_in_the_file_are_shown_where_they_are() {
    for (old, new, words) in [
        ("lr = 0.1", "lrr = 0.1", "did you mean `lr`?"),
        ("momentum = 0.9", "momentun = 0.9", "did you mean `momentum`?"),
        ("filters = 16", "filters = \"many\"", "model.layers.0.filters is the string \"many\", expected an integer"),
        ("filters = 16\n", "", "model.layers.0.filters is missing"),
        ("\"conv2d\"", "\"conv2\"", "did you mean `conv2d`?"),
        ("padding = \"same\"", "padding = \"smae\"", "did you mean `same`?"),
        ("\"softmax_cross_entropy\"", "\"cross_entropy\"", "did you mean `softmax_cross_entropy`?"),
        ("validation = 0.1", "validation = 10", "data.validation is 10, expected a number >= 0 and < 1"),
        ("[schedule]", "[shedule]", "unknown section [shedule]"),
        ("epochs = 4", "epochs = 4 6", "not valid TOML"),
        ("name = \"conv2\"", "name = \"conv1\"", "two layers are named `conv1`"),
        ("input = [32, 32, 3]", "input = [32, 32]", "model.input has 2 values"),
        ("global = 128", "", "the batch has no size"),
        ("size = 2", "size = 2\npadding = 2", "`max_pool_3`"),
    ] {
        assert!(QUICKSTART.contains(old), "{old} is not in the quickstart");
        let file = file(&QUICKSTART.replacen(old, new, 1));
        let path = file.path().to_str().unwrap();
        for command in [&["plan", "--config", path, "--np", "2"][..], &["--config", path]] {
            let error = refusal(command);
            assert!(error.contains(words), "`{words}` is not in:\n{error}");
            assert_eq!(error.matches("error: ").count(), 1, "one mistake is one error:\n{error}");
        }
    }
}

#[test]
fn mistakes_on_the_command_line_are_usage_errors() {
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/quickstart.toml");
    for (args, words) in [
        (&["--config", "no/such.toml"][..], "cannot read the configuration no/such.toml"),
        (&["--config", config, "--set", "optimizer.lrr=1"], "unknown key optimizer.lrr"),
        (&["--config", config, "--set", "lr"], "expected KEY=VALUE"),
        (&["--confg", config], "--config"),
        (&["-n", "gpus", "--config", config], "no GPU support"),
        (&["-n", "0", "--config", config], "from 1 to"),
        (&["-n", "2"], "--config <FILE>"),
        (&["--config", config, "info"], "before a subcommand"),
        (&["plan", "--config", config, "--np", "3"], "not divisible by 3 ranks; use 126 or 129"),
        (&["plan", "--config", config, "--np", "200"], "smaller than 200 ranks"),
        (&["bench-comm", "--transport", "rdma"], "shm"),
    ] {
        let error = refusal(args);
        assert!(error.contains(words), "`{words}` is not in:\n{error}");
    }
}

#[test]
fn a_mistake_is_told_once_not_by_every_rank() {
    let file = file(&QUICKSTART.replace("lr = 0.1", "lr = -0.1"));
    let error = refusal(&["-n", "2", "--config", file.path().to_str().unwrap()]);
    assert_eq!(error.matches("optimizer.lr is -0.1").count(), 1, "{error}");
}

#[test]
fn plan_shows_layers_buckets_and_numbers() {
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/quickstart.toml");
    let output = trainer(&["plan", "--config", config, "--np", "2", "--set", "data.train=2000"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    for words in ["| conv1 ", "momentum = 0.9", "128 global, 64 a rank", "train = 2000", "gradients"] {
        assert!(text.contains(words), "`{words}` is not in:\n{text}");
    }
}

#[test]
fn help_fits_a_screen_of_80_by_24_and_has_examples() {
    for command in ["", "plan", "eval", "bench-comm", "schema"] {
        let args: Vec<&str> = [command, "--help"].into_iter().filter(|arg| !arg.is_empty()).collect();
        let output = trainer(&args).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && text.contains("Example"), "{command}:\n{text}");
        assert!(text.lines().count() <= 24, "{command}:\n{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{command}:\n{text}");
    }
}

#[test]
fn info_and_schema_answer() {
    let info = trainer(&["info"]).output().unwrap();
    assert!(info.status.success() && String::from_utf8(info.stdout).unwrap().contains("transports"));
    let schema = trainer(&["schema"]).output().unwrap();
    let schema: serde_json::Value = serde_json::from_slice(&schema.stdout).unwrap();
    assert_eq!(schema["properties"]["optimizer"]["oneOf"][0]["properties"]["lr"]["exclusiveMinimum"], 0);
}
