//! `--max-restarts`: ranks that fail are started again, from the newest checkpoint, and the run ends with the weights of one
//! in which nothing fails.

use crate::common::send;
use crate::harness::{Ended, Rehearsal, ended, undisturbed};
use rustix::process::Signal;

#[test]
fn lost_ranks_are_started_again_and_the_weights_are_the_same() {
    for (ranks, args, words) in [
        (
            2,
            "--max-restarts 1 --inject kill:rank=1@step=25",
            "restart 1 of 1, on 2 ranks: the newest checkpoint is of step 20",
        ),
        (
            2,
            "--max-restarts 2 --inject kill:rank=1@step=15 --inject kill:rank=0@step=35 --set parallel.transport=tcp",
            "restart 2 of 2, on 2 ranks: the newest checkpoint is of step 30",
        ),
        (2, "--max-restarts 1 --inject kill:rank=0@step=5", "restart 1 of 1 in 1 s, on 2 ranks: nothing was saved"),
        (2, "--resume none --max-restarts 1 --inject kill:rank=1@step=25", "step-00000020.safetensors (step 20)"),
        (
            2,
            "--max-restarts 1 --inject corrupt-params:rank=1@step=20 --set parallel.transport=tcp",
            "restart 1 of 1, on 2 ranks: the newest checkpoint is of step 10",
        ),
        (
            4,
            "--max-restarts 1 --elastic --inject kill:rank=3@step=25",
            "restart 1 of 1, on 2 ranks (3 of 4 are left; batch.global 64 makes 4 micro-batches of batch.micro 16, which 3 \
             ranks cannot share equally; ",
        ),
        (2, "--max-restarts 1 --elastic --inject kill:rank=0@step=25", "restart 1 of 1, on 1 rank (1 of 2 are left): "),
    ] {
        let rehearsal = Rehearsal::new();
        let Ended { code, output } = rehearsal.run(ranks, args);
        assert_eq!(code, 0, "{args}\n{output}");
        assert!(output.contains(words), "{args}: no `{words}`\n{output}");
        assert_eq!(rehearsal.digest(), undisturbed(), "{args}\n{output}");
    }
}

/// What is between PATH and the failure counts; PATH itself, where nothing was saved yet.
#[test]
fn a_restart_of_a_run_from_a_checkpoint_goes_on_with_what_that_run_has_saved() {
    for (step, from) in [(25, "step-00000020.safetensors (step 20)"), (15, "step-00000010.safetensors (step 10)")] {
        let rehearsal = Rehearsal::new();
        assert_eq!(rehearsal.run(2, "--set run.steps=30 --set checkpoint.keep=3").code, 0);
        let path = rehearsal.out().join("checkpoints/step-00000010.safetensors");
        let args = format!("--resume {} --max-restarts 1 --inject kill:rank=1@step={step}", path.display());
        let Ended { code, output } = rehearsal.run(2, &args);
        assert_eq!(code, 0, "{output}");
        assert!(output.split("restart 1 of 1").nth(1).is_some_and(|rest| rest.contains(from)), "{from}\n{output}");
        assert_eq!(rehearsal.digest(), undisturbed(), "{output}");
        assert_eq!(rehearsal.steps("checkpoints.1"), [10, 20, 30], "{output}");
    }
}

#[test]
fn a_restart_of_a_run_that_begins_anew_does_not_go_on_with_the_earlier_one() {
    let rehearsal = Rehearsal::new();
    assert_eq!(rehearsal.run(2, "--set run.steps=30").code, 0);
    let Ended { code, output } = rehearsal.run(2, "--resume none --max-restarts 1 --inject kill:rank=1@step=1");
    assert_eq!(code, 0, "{output}");
    assert!(output.contains("restart 1 of 1 in 1 s, on 2 ranks: nothing was saved"), "{output}");
    assert!(!output.contains("going on from ") && output.contains("all 40 steps are done"), "{output}");
    assert_eq!(rehearsal.steps("checkpoints.1"), [20, 30], "{output}");
    assert_eq!(rehearsal.digest(), undisturbed(), "{output}");
}

/// From PATH, a failure that saved nothing leads to the same one, so there is a pause. That PATH is now the newest checkpoint
/// of the run's directory is no progress.
#[test]
fn a_restart_from_a_checkpoint_of_the_runs_own_waits_where_nothing_was_saved() {
    let rehearsal = Rehearsal::new();
    assert_eq!(rehearsal.run(2, "--set run.steps=30 --set checkpoint.keep=3").code, 0);
    let path = rehearsal.out().join("checkpoints/step-00000010.safetensors");
    let args = format!("--resume {} --max-restarts 1 --inject kill:rank=1@step=11", path.display());
    let Ended { code, output } = rehearsal.run(2, &args);
    assert_eq!(code, 0, "{output}");
    assert!(output.contains("step-00000010.safetensors; the same command goes on from it"), "{output}");
    assert!(output.contains("restart 1 of 1 in 1 s, on 2 ranks: the newest checkpoint is of step 10"), "{output}");
}

