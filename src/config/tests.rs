use super::difference;
use super::load::read;
use super::raw::{Augment, Config, Format, Loss, Rule, ScheduleShape, TransportChoice};
use super::source::Source;
use crate::error::{Kind, Result};
use proptest::prelude::*;

pub(super) const MINIMAL: &str = r#"
[run]
name = "minimal"
epochs = 2

[data]
format = "shapes"

[batch]
global = 64

[model]
input = [32, 32, 3]
[[model.layers]]
type = "relu"
name = "first"
[[model.layers]]
type = "tanh"

[optimizer]
type = "sgd"
lr = 0.1
"#;

pub(super) fn parse(text: &str, sets: &[&str]) -> Result<Config> {
    let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
    let (source, table) = Source::parse("test.toml".into(), text.into(), &sets)?;
    read(table).map_err(|problems| source.explain(&problems))
}

/// What the error for `MINIMAL` with one piece replaced says.
fn error(old: &str, new: &str) -> String {
    assert!(MINIMAL.contains(old), "{old} is not in the file");
    let error = parse(&MINIMAL.replacen(old, new, 1), &[]).err().unwrap_or_else(|| panic!("{new} was accepted"));
    assert_eq!(error.kind(), Kind::Usage);
    error.to_string()
}

fn set_error(set: &str) -> String {
    parse(MINIMAL, &[set]).err().unwrap_or_else(|| panic!("{set} was accepted")).to_string()
}

#[test]
fn an_error_shows_line_caret_key_and_the_nearest_spelling() {
    assert_eq!(
        error("[batch]\nglobal", "[batch]\nglobel"),
        "test.toml:10: unknown key batch.globel\n\
        \u{20}   |\n 10 | globel = 64\n    | ^^^^^^\n\
        \u{20}   = allowed in batch: global, local, micro\n    = did you mean `global`?"
    );
}

