//! Linear layers by their factors: the bits of the all-reduce, whatever the ranks, micro-batches and precision.

#[allow(dead_code)]
mod common;
#[path = "common/runs.rs"]
mod runs;
#[allow(dead_code)]
#[path = "common/shells.rs"]
mod shells;

use runs::{program, summary, trainer};
use shells::Shells;
use std::fs;
use std::path::Path;

/// 150 training samples are 4.7 steps of 32: in the short one some ranks have micro-batches without a sample.
const CONFIG: &str = r#"
[run]
name = "factors"
seed = 3
epochs = 2
[data]
format = "shapes"
train = 150
test = 30
[batch]
global = 32
[model]
input = [32, 32, 3]
[[model.layers]]
type = "max_pool"
size = 4
[[model.layers]]
type = "flatten"
[[model.layers]]
type = "linear"
name = "hidden"
units = 101
activation = "tanh"
[[model.layers]]
type = "dropout"
rate = 0.1
[[model.layers]]
type = "linear"
name = "narrow"
units = 40
bias = false
activation = "relu"
[[model.layers]]
type = "linear"
name = "last"
units = 10
[optimizer]
type = "adam"
lr = 0.01
weight_decay = 0.01
clip_value = 0.01
[parallel]
bucket_mib = 0.001
"#;

fn digest(out: &Path) -> String {
    summary(out)["weights_digest"].as_str().unwrap().to_owned()
}

#[test]
fn factors_give_the_bits_of_the_all_reduce() {
    let folder = tempfile::tempdir().unwrap();
    for (name, ranks, settings) in [
        ("two", 2, &[][..]),
        ("four", 4, &[]),
        ("micro", 2, &["batch.micro=4"]),
        // Three ranks with four micro-batches each: a tree in trees.
        ("uneven", 3, &["batch={ global = 36, micro = 3 }"]),
        ("many", 8, &["batch.micro=2"]),
        ("late", 2, &["parallel.overlap=false", "optimizer={ type = 'sgd', lr = 0.1, momentum = 0.9 }"]),
        ("bf16", 2, &["run.precision=bf16"]),
    ] {
        let run = |exchange: &str| {
            let out = folder.path().join(format!("{name}-{exchange}"));
            let exchange = format!("parallel.factor_exchange={exchange}");
            let settings = [&["parallel.transport=tcp", &exchange], settings].concat();
            let output = trainer(CONFIG, &out, ranks, &settings).arg("-v").unwrap();
            let told = String::from_utf8(output.stderr).unwrap();
            assert_eq!(
                told.contains("factors instead of gradients: hidden, narrow, last"),
                exchange.ends_with("on"),
                "{told}"
            );
            digest(&out)
        };
        assert_eq!(run("on"), run("off"), "{name}");
    }
}

/// A rank with eight threads would exchange the factors of two layers over this network, one with a single thread none.
#[test]
fn rank_0_chooses_for_ranks_with_other_threads() {
    const NETWORK: &str = "parallel.network_gbit_s=100";
    let folder = tempfile::tempdir().unwrap();
    let plain = folder.path().join("plain");
    trainer(CONFIG, &plain, 2, &["parallel.transport=tcp", "parallel.factor_exchange=off"]).assert().success();
    for threads in [["1", "8"], ["8", "1"]] {
        let shells = Shells::new(2);
        (0..2).for_each(|rank| fs::write(shells.machine(rank).join("run.toml"), CONFIG).unwrap());
        let ranks = shells.run(|rank, command| {
            command.env("RAYON_NUM_THREADS", threads[rank]);
            for setting in [NETWORK, "parallel.transport=tcp", "parallel.timeout=60"] {
                command.args(["--set", setting]);
            }
        });
        assert!(ranks.iter().all(|(_, code)| *code == 0), "{ranks:?}");
        let told = ranks[0].0.lines().find_map(|line| line.split("factors instead of gradients: ").nth(1));
        assert_eq!(told, (threads[0] == "8").then_some("hidden, narrow"), "{}", ranks[0].0);
        assert_eq!(digest(&shells.machine(0).join("runs/factors")), digest(&plain), "{threads:?}");
    }
}

/// State that every host holds whole is saved whole, and taken up by ranks that share it out.
#[test]
fn a_run_goes_on_with_and_without_factors() {
    let folder = tempfile::tempdir().unwrap();
    let out = |name: &str| folder.path().join(name);
    let on = ["parallel.transport=tcp", "parallel.factor_exchange=on"];
    trainer(CONFIG, &out("whole"), 2, &["run.steps=9"]).assert().success();
    trainer(CONFIG, &out("first"), 2, &[&on[..], &["run.steps=3"]].concat()).assert().success();
    trainer(CONFIG, &out("first"), 2, &["run.steps=6"]).assert().success();
    trainer(CONFIG, &out("first"), 2, &[&on[..], &["run.steps=9"]].concat()).assert().success();
    assert_eq!(digest(&out("first")), digest(&out("whole")));
}

/// The estimate: bytes by hand, and a choice that follows the network and the batch.
#[test]
fn plan_shows_what_either_way_costs() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("plan.toml");
    fs::write(&file, CONFIG).unwrap();
    let plan = |arguments: &[&str]| {
        let output = program().args(["plan", "--config"]).arg(&file).args(arguments).unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(!plan(&["--np", "2"]).contains("Linear layers"), "one host");
    let whole = plan(&["--np", "2", "--hosts", "2"]);
    assert!(whole.contains("\n\n# Linear layers") && !whole.contains("\n\n\n"), "{whole}");
    // hidden: 192 * 101 + 101 values, all of it through the link of either host; factors: half of (192 + 101) * 32 values.
    let of = |text: &str| {
        text.lines().rfind(|line| line.starts_with("| hidden") && line.contains("KiB")).unwrap().to_owned()
    };
    let slow = of(&plan(&["--np", "2", "--hosts", "2", "--set", "parallel.network_gbit_s=0.1"]));
    assert!(slow.contains("76.1 KiB") && slow.contains("18.3 KiB") && slow.ends_with("| factors   |"), "{slow}");
    let large = of(&plan(&["--np", "2", "--hosts", "2", "--set", "batch.global=3200"]));
    assert!(large.ends_with("| gradient  |"), "{large}");
    let output = program().args(["plan", "--config"]).arg(&file).args(["--np", "2", "--hosts", "3"]).assert().code(2);
    let error = String::from_utf8(output.get_output().stderr.clone()).unwrap();
    assert!(error.contains("2 ranks are on 2 hosts at most"), "{error}");
}
