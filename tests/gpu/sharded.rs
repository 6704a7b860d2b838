//! Runs over NCCL whose ranks share the update, against those in which each updates all. The emulator sums in one order for both; of
//! two ranks there is but one.

use crate::emulator;
use crate::runs::summary;
use crate::training::{Runs, two_layers};
use serde_json::Value;

const REPLICATED: &[&str] = &["run.device=cuda", "parallel.transport=nccl"];
const SHARDED: &[&str] = &["run.device=cuda", "parallel.transport=nccl", "parallel.nccl_update=sharded"];

fn digest(summary: &Value) -> &str {
    summary["weights_digest"].as_str().unwrap()
}

/// Parameters and state, of every kind of rule: those that update bucket by bucket, those that wait for all sums, and one that skips
/// updates whose gradients overflow.
#[test]
fn ranks_that_share_the_update_end_with_the_same_bits() {
    let Some(runs) = Runs::new() else { return };
    let optimizer = |of: &str| format!("optimizer={{ {of}, lr = 0.02 }}");
    let (adam, adagrad, adadelta) =
        (optimizer("type = 'adam'"), optimizer("type = 'adagrad'"), optimizer("type = 'adadelta'"));
    let lars = optimizer("type = 'lars', momentum = 0.9, clip_norm = 0.5");
    for (ranks, settings) in [
        (2, &[][..]),
        (4, &["run.cuda_graphs=false", "parallel.bucket_mib=0.0001"]),
        (3, &["batch.global=12", "parallel.overlap=false"]),
        (4, &[&adam, "run.precision=bf16"]),
        (2, &[&adagrad, "run.precision=bf16", "parallel.reduce_dtype=bf16"]),
        (2, &[&adadelta, "optimizer.clip_norm=0.5", "parallel.reduce_dtype=bf16"]),
        (4, &[&lars]),
        (2, &["run.precision=fp16", "optimizer.loss_scale=1048576"]),
    ] {
        if ranks > 2 && !emulator::is_emulated() {
            continue;
        }
        let [all, shared] = [("all", REPLICATED), ("shared", SHARDED)].map(|(form, nccl)| {
            let out = format!("{form}-{ranks}-{}", settings.concat().replace(['.', '\'', ' '], ""));
            let settings = [nccl, &["run.steps=5"], settings].concat();
            (runs.train(&out, ranks, &settings), out)
        });
        let what = format!("{ranks} ranks, {settings:?}");
        assert_eq!(digest(&shared.0), digest(&all.0), "{what}");
        assert_eq!(shared.0["skipped_updates"], all.0["skipped_updates"], "{what}");
        let (tensor, difference) = runs.difference(&shared.1, &all.1);
        assert_eq!(difference, 0.0, "{tensor} of {what}");
        assert!(!what.contains("fp16") || all.0["skipped_updates"].as_i64() > Some(0), "{what}: {}", all.0);
    }
}

/// A checkpoint does not know who held what of it.
#[test]
fn a_run_goes_on_with_other_ranks_in_another_form_or_on_the_cpu() {
    let Some(runs) = Runs::new().filter(|_| emulator::is_emulated()) else { return };
    let adam = "optimizer={ type = 'adam', lr = 0.02 }";
    let go_on = |out: &str, ranks: usize, form: &[&str], steps: u32| {
        let steps = format!("run.steps={steps}");
        runs.train(out, ranks, &[form, &[adam, &steps]].concat())
    };
    let whole = go_on("whole", 2, REPLICATED, 8);
    go_on("moved", 2, SHARDED, 2);
    go_on("moved", 4, SHARDED, 3);
    go_on("moved", 1, &["run.device=cuda"], 5);
    go_on("moved", 2, REPLICATED, 6);
    let moved = go_on("moved", 4, SHARDED, 8);
    assert_eq!(digest(&moved), digest(&whole));
    assert_eq!(runs.difference("moved", "whole").1, 0.0);

    go_on("to-cpu", 2, SHARDED, 3);
    go_on("to-cpu", 1, &["run.device=cpu"], 6);
    go_on("to-cpu", 2, SHARDED, 8);
    let (tensor, difference) = runs.difference("to-cpu", "whole");
    assert!(difference < 1e-3, "{tensor} differs by {difference:e}");
}

/// Whatever order of the streams their events leave open.
#[test]
fn streams_in_any_order_share_the_update_alike() {
    let Some(runs) = Runs::new().filter(|_| emulator::is_emulated()) else { return };
    for rule in ["optimizer.momentum=0.9", "optimizer.clip_norm=0.5"] {
        let [late, eager, mixed] = ["late", "eager", "mixed"].map(|order| {
            let (out, settings) = (format!("{order}-{rule}"), [SHARDED, &["run.precision=bf16", rule]].concat());
            let mut command = runs.command(&out, 2, &settings);
            command.env("LOCKSTEP_EMULATOR_STREAMS", order).assert().success();
            digest(&summary(&runs.out(&out))).to_owned()
        });
        assert_eq!(late, eager, "{rule}");
        assert_eq!(mixed, eager, "{rule}");
    }
}

/// The first update makes the weights so large that the loss of one rank's sample overflows, and not that of the other's. What the
/// other would update comes to both.
#[test]
fn a_loss_that_is_not_finite_on_one_rank_halts_all() {
    let Some(runs) = Runs::of(two_layers()).filter(|_| emulator::is_emulated()) else { return };
    let settings = [SHARDED, &["run.seed=5", "optimizer.lr=2e18", "batch.global=2", "batch.micro=1"]].concat();
    let before = runs.train("before", 2, &[&settings[..], &["run.steps=1"]].concat());
    let mut run = runs.command("after", 2, &settings);
    let output = run.env("LOCKSTEP_EMULATOR_STREAMS", "busy").assert().code(5).get_output().clone();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("the loss is inf in step 2: on rank 0"), "{error}");
    assert!(error.contains("the loss is inf in step 2: another rank says where"), "{error}");
    // Where the other rank was gone before rank 0 looked, it does not say.
    let after = summary(&runs.out("after"));
    assert!(["", digest(&before)].contains(&digest(&after)), "{after} and {before}");
}