#[test]
fn every_kind_of_mistake_is_named() {
    let cases: &[(&str, &str, &[&str])] = &[
        ("lr = 0.1", "lrr = 0.1", &["test.toml:22", "optimizer.lrr", "type = \"sgd\"", "did you mean `lr`"]),
        ("lr = 0.1", "lr = -0.1", &["optimizer.lr is -0.1, expected a number > 0"]),
        ("lr = 0.1", "lr = 1e-60", &["expected a number > 0"]),
        ("lr = 0.1", "lr = 1e60", &["expected a number > 0"]),
        ("lr = 0.1", "lr = nan", &["expected a number > 0"]),
        ("lr = 0.1", "", &["test.toml:20", "optimizer.lr is missing", "for example: lr = 0.1"]),
        ("\"sgd\"", "\"sdg\"", &["optimizer.type = \"sdg\"", "adam, adamw", "did you mean `sgd`"]),
        ("[optimizer]", "[optimzer]", &["unknown section [optimzer]", "did you mean `optimizer`"]),
        ("[batch]\nglobal = 64", "", &["section [batch] is missing", "global = 128"]),
        ("global = 64", "", &["the batch has no size"]),
        ("global = 64", "global = 64\nlocal = 2", &["keep one"]),
        ("epochs = 2", "epochs = \"two\"", &["test.toml:4", "the string \"two\", expected an integer >= 1"]),
        ("epochs = 2", "epochs = 2.0", &["expected an integer >= 1"]),
        ("epochs = 2", "epochs = 0", &["run.epochs is 0"]),
        ("epochs = 2", "", &["the run has no end"]),
        ("epochs = 2", "epochs = 2\ntarget_accuracy = 1.5", &["> 0", "<= 1"]),
        (
            "\"shapes\"",
            "\"shape\"",
            &["data.format", "shapes, idx, cifar, images, tfrecord, synthetic", "did you mean `shapes`"],
        ),
        ("\"shapes\"", "\"idx\"", &["data.path is missing"]),
        ("\"shapes\"", "\"shapes\"\npath = \"x\"", &["unknown key data.path", "format = \"shapes\""]),
        ("\"shapes\"", "\"shapes\"\nvalidation = 1.0", &["expected a number >= 0 and < 1"]),
        ("\"shapes\"", "\"shapes\"\naugment = [\"flip\"]", &["data.augment.0", "did you mean `horizontal_flip`"]),
        ("\"shapes\"", "\"shapes\"\naugment = [{ type = \"random_crop\", pad = 2 }]", &["data.augment.0.pad"]),
        ("[32, 32, 3]", "[32, 32]", &["model.input has 2 values"]),
        ("[32, 32, 3]", "[32, 0, 3]", &["model.input.1 is 0"]),
        ("\"relu\"", "\"rleu\"", &["test.toml:15", "model.layers.0.type", "did you mean `relu`"]),
        ("\"tanh\"", "\"tanh\"\nunits = 3", &["model.layers.1.units", "type = \"tanh\""]),
        ("\"tanh\"", "\"tanh\"\nname = \"first\"", &["test.toml:19", "two layers are named `first`"]),
        ("\"tanh\"", "\"tanh\"\nname = \"input\"", &["`input` is the name of the data"]),
        ("\"tanh\"", "\"tanh\"\nname = \"a/b\"", &["holds '/'"]),
        ("\"tanh\"", "\"tanh\"\nfrom = \"frist\"", &["does not exist", "did you mean `first`"]),
        (
            "epochs = 2",
            "epochs = 2\ndevice = \"cuda\"\n[parallel]\nfactor_exchange = \"on\"",
            &["factor_exchange = \"on\" is for ranks that compute on the CPU", "run.device"],
        ),
        (
            "[optimizer]",
            "[parallel]\nnccl_update = \"sharded\"\n[optimizer]",
            &["nccl_update = \"sharded\" goes with parallel.transport = \"nccl\"", "always share"],
        ),
        (
            "epochs = 2",
            "epochs = 2\nprecision = \"fp16\"",
            &["test.toml:5", "is for GPUs: run.device = \"cuda\"", "bf16"],
        ),
        ("lr = 0.1", "lr = 0.1\nloss_scale = 2.0", &["test.toml:23", "loss_scale is for run.precision = \"fp16\""]),
        ("lr = 0.1", "lr = 0.1\nloss_scale_growth_every = 9", &["growth_every is for run.precision = \"fp16\""]),
        ("epochs = 2", "epochs = 2\ndevice = \"gpu\"", &["did you mean `cuda`"]),
        ("epochs = 2", "epochs = 2\nprecision = \"half\"", &["did you mean `fp16`"]),
        ("\"first\"", "\"first\"\nfrom = [\"tanh_2\"]", &["which is not before it"]),
        ("\"minimal\"", "\"../x\"", &["run.name holds '/'"]),
        ("\"sgd\"", "\"sgd\"\nnesterov = true", &["nesterov needs a momentum"]),
        ("\"sgd\"", "\"sgd\"\nmomentum = 1.0", &["< 1"]),
        ("\"sgd\"", "\"adam\"\nbetas = [0.9, 1.0]", &["optimizer.betas.1"]),
        ("\"sgd\"", "\"adam\"\neps = -1e-8", &["optimizer.eps is -0.00000001"]),
        ("\"sgd\"", "\"adadelta\"\nrho = 1.5", &["optimizer.rho is 1.5, expected a number >= 0 and <= 1"]),
        ("\"sgd\"", "\"lars\"\ntrust_coefficient = 0", &["optimizer.trust_coefficient is 0"]),
        ("lr = 0.1", "lr = 0.1\nclip_norm = 0.0", &["optimizer.clip_norm is 0", "expected a number > 0"]),
        ("lr = 0.1", "lr = 0.1\nclip_value = -1", &["optimizer.clip_value is -1"]),
        ("lr = 0.1", "lr = 0.1\nl1 = -1", &["optimizer.l1 is -1"]),
        ("[optimizer]", "[schedule]\ntype = \"step\"\n[optimizer]", &["every_epochs and at_epochs"]),
        (
            "[optimizer]",
            "[schedule]\ntype = \"step\"\nevery_epochs = 1\nat_epochs = [1]\n[optimizer]",
            &["every_epochs and at_epochs"],
        ),
        ("[optimizer]", "[schedule]\ntype = \"step\"\nevery_epochs = 0\n[optimizer]", &["schedule.every_epochs is 0"]),
        ("[optimizer]", "[schedule]\ntype = \"step\"\nat_epochs = [0]\n[optimizer]", &["schedule.at_epochs.0 is 0"]),
        ("[optimizer]", "[schedule]\ntype = \"exponential\"\ngamma = -0.1\n[optimizer]", &["schedule.gamma is -0.1"]),
        ("[optimizer]", "[schedule]\ntype = \"polynomial\"\npower = 0\n[optimizer]", &["schedule.power is 0"]),
        ("[optimizer]", "[schedule]\ntype = \"cosine\"\nend_lr = nan\n[optimizer]", &["schedule.end_lr is nan"]),
        (
            "epochs = 2",
            "max_minutes = 1\n[schedule]\ntype = \"cosine\"",
            &["needs to know the length of the run", "give run.epochs or run.steps"],
        ),
        ("[optimizer]", "[schedule]\nwarmup_epochs = -1\n[optimizer]", &["schedule.warmup_epochs is -1"]),
        ("[optimizer]", "[schedule]\nwarmup_steps = 1\nwarmup_epochs = 1\n[optimizer]", &["keep one"]),
        ("[optimizer]", "[loss]\nlabel_smoothing = 1.0\n[optimizer]", &["loss.label_smoothing", "< 1"]),
        ("[optimizer]", "[loss]\nclass_weights = \"even\"\n[optimizer]", &["loss.class_weights"]),
        ("[optimizer]", "[parallel]\nbucket_mib = 0\n[optimizer]", &["parallel.bucket_mib is 0"]),
        ("[optimizer]", "[parallel]\ntransport = \"rdma\"\n[optimizer]", &["shm, tcp"]),
        ("[optimizer]", "[checkpoint]\nkeep = 0\n[optimizer]", &["checkpoint.keep is 0"]),
        ("[optimizer]", "[eval]\nevery_steps = 0\n[optimizer]", &["eval.every_steps is 0"]),
        ("[run]", "[run", &["test.toml:2", "not valid TOML"]),
        ("epochs = 2", "epochs = 2\nepochs = 3", &["not valid TOML", "duplicate key"]),
    ];
    for (old, new, words) in cases {
        let error = error(old, new);
        for word in *words {
            assert!(error.contains(word), "for {new:?}, `{word}` is not in:\n{error}");
        }
        assert_eq!(error.matches("error: ").count(), 0, "for {new:?}, one mistake is one error:\n{error}");
    }
}

