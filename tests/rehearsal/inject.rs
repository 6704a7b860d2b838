//! Every fault of `--inject`: what is said of it, the exit code, and that the same command goes on to the weights of a run
//! in which nothing fails.

use crate::harness::{Ended, Rehearsal, undisturbed};
use std::fs;
use std::thread;

/// Runs, and holds the exit code and words of the output against what is expected.
#[track_caller]
fn expect(rehearsal: &Rehearsal, ranks: usize, args: &str, code: i32, words: &[&str]) -> String {
    let Ended { code: found, output } = rehearsal.run(ranks, args);
    assert_eq!(found, code, "{args}\n{output}");
    for words in words {
        assert!(output.contains(words), "{args}: no `{words}`\n{output}");
    }
    output
}

#[test]
fn what_ends_a_run_happens_once_and_the_same_command_goes_on() {
    for (ranks, args, code, words) in [
        (2, "--inject kill:rank=1@step=25", 4, "was killed by signal 9 (SIGKILL)"),
        (2, "--inject kill:rank=0@step=25", 4, "rank 0 (pid "),
        (2, "--inject nan:rank=1@step=25", 5, "the loss is NaN in step 25: on rank 1, it was put there by --inject"),
        (2, "--inject term:rank=1@step=25", 75, "stopped by SIGTERM after step 2"),
        (2, "--inject usr1:rank=0@step=25", 75, "stopped by SIGUSR1 after step 2"),
        (
            4,
            "--inject corrupt-params:rank=2@step=25 --set parallel.transport=tcp --set parallel.audit_every_steps=5",
            6,
            "after step 25 the ranks no longer have the same parameters: `linear_3.weight` on ranks [2] is not what the \
             other ranks have. ",
        ),
        (
            2,
            "--inject corrupt-params:rank=1@step=30 --set parallel.transport=tcp",
            6,
            "after step 30 the ranks no longer have the same parameters: `linear_3.weight` on ranks [1] is not what rank 0 \
             has, and no majority says which is right. ",
        ),
    ] {
        let rehearsal = Rehearsal::new();
        let output = expect(&rehearsal, ranks, args, code, &[words, "warning: --inject "]);
        let whole = if code == 75 { 30 } else { 20 };
        assert!(rehearsal.checkpoints().last().unwrap() <= &whole, "{args}: {:?}\n{output}", rehearsal.checkpoints());
        let again = "it has happened in this run (see ";
        expect(&rehearsal, ranks, args, 0, &["going on from ", again, "all 40 steps are done"]);
        assert_eq!(rehearsal.digest(), undisturbed(), "{args}");
    }
}

#[test]
fn a_spoilt_checkpoint_is_not_used() {
    let rehearsal = Rehearsal::new();
    let args = "--inject corrupt-checkpoint:step=20 --inject kill:rank=1@step=25";
    expect(&rehearsal, 2, args, 4, &["warning: --inject corrupt-checkpoint:step=20\n"]);
    let words = ["step-00000020.safetensors is not used: is damaged", "step-00000010.safetensors (step 10)"];
    expect(&rehearsal, 2, args, 0, &words);
    assert_eq!(rehearsal.digest(), undisturbed());
}

/// The waits of these take seconds each, so they run side by side.
#[test]
fn a_rank_that_is_stopped_or_cut_off_is_named() {
    const SILENT: &str = "has not been heard of for ";
    let check = |args: &str, code: i32, words: &[&str]| {
        let rehearsal = Rehearsal::new();
        expect(&rehearsal, 2, args, code, words);
        rehearsal
    };
    thread::scope(|scope| {
        let woken = scope.spawn(|| {
            check("--inject stop:rank=1@step=25:6s", 0, &[SILENT, "warning: rank 1 (pid ", "goes on after"]).digest()
        });
        scope.spawn(|| {
            let words = ["rank 1 (pid ", SILENT, "[parallel] timeout", "did not stop by itself"];
            check("--inject stop:rank=1@step=25 --set parallel.timeout=6", 4, &words);
        });
        // What stands open over tcp is noticed earlier where the kernel is told to.
        for (transport, silent) in [("shm", SILENT), ("tcp", "")] {
            scope.spawn(move || {
                let cut = "--inject drop-link:rank=1@step=25 --set parallel.timeout=6 --set parallel.transport=";
                check(&format!("{cut}{transport}"), 4, &["rank 1 (pid ", silent, " step 2"]);
            });
        }
        assert_eq!(woken.join().unwrap(), undisturbed());
    });
}

#[test]
fn a_delayed_rank_is_the_slowest() {
    let rehearsal = Rehearsal::new();
    expect(&rehearsal, 2, "--inject delay:rank=1:150ms", 0, &["waiting for the slowest rank (rank 1)"]);
    assert_eq!(rehearsal.digest(), undisturbed());
}

#[test]
fn what_did_not_happen_is_said_at_the_end() {
    let rehearsal = Rehearsal::new();
    let args =
        "--inject kill:rank=1@step=400 --inject corrupt-checkpoint:step=21 --inject corrupt-params:rank=0@step=20";
    let words = [
        "warning: --inject kill:rank=1@step=400 did not happen: the run ended after step 40",
        "warning: --inject corrupt-checkpoint:step=21 did not happen: no checkpoint was saved after that step",
        "warning: --inject corrupt-params:rank=0@step=20 did not happen: after that step no copies of the parameters",
    ];
    expect(&rehearsal, 2, args, 0, &words);
}

#[test]
fn resume_none_begins_a_new_course() {
    let rehearsal = Rehearsal::new();
    for _ in 0..2 {
        let args = "--resume none --inject nan:rank=1@step=3";
        expect(&rehearsal, 2, args, 5, &["the loss is NaN in step 3: on rank 1"]);
        assert_eq!(fs::read_to_string(rehearsal.out().join("injected")).unwrap(), "nan:rank=1@step=3\n");
    }
}

#[test]
fn a_fault_that_cannot_be_is_refused_once() {
    for (args, words) in [
        ("--inject kill:rank=2@step=3", "error: --inject kill:rank=2@step=3: there is no rank 2, the last one is 1"),
        ("--inject kil:rank=1@step=3", "`kil` is no fault; there are kill, stop, delay, "),
        ("--inject delay:rank=1", "expected delay:rank=R:TIME, such as delay:rank=1:50ms"),
    ] {
        let rehearsal = Rehearsal::new();
        let output = expect(&rehearsal, 2, args, 2, &[words]);
        assert_eq!(output.matches("error: ").count(), 1, "{output}");
        assert!(!rehearsal.out().exists(), "nothing was begun");
    }
}
