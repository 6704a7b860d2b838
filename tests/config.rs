//! Mistakes that a user makes, and what the program says to them: one clear message, exit code 2, or 3 where the data is
//! at fault. And what is no mistake: the experiments in configs/.

#[path = "common/program.rs"]
mod program;

use assert_cmd::Command;
use lockstep::config;
use lockstep::model::params::ParamTable;
use lockstep::model::spec::NetSpec;
use program::program;
use std::fs;
use std::io::Write;
use std::path::Path;

const QUICKSTART: &str = include_str!("../configs/quickstart.toml");

fn trainer(args: &[&str]) -> Command {
    let mut command = program();
    command.args(args);
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
        ("seed = 1", "seed = 1 1", "not valid TOML"),
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
        (&["--config", "/dev/zero"], "cannot read the configuration /dev/zero: it is not a plain file"),
        (&["--config", config, "--set", "optimizer.lrr=1"], "unknown key optimizer.lrr"),
        (&["--config", config, "--set", "lr"], "expected KEY=VALUE"),
        (&["--confg", config], "--config"),
        (&["-n", "gpus", "--config", config, "--set", "run.device=cpu"], "by [run] device they compute on the CPU"),
        (&["-n", "gpu", "--config", config], "give a number of ranks, such as 2, or `gpus`"),
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
fn a_file_too_long_to_be_a_configuration_is_not_read() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 40).unwrap();
    let error = refusal(&["--config", file.path().to_str().unwrap()]);
    assert!(error.contains("it is longer than 16 MiB"), "{error}");
}

#[test]
fn plan_refuses_what_training_refuses() {
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/quickstart.toml");
    for (set, words) in [
        ("model.layers.11.units=7", "`classes`, gives 1x1x7, 7 values a sample, but the data set has 10 classes"),
        ("data.augment=[{ type = \"random_crop\", padding = 40 }]", "random_crop pads by 40"),
        ("data.augment=[\"horizontal_flip\", \"normalize\", \"horizontal_flip\"]", "twice"),
        ("loss.class_weights=[1, 2]", "class_weights has 2 values, but there are 10 classes"),
        ("optimizer={ type = \"adadelta\", lr = 1, rho = 1.1 }", "optimizer.rho is 1.1"),
        ("model.input=[28, 28, 1]", "the images of this data set are 32x32x3"),
    ] {
        for command in [&["plan", "--np", "2"][..], &["-n", "2"]] {
            let error = refusal(&[command, &["--config", config, "--set", set]].concat());
            assert!(error.contains(words), "`{words}` is not in:\n{error}");
        }
    }
}

/// A configuration can be tried for a few steps as it is.
#[test]
fn a_run_within_its_warm_up_is_warned_of_once() {
    let folder = tempfile::tempdir().unwrap();
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/quickstart.toml");
    let mut command = trainer(&["-n", "2", "--config", config, "--out", folder.path().to_str().unwrap()]);
    let sets = ["run.steps=2", "schedule.warmup_epochs=9", "batch.global=16", "data.train=64", "data.test=16"];
    let output = command.args(sets.iter().flat_map(|set| ["--set", set])).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let warnings: Vec<&str> = said.lines().filter(|line| line.contains("but the run ends after 2")).collect();
    assert!(warnings.len() == 1 && warnings[0].starts_with("warning: the warm-up takes"), "{said}");
}

