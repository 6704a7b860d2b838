//! What a whole run does when something fails: ranks are killed or stopped in several phases, signals come, checkpoints
//! are damaged. Every wait has a deadline, and only processes that a test started are signalled.

mod common;
#[path = "common/configs.rs"]
mod configs;

use common::{Launched, alive, children, send, until};
use rustix::process::Signal;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Survivors end within one second; a crowded machine gets this long.
const PROMPT: Duration = Duration::from_millis(1500);

/// Each setting makes the run spend most of its time elsewhere.
const STEPS: &[&str] = &[];
const EVALUATING: &[&str] = &["data.test=2000", "eval.every_steps=2"];
const SAVING: &[&str] = &["checkpoint.every_steps=1"];
const TCP: &[&str] = &["parallel.transport=tcp"];

#[test]
fn a_killed_rank_ends_the_run_within_a_moment_and_is_named() {
    for (ranks, victim, settings, after_ms) in [
        (2, 1, STEPS, 0),
        (2, 0, STEPS, 313),
        (3, 2, EVALUATING, 127),
        (2, 1, EVALUATING, 401),
        (2, 1, SAVING, 211),
        (4, 0, SAVING, 89),
        (2, 1, TCP, 157),
        (3, 0, TCP, 271),
    ] {
        let case = format!("rank {victim} of {ranks}, {settings:?}, {after_ms} ms");
        let folder = tempfile::tempdir().unwrap();
        let mut run = Run::start(&folder, ranks, settings);
        run.trains();
        thread::sleep(Duration::from_millis(after_ms));
        let pids = run.pids();
        let killed = Instant::now();
        send(pids[victim], Signal::KILL);
        for &pid in &pids {
            until("a survivor to end", || (!alive(pid)).then_some(()));
            let took = killed.elapsed();
            assert!(took < PROMPT, "{case}: process {pid} took {took:?}\n{}", run.launcher.output());
        }
        let (code, output) = (run.launcher.wait(), run.launcher.output());
        assert_eq!(code, 4, "{case}\n{output}");
        let pid = pids[victim];
        assert!(
            output.contains(&format!("rank {victim} (pid {pid}) was killed by signal 9 (SIGKILL)")),
            "{case}\n{output}"
        );
        assert!(output.contains(&format!("rank {victim} (pid {pid} on host ")), "{case}\n{output}");
        assert!(output.contains("was lost") && output.contains("of step "), "{case}\n{output}");
        let hint = output.contains("Last checkpoint: ") && output.contains("; the same command goes on from it");
        // Only rank 0 knows of a checkpoint at once.
        assert!(victim == 0 || hint, "{case}\n{output}");
        assert!(!output.contains("did not stop by itself"), "{case}\n{output}");
        run.assert_nothing_is_left(&pids);
    }
}

#[test]
fn after_kills_in_the_middle_of_checkpoints_the_same_command_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let mut newest = 0;
    for after_ms in [50, 83, 131] {
        let mut run = Run::start(&folder, 2, SAVING);
        until("a newer checkpoint", || (checkpoints(&out).last()? > &newest).then_some(()));
        thread::sleep(Duration::from_millis(after_ms));
        let pids = run.pids();
        send(pids[0], Signal::KILL);
        assert_eq!(run.launcher.wait(), 4, "{}", run.launcher.output());
        run.assert_nothing_is_left(&pids);
        if newest > 0 {
            assert!(run.launcher.output().contains("going on from"), "{}", run.launcher.output());
        }
        assert!(
            !run.launcher.output().contains("is not used"),
            "no checkpoint is half a checkpoint\n{}",
            run.launcher.output()
        );
        newest = *checkpoints(&out).last().unwrap();
    }
    let mut run = Run::start(&folder, 2, SAVING);
    until("a newer checkpoint", || (checkpoints(&out).last()? > &newest).then_some(()));
    send(run.launcher.pid(), Signal::TERM);
    assert_eq!(run.launcher.wait(), 75, "{}", run.launcher.output());
}