/// The weights of the results, and not their step, say whether they are this run's.
#[test]
fn a_run_that_began_anew_does_not_take_the_results_of_another_for_its_own() {
    let (rehearsal, other) = (Rehearsal::new(), Rehearsal::new());
    assert_eq!(rehearsal.run(1, "").code, 0);
    assert_eq!(other.run(1, "--set run.seed=5").code, 0);
    let args = format!("--resume {}", other.out().join("checkpoints/step-00000040.safetensors").display());
    for complete in [false, true] {
        let Ended { code, output } = rehearsal.run(1, &args);
        assert_eq!((code, output.contains("is complete")), (0, complete), "{output}");
        assert_eq!(rehearsal.digest(), other.digest(), "{output}");
    }
}

#[test]
fn what_would_fail_again_stands() {
    for (ranks, args, code, words) in [
        (
            2,
            "--max-restarts 1 --inject kill:rank=1@step=15 --inject kill:rank=0@step=25",
            4,
            "no restart is left of --max-restarts 1",
        ),
        (2, "--max-restarts 3 --inject nan:rank=1@step=5", 5, "the loss is NaN in step 5"),
        (2, "--max-restarts 3 --inject term:rank=1@step=5", 75, "the same command goes on from there"),
        (2, "--max-restarts 3 --set batch.global=63", 2, "batch.global 63 is not a multiple of batch.micro 16"),
        (3, "--max-restarts 3", 2, "which 3 ranks cannot share equally"),
        (
            4,
            "--max-restarts 3 --elastic --min-ranks 3 --inject kill:rank=1@step=5",
            4,
            "no restart: 3 of 4 ranks are left, and --min-ranks is 3; batch.global 64 makes 4 micro-batches",
        ),
        (2, "--max-restarts 3 --elastic --min-ranks 3", 2, "--min-ranks 3 with -n 2; give a number from 1 to 2"),
    ] {
        let Ended { code: found, output } = Rehearsal::new().run(ranks, args);
        assert_eq!(found, code, "{args}\n{output}");
        assert!(output.contains(words), "{args}: no `{words}`\n{output}");
        let restarts = output.matches("\nrestart ").count();
        assert_eq!(restarts, if output.contains("no restart is left") { 1 } else { 0 }, "{args}\n{output}");
    }
}

#[test]
fn a_signal_to_the_launcher_is_not_answered_with_a_restart() {
    for (fault, when, code, words) in [
        ("delay:rank=1:1ms", "  step 50/", 75, "stopped by SIGTERM"),
        // In the pause before a restart; on a slow machine behind it.
        ("kill:rank=0@step=3", "restart 1 of 9 in 1 s", 75, "stopped by SIGTERM"),
        // The other rank waits in vain before it can stop.
        ("stop:rank=1@step=3", "has not been heard of for", 4, "[parallel] timeout"),
    ] {
        let run = Rehearsal::new();
        let args = format!("--max-restarts 9 --set run.steps=1000000 --set parallel.timeout=6 --inject {fault}");
        let launched = run.start(2, &args);
        launched.expect(|output| output.contains(when));
        send(launched.pid(), Signal::TERM);
        let before = launched.output().matches("\nrestart ").count();
        let Ended { code: found, output } = ended(launched);
        assert_eq!(found, code, "{fault}\n{output}");
        assert!(output.contains(words), "{fault}\n{output}");
        assert_eq!(output.matches("\nrestart ").count(), before, "{fault}\n{output}");
    }
}

/// On the tests' small net, which takes less time.
#[test]
fn the_commands_of_readme_end_with_the_weights_of_an_undisturbed_run() {
    let readme = include_str!("../../README.md");
    let chapter =
        readme.split("\n## Rehearsing failures\n").nth(1).and_then(|rest| rest.split("\n## ").next()).unwrap();
    let text = chapter.replace("\\\n", " ");
    let commands = text.lines().filter_map(|line| line.strip_prefix("    trainer -n "));
    let mut seen = 0;
    for command in commands {
        let (ranks, args) =
            command.split_once(" --config configs/quickstart.toml ").expect("a command on the quickstart");
        let rehearsal = Rehearsal::new();
        let Ended { code, output } = rehearsal.run(ranks.parse().unwrap(), args);
        assert_eq!(code, 0, "{command}\n{output}");
        assert_eq!(rehearsal.digest(), undisturbed(), "{command}\n{output}");
        seen += 1;
    }
    assert_eq!(seen, 6, "commands in README's chapter");
}