#[test]
fn several_mistakes_are_shown_at_once() {
    let text = MINIMAL.replace("lr = 0.1", "lr = 0").replace("global = 64", "global = 0");
    let error = parse(&text, &[]).err().unwrap().to_string();
    assert!(error.contains("test.toml:10: batch.global") && error.contains("error: test.toml:22: optimizer.lr"));
}

#[test]
fn set_changes_any_key() {
    let sets = [
        "optimizer.lr=0.5",
        "run.name=other",
        "model.layers.1.from=input",
        "model.layers.first.type=sigmoid",
        "parallel.transport=tcp",
        "data={ format = \"idx\", path = \"some/where\" }",
        "data.path = else/where",
    ];
    let config = parse(MINIMAL, &sets).unwrap();
    assert_eq!(config.optimizer.shared.lr, 0.5);
    assert_eq!(config.run.name, "other");
    assert_eq!(config.model.layers[1].from, ["input"]);
    assert_eq!(config.model.layers[0].kind, "sigmoid");
    assert_eq!(config.parallel.transport, TransportChoice::Tcp);
    assert!(matches!(config.data.format, Format::Idx { path } if path.as_os_str() == "else/where"));
}

#[test]
fn a_set_that_changes_the_kind_of_a_section_leaves_aside_what_the_file_says_for_another() {
    let file = MINIMAL
        .replace("\"shapes\"", "\"images\"\npath = \"x\"\ntest = 0.5\nworkers = 3")
        .replace("lr = 0.1", "lr = 0.1\nmomentum = 0.9");
    let config = parse(&file, &["data.format=synthetic", "optimizer.type=adam"]).unwrap();
    assert!(matches!(config.data.format, Format::Synthetic { classes: None, .. }));
    assert_eq!(config.data.shared.workers, 3);
    let config = parse(&file, &["data.format=cifar", "optimizer.type=lars"]).unwrap();
    assert!(matches!(config.data.format, Format::Cifar { path } if path.as_os_str() == "x"), "a key that both know");
    assert!(matches!(config.optimizer.rule, Rule::Lars { momentum: 0.9, .. }));
    // What is set, known to nobody, or wrong is not overlooked.
    let refusals = [
        (file.as_str(), vec!["data.path=y", "data.format=synthetic"], "unknown key data.path"),
        (&file.replace("test = 0.5", "test = 1.5"), vec!["data.format=images"], "data.test is 1.5"),
        (&file.replace("workers = 3", "workers = 0"), vec!["data.format=synthetic"], "data.workers is 0"),
        (&file.replace("workers", "wrokers"), vec!["data.format=synthetic"], "unknown key data.wrokers"),
        (&file, vec!["data.workers=2"], ""),
    ];
    for (file, sets, expected) in refusals {
        match parse(file, &sets) {
            Err(error) => assert!(!expected.is_empty() && error.to_string().contains(expected), "{error}"),
            Ok(_) => assert!(expected.is_empty(), "{sets:?} was accepted"),
        }
    }
}

#[test]
fn a_wrong_set_is_shown_as_such() {
    for (set, words) in [
        ("optimizer.lr=abc", "--set: optimizer.lr is the string \"abc\""),
        ("optimzer.lr=1", "unknown section [optimzer]"),
        ("model.layers.5.type=relu", "no element `5`, it has 2, numbered from 0: first, tanh_2"),
        ("model.layers.tanh_2.type=rela", "model.layers.1.type = \"rela\""),
        ("lr", "KEY=VALUE"),
        ("=1", "KEY=VALUE"),
        ("run.name.x=1", "run.name is of type string"),
        ("parallel={ timeout = 0 }", "parallel.timeout is 0"),
    ] {
        let error = set_error(set);
        assert!(error.starts_with("--set: ") && error.contains(words), "{error}");
        assert!(error.contains(&format!("| {set}\n")), "{error}");
    }
}