#[test]
fn a_stopped_rank_is_a_warning_and_after_the_timeout_an_error() {
    const TIMEOUT: Duration = Duration::from_secs(7);
    let stop = |victim: usize, wakes: bool, settings: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        // With a bucket for every few values, many reductions wait behind the one in which the rank is missed.
        let timeout = format!("parallel.timeout={}", TIMEOUT.as_secs_f64());
        let mut run = Run::start(&folder, 2, &[&[&timeout, "parallel.bucket_mib=0.0001"], settings].concat());
        run.trains();
        let pids = run.pids();
        let name = format!("rank {victim} (pid {} on host ", pids[victim]);
        let stopped = Instant::now();
        send(pids[victim], Signal::STOP);
        run.launcher.expect(|output| output.contains("has not been heard of for") && output.contains(&name));
        assert!(stopped.elapsed() < Duration::from_secs(6), "the warning came after {:?}", stopped.elapsed());
        if wakes {
            thread::sleep((TIMEOUT + Duration::from_millis(500)).saturating_sub(stopped.elapsed()));
            send(pids[victim], Signal::CONT);
        }
        assert_eq!(run.launcher.wait(), 4, "{}", run.launcher.output());
        let (took, output) = (stopped.elapsed(), run.launcher.output());
        assert!(took < 2 * TIMEOUT, "it took {took:?}\n{output}");
        assert_eq!(output.matches("has not been heard of").count(), 1, "{output}");
        let error = output.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
        assert!(error.contains(&name) && error.contains("[parallel] timeout"), "{output}");
        run.assert_nothing_is_left(&pids);
    };
    thread::scope(|scope| {
        scope.spawn(|| stop(1, false, STEPS));
        scope.spawn(|| stop(0, false, TCP));
        scope.spawn(|| stop(0, true, STEPS));
        scope.spawn(|| stop(1, true, TCP));
    });
}

#[test]
fn a_killed_launcher_takes_its_ranks_along() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = Run::start(&folder, 3, STEPS);
    run.trains();
    let pids = run.pids();
    send(run.launcher.pid(), Signal::KILL);
    run.assert_nothing_is_left(&pids);
}

#[test]
fn every_signal_saves_and_exits_75_and_says_so_once() {
    for (signal, name) in
        [(Signal::TERM, "SIGTERM"), (Signal::USR1, "SIGUSR1"), (Signal::HUP, "SIGHUP"), (Signal::INT, "SIGINT")]
    {
        let folder = tempfile::tempdir().unwrap();
        let mut run = Run::start(&folder, 2, STEPS);
        run.trains();
        let pids = run.pids();
        send(run.launcher.pid(), signal);
        assert_eq!(run.launcher.wait(), 75, "{}", run.launcher.output());
        let output = run.launcher.output();
        let last_words =
            |line: &&str| line.starts_with("stopped by ") && line.ends_with("the same command goes on from there");
        let last_words: Vec<&str> = output.lines().filter(last_words).collect();
        assert!(last_words.len() == 1 && last_words[0].contains(name), "said once for all ranks\n{output}");
        run.assert_nothing_is_left(&pids);
    }
}

#[test]
fn a_run_that_a_signal_interrupts_ends_with_the_weights_of_one_that_none_does() {
    // 40 steps an epoch, the last a short one.
    const SIXTY_STEPS: [&str; 3] = ["run.steps=60", "data.train=1900", "checkpoint.every_steps=1"];
    for (settings, resumed_on) in [(&["batch.micro=6"][..], &[1, 4][..]), (&[], &[2])] {
        let settings = [&SIXTY_STEPS, settings].concat();
        let folder = tempfile::tempdir().unwrap();
        let mut undisturbed = Run::start(&folder, 2, &settings);
        assert_eq!(undisturbed.launcher.wait(), 0, "{}", undisturbed.launcher.output());
        for &ranks in resumed_on {
            let folder = tempfile::tempdir().unwrap();
            let mut run = Run::start(&folder, 2, &settings);
            run.trains();
            send(run.launcher.pid(), Signal::TERM);
            assert_eq!(run.launcher.wait(), 75, "{}", run.launcher.output());
            let mut again = Run::start(&folder, ranks, &settings);
            assert_eq!(again.launcher.wait(), 0, "{}", again.launcher.output());
            assert!(again.launcher.output().contains("going on from"), "{}", again.launcher.output());
            assert_eq!(again.digest(), undisturbed.digest(), "resumed on {ranks}: {settings:?}");
        }
    }
}

#[test]
fn a_signal_ends_at_once_what_has_nothing_to_save() {
    for (signal, name) in [(Signal::TERM, "SIGTERM"), (Signal::HUP, "SIGHUP"), (Signal::INT, "SIGINT")] {
        let mut run = Run::spawn(2, &["bench-comm", "--json"], PathBuf::new());
        let pids = run.pids();
        run.launcher.expect(|output| output.contains("busbw_gb_s"));
        let signalled = Instant::now();
        send(run.launcher.pid(), signal);
        assert_eq!(run.launcher.wait(), 75, "{}", run.launcher.output());
        assert!(signalled.elapsed() < PROMPT, "it took {:?}", signalled.elapsed());
        let words = format!("stopped by {name}; there was nothing to save");
        assert!(run.launcher.output().ends_with(&format!("{words}\n")), "{}", run.launcher.output());
        run.assert_nothing_is_left(&pids);
    }
}