#[test]
fn data_that_cannot_be_used_ends_with_code_3_and_names_the_file() {
    let idx = |magic: u32, dims: &[u32], data: &[u8]| {
        let words = std::iter::once(&magic).chain(dims).flat_map(|word| word.to_be_bytes());
        words.chain(data.iter().copied()).collect::<Vec<u8>>()
    };
    let images = |count: u32| idx(0x803, &[count, 8, 8], &vec![7; 64 * count as usize]);
    let labels = |labels: &[u8]| idx(0x801, &[labels.len() as u32], labels);
    let digits: Vec<u8> = (0..20).map(|index| index % 10).collect();
    let whole = |folder: &Path| {
        for part in ["train", "t10k"] {
            fs::write(folder.join(format!("{part}-images-idx3-ubyte")), images(20)).unwrap();
            fs::write(folder.join(format!("{part}-labels-idx1-ubyte")), labels(&digits)).unwrap();
        }
    };
    let outcome = |command: &[&str], folder: &Path| {
        let file = file(&QUICKSTART.replace("validation = 0.1", ""));
        let data = format!("data={{ format = \"idx\", path = {:?} }}", folder.to_str().unwrap());
        let sets = ["--set", &data, "--set", "model.input=[8, 8, 1]", "--config", file.path().to_str().unwrap()];
        let output = trainer(&[command, &sets].concat()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };

    let good = tempfile::tempdir().unwrap();
    whole(good.path());
    assert_eq!(outcome(&["plan", "--np", "2"], good.path()).0, Some(0), "the files are good before they are damaged");

    for (name, bytes, words) in [
        ("train-images-idx3-ubyte", None, "not found"),
        ("train-images-idx3-ubyte", Some(images(0)), "the set is empty"),
        ("t10k-labels-idx1-ubyte", Some(labels(&[10; 20])), "sample 0 has label 10"),
        ("train-images-idx3-ubyte", Some(images(20)[..100].to_vec()), "truncated"),
        ("t10k-images-idx3-ubyte", Some(labels(&digits)), "wrong magic number 0x00000801"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set");
        // What no bytes stand for is the folder that is not there.
        if let Some(bytes) = bytes {
            fs::create_dir(&path).unwrap();
            whole(&path);
            fs::write(path.join(name), bytes).unwrap();
        }
        for command in [&["plan", "--np", "2"][..], &["-n", "1"], &["-n", "2"]] {
            let (code, error) = outcome(command, &path);
            assert_eq!(code, Some(3), "{command:?}: {error}");
            assert_eq!(error.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{command:?}: {error}");
            assert!(error.contains(name) && error.contains(words), "{command:?}: `{words}` is not in:\n{error}");
        }
    }
}

/// The header of every file in configs/ says how many parameters its net has.
#[test]
fn the_experiments_load_and_have_the_parameters_that_they_promise() {
    let mut seen = 0;
    for entry in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/configs")).unwrap() {
        let path = entry.unwrap().path();
        let config = config::load(&path, &[]).unwrap_or_else(|error| panic!("{error}"));
        let net = NetSpec::new(&config.model).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let text = fs::read_to_string(&path).unwrap();
        let header: Vec<&str> = text.lines().take_while(|line| line.starts_with('#')).collect();
        let header = header.join(" ");
        let words: Vec<&str> = header.split_whitespace().collect();
        let promised = words.windows(2).find(|pair| pair[1].starts_with("parameters")).expect("a number of parameters");
        let promised: usize = promised[0].replace(',', "").parse().unwrap();
        assert_eq!(ParamTable::new(&net).trainable(), promised, "{}", path.display());
        seen += 1;
    }
    assert!(seen >= 4);
}

/// `torchvision.models.alexnet().state_dict()`: names, shapes, and nothing else, so that checkpoints load there and back.
/// scripts/alexnet_torchvision.py compares what the two compute.
#[test]
fn alexnet_owt_has_torchvisions_tensors() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/alexnet-owt.toml");
    let config = config::load(Path::new(path), &[]).unwrap_or_else(|error| panic!("{error}"));
    let table = ParamTable::new(&NetSpec::new(&config.model).unwrap());
    let mut found: Vec<(String, Vec<usize>)> =
        table.params.iter().map(|param| (param.name.clone(), param.spec.shape.clone())).collect();
    let weights: [(&str, &[usize]); 8] = [
        ("classifier.1", &[4096, 9216]),
        ("classifier.4", &[4096, 4096]),
        ("classifier.6", &[1000, 4096]),
        ("features.0", &[64, 3, 11, 11]),
        ("features.10", &[256, 256, 3, 3]),
        ("features.3", &[192, 64, 5, 5]),
        ("features.6", &[384, 192, 3, 3]),
        ("features.8", &[256, 384, 3, 3]),
    ];
    let tensors = weights.iter().flat_map(|(layer, shape)| {
        [(format!("{layer}.bias"), vec![shape[0]]), (format!("{layer}.weight"), shape.to_vec())]
    });
    found.sort();
    assert_eq!(found, tensors.collect::<Vec<_>>());
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
fn a_quiet_run_says_nothing_and_writes_its_files() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/quickstart.toml");
    let sets = ["run.steps=2", "log.every_steps=1", "batch.global=16", "data.train=64", "data.test=16"];
    for _ in ["it trains", "it is complete"] {
        let mut command = trainer(&["-n", "2", "--quiet", "--config", config, "--out", out]);
        let output = command.args(sets.iter().flat_map(|set| ["--set", set])).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()), "");
    }
    assert!(folder.path().join("metrics.jsonl").exists() && folder.path().join("summary.json").exists());
}

#[test]
fn help_fits_a_screen_of_80_by_24_and_has_examples() {
    for command in ["", "plan", "eval", "bench-step", "bench-comm", "data pack", "data generate", "schema"] {
        let args: Vec<&str> = command.split_whitespace().chain(["--help"]).collect();
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