#[test]
fn what_is_not_given_has_its_default() {
    let config = parse(MINIMAL, &[]).unwrap();
    assert!(matches!(config.schedule.shape, ScheduleShape::Constant {}));
    assert!(matches!(config.loss, Loss::SoftmaxCrossEntropy { label_smoothing: 0.0, class_weights: None }));
    assert_eq!(config.checkpoint.every_epochs, Some(1));
    assert_eq!(config.model.layers[1].name, "tanh_2");
    assert_eq!(config.model.layers[0].from, ["input"]);
    assert_eq!(config.model.layers[1].from, ["first"]);
    assert_eq!(parse(MINIMAL, &["eval.every_steps=5"]).unwrap().eval.every_epochs, None);

    let augment = "data.augment=[\"horizontal_flip\", { type = \"random_crop\" }]";
    let augment = parse(MINIMAL, &[augment]).unwrap().data.shared.augment;
    assert_eq!(augment, [Augment::HorizontalFlip {}, Augment::RandomCrop { padding: 4 }]);
}

#[test]
fn the_resolved_form_reads_back_as_itself_and_shows_floats_as_written() {
    let sets =
        ["optimizer={ type = \"adam\", lr = 0.1, eps = 1e-7 }", "data.augment=[\"random_crop\"]", "eval.every_steps=7"];
    let resolved = parse(MINIMAL, &sets).unwrap().resolved();
    let text = resolved.to_string();
    for line in [
        "lr = 0.1\n",
        "betas = [0.9, 0.999]\n",
        "eps = 0.0000001\n",
        "padding = 4",
        "type = \"constant\"",
        "from = [\"first\"]",
    ] {
        assert!(text.contains(line), "{line:?} is not in:\n{text}");
    }
    assert_eq!(parse(&text, &[]).unwrap().resolved(), resolved);
}

#[test]
fn every_layer_of_the_quickstart_survives_the_resolved_form() {
    let resolved = parse(include_str!("../../configs/quickstart.toml"), &[]).unwrap().resolved();
    assert_eq!(parse(&resolved.to_string(), &[]).unwrap().resolved(), resolved);
}

#[test]
fn the_difference_names_what_matters_for_going_on() {
    let resolved = |sets: &[&str]| parse(MINIMAL, sets).unwrap().resolved();
    let base = resolved(&[]);
    let free = ["run.epochs=9", "run.max_minutes=1", "parallel.transport=tcp", "log.every_steps=1", "data.workers=3"];
    assert_eq!(difference(&base, &resolved(&free)), [""; 0]);
    let strict = ["run.seed=1", "batch.global=128", "model.layers.1.type=relu", "data.validation=0.5"];
    assert_eq!(
        difference(&base, &resolved(&strict)),
        ["batch.global", "data.validation", "model.layers.1.name", "model.layers.1.type", "run.seed"]
    );
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,80}|[\\[\\]{}=.\"a-z0-9\n ]{0,80}", set in "\\PC{0,30}|[a-z.]{1,20}=.{0,9}") {
        let _ = parse(&text, &[]);
        let _ = parse(MINIMAL, &[&set]);
    }

    #[test]
    fn no_damaged_file_makes_it_panic(at in 0..MINIMAL.len(), piece in "[\\[\\]{}=.\"'a-zé0-9\n -]{0,6}", cut in 0usize..9) {
        let end = (at + cut).min(MINIMAL.len());
        let _ = parse(&format!("{}{piece}{}", &MINIMAL[..at], &MINIMAL[end..]), &[]);
    }

    #[test]
    fn any_value_for_any_key_is_read_or_refused(
        key in prop::sample::select(vec![
            "run.seed", "run.epochs", "data.train", "data.augment", "batch.micro", "model.input", "model.layers",
            "model.layers.0.from", "model.layers.0", "loss", "loss.class_weights", "optimizer", "optimizer.lr",
            "schedule.type", "parallel.timeout", "checkpoint", "log.every_steps",
        ]),
        value in prop::sample::select(vec![
            "0", "-1", "9223372036854775807", "1e308", "-0.0", "inf", "nan", "\"\"", "[]", "{}", "true", "[[], {}, 1]",
            "1979-05-27", "\"cosine\"", "{ type = 3 }", "{ type = \"adam\", lr = 1 }",
        ]),
    ) {
        let _ = parse(MINIMAL, &[&format!("{key}={value}")]);
    }
}