#[test]
fn a_damaged_checkpoint_is_refused_with_the_reason_and_the_one_before_is_used() {
    type Spoil = fn(&mut Vec<u8>);
    let damages: [(&str, Spoil, &str); 3] = [
        ("truncated", |bytes| bytes.truncate(bytes.len() / 2), "is truncated or not a safetensors file"),
        ("bit-flipped", |bytes| *bytes.last_mut().unwrap() ^= 1, "is damaged"),
        ("foreign", |bytes| *bytes = b"\x02\0\0\0\0\0\0\0{}".to_vec(), "is a safetensors file, but not a checkpoint"),
    ];
    let folder = tempfile::tempdir().unwrap();
    let mut undisturbed = Run::start(&folder, 2, &["run.steps=30"]);
    assert_eq!(undisturbed.launcher.wait(), 0, "{}", undisturbed.launcher.output());
    let steps = checkpoints(&undisturbed.out);
    let [before, newest] = steps[..] else { panic!("two checkpoints are kept: {steps:?}") };
    let path = folder.path().join(format!("out/checkpoints/step-{newest:08}.safetensors"));
    let whole = fs::read(&path).unwrap();
    for (damage, spoil, reason) in damages {
        let mut bytes = whole.clone();
        spoil(&mut bytes);
        fs::write(&path, bytes).unwrap();
        let mut run = Run::start(&folder, 2, &["run.steps=30"]);
        assert_eq!(run.launcher.wait(), 0, "{damage}\n{}", run.launcher.output());
        let output = run.launcher.output();
        assert!(output.contains("is not used") && output.contains(reason), "{damage}\n{output}");
        assert!(output.contains(&format!("(step {before})")), "{damage}\n{output}");
        assert_eq!(run.digest(), undisturbed.digest(), "{damage}: the steps done again gave other bits\n{output}");
    }
}

/// A launcher with its ranks. Dropped, the launcher is killed, and its ranks with it.
struct Run {
    launcher: Launched,
    ranks: usize,
    out: PathBuf,
}

impl Run {
    fn start(folder: &TempDir, ranks: usize, settings: &[&str]) -> Run {
        let config = folder.path().join("failure.toml");
        fs::write(&config, configs::endless()).unwrap();
        let out = folder.path().join("out");
        let mut args = vec!["--config", config.to_str().unwrap(), "--out", out.to_str().unwrap()];
        args.extend(settings.iter().flat_map(|setting| ["--set", setting]));
        Run::spawn(ranks, &args, out.clone())
    }

    fn spawn(ranks: usize, args: &[&str], out: PathBuf) -> Run {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
        let launcher = Launched::start(command.args(["-n", &ranks.to_string()]).args(args));
        Run { launcher, ranks, out }
    }

    /// Waits until steps are being done, and a second checkpoint shows that the first is known to be there.
    fn trains(&mut self) {
        until("the second checkpoint", || (checkpoints(&self.out).len() >= 2).then_some(()));
    }

    /// The processes of the ranks, by rank.
    fn pids(&self) -> Vec<i32> {
        let of_rank = |rank: usize| {
            let wanted = format!("LOCKSTEP_RANK={rank}");
            children(self.launcher.pid()).into_iter().find(|pid| {
                let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
            })
        };
        (0..self.ranks).map(|rank| until("a rank to start", || of_rank(rank))).collect()
    }

    /// No process, nothing of ours in /dev/shm, no temporary file.
    fn assert_nothing_is_left(&self, pids: &[i32]) {
        for &pid in pids {
            until("a rank to be gone", || (!alive(pid)).then_some(()));
        }
        let shared = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
        let ours = shared.map(|entry| entry.file_name()).filter(|name| name.to_string_lossy().contains("lockstep"));
        assert_eq!(ours.count(), 0, "something is left in /dev/shm");
        let temporary = files(&self.out).into_iter().filter(|file| file.ends_with(".lockstep-tmp"));
        assert_eq!(temporary.count(), 0, "a temporary file is left");
    }

    /// The digest of the weights in the last line of the summary: `all 30 steps are done; weights a20ffe3a791b94ca`.
    fn digest(&self) -> String {
        let output = self.launcher.output();
        output.split("; weights ").nth(1).expect("a digest").lines().next().unwrap().to_string()
    }
}

/// Steps of the checkpoints of a run, ascending.
fn checkpoints(out: &Path) -> Vec<u64> {
    let names = files(out);
    let steps = names.iter().filter_map(|name| name.strip_prefix("step-")?.strip_suffix(".safetensors")?.parse().ok());
    steps.collect::<BTreeSet<u64>>().into_iter().collect()
}

/// Names of all files of a run.
fn files(out: &Path) -> Vec<String> {
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    [names(out), names(&out.join("checkpoints"))].concat()
}
