//! What a whole run does when something fails: ranks are killed or stopped in several phases, signals come, checkpoints
//! are damaged. Every wait has a deadline, and only processes that a test started are signalled.

use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Far beyond what any part of a test takes on a slow machine.
const WATCHDOG: Duration = Duration::from_secs(120);
/// Survivors end within one second; a crowded machine gets this long.
const PROMPT: Duration = Duration::from_millis(1500);

const CONFIG: &str = r#"
[run]
name = "failure"
steps = 1000000
[data]
format = "shapes"
train = 960
test = 64
[batch]
global = 48
[model]
input = [32, 32, 3]
[[model.layers]]
type = "conv2d"
filters = 4
kernel = 3
stride = 4
activation = "relu"
[[model.layers]]
type = "global_avg_pool"
[[model.layers]]
type = "linear"
units = 10
[loss]
type = "softmax_cross_entropy"
[optimizer]
type = "sgd"
lr = 0.01
[checkpoint]
every_steps = 10
[eval]
every_epochs = 50
[log]
every_steps = 5
"#;

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
            assert!(took < PROMPT, "{case}: process {pid} took {took:?}\n{}", run.output());
        }
        let (code, output) = (run.wait(), run.output());
        assert_eq!(code, 4, "{case}\n{output}");
        let pid = pids[victim];
        assert!(
            output.contains(&format!("rank {victim} (pid {pid}) was killed by signal 9 (SIGKILL)")),
            "{case}\n{output}"
        );
        assert!(output.contains(&format!("rank {victim} (pid {pid} on host ")), "{case}\n{output}");
        assert!(output.contains("was lost") && output.contains("of step "), "{case}\n{output}");
        let hint = output.contains("Last checkpoint: ") && output.contains("run the same command again");
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
        assert_eq!(run.wait(), 4, "{}", run.output());
        run.assert_nothing_is_left(&pids);
        if newest > 0 {
            assert!(run.output().contains("going on from"), "{}", run.output());
        }
        assert!(!run.output().contains("is not used"), "no checkpoint is half a checkpoint\n{}", run.output());
        newest = *checkpoints(&out).last().unwrap();
    }
    let mut run = Run::start(&folder, 2, SAVING);
    until("a newer checkpoint", || (checkpoints(&out).last()? > &newest).then_some(()));
    send(run.launcher.id() as i32, Signal::TERM);
    assert_eq!(run.wait(), 75, "{}", run.output());
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
        run.expect(|output| output.contains("has not been heard of for") && output.contains(&name));
        assert!(stopped.elapsed() < Duration::from_secs(6), "the warning came after {:?}", stopped.elapsed());
        if wakes {
            thread::sleep((TIMEOUT + Duration::from_millis(500)).saturating_sub(stopped.elapsed()));
            send(pids[victim], Signal::CONT);
        }
        assert_eq!(run.wait(), 4, "{}", run.output());
        let (took, output) = (stopped.elapsed(), run.output());
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
    run.launcher.kill().unwrap();
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
        send(run.launcher.id() as i32, signal);
        assert_eq!(run.wait(), 75, "{}", run.output());
        let output = run.output();
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
        assert_eq!(undisturbed.wait(), 0, "{}", undisturbed.output());
        for &ranks in resumed_on {
            let folder = tempfile::tempdir().unwrap();
            let mut run = Run::start(&folder, 2, &settings);
            run.trains();
            send(run.launcher.id() as i32, Signal::TERM);
            assert_eq!(run.wait(), 75, "{}", run.output());
            let mut again = Run::start(&folder, ranks, &settings);
            assert_eq!(again.wait(), 0, "{}", again.output());
            assert!(again.output().contains("going on from"), "{}", again.output());
            assert_eq!(again.digest(), undisturbed.digest(), "resumed on {ranks}: {settings:?}");
        }
    }
}

#[test]
fn a_signal_ends_at_once_what_has_nothing_to_save() {
    for (signal, name) in [(Signal::TERM, "SIGTERM"), (Signal::HUP, "SIGHUP"), (Signal::INT, "SIGINT")] {
        let mut run = Run::spawn(2, &["bench-comm", "--json"], PathBuf::new());
        let pids = run.pids();
        run.expect(|output| output.contains("busbw_gb_s"));
        let signalled = Instant::now();
        send(run.launcher.id() as i32, signal);
        assert_eq!(run.wait(), 75, "{}", run.output());
        assert!(signalled.elapsed() < PROMPT, "it took {:?}", signalled.elapsed());
        let words = format!("stopped by {name}; there was nothing to save");
        assert!(run.output().ends_with(&format!("{words}\n")), "{}", run.output());
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
    assert_eq!(undisturbed.wait(), 0, "{}", undisturbed.output());
    let steps = checkpoints(&undisturbed.out);
    let [before, newest] = steps[..] else { panic!("two checkpoints are kept: {steps:?}") };
    let path = folder.path().join(format!("out/checkpoints/step-{newest:08}.safetensors"));
    let whole = fs::read(&path).unwrap();
    for (damage, spoil, reason) in damages {
        let mut bytes = whole.clone();
        spoil(&mut bytes);
        fs::write(&path, bytes).unwrap();
        let mut run = Run::start(&folder, 2, &["run.steps=30"]);
        assert_eq!(run.wait(), 0, "{damage}\n{}", run.output());
        let output = run.output();
        assert!(output.contains("is not used") && output.contains(reason), "{damage}\n{output}");
        assert!(output.contains(&format!("(step {before})")), "{damage}\n{output}");
        assert_eq!(run.digest(), undisturbed.digest(), "{damage}: the steps done again gave other bits\n{output}");
    }
}

/// A launcher with its ranks. Dropped, the launcher is killed, and its ranks with it.
struct Run {
    launcher: Child,
    ranks: usize,
    out: PathBuf,
    output: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

impl Run {
    fn start(folder: &TempDir, ranks: usize, settings: &[&str]) -> Run {
        let config = folder.path().join("failure.toml");
        fs::write(&config, CONFIG).unwrap();
        let out = folder.path().join("out");
        let mut args = vec!["--config", config.to_str().unwrap(), "--out", out.to_str().unwrap()];
        args.extend(settings.iter().flat_map(|setting| ["--set", setting]));
        Run::spawn(ranks, &args, out.clone())
    }

    fn spawn(ranks: usize, args: &[&str], out: PathBuf) -> Run {
        let mut launcher = Command::new(env!("CARGO_BIN_EXE_trainer"))
            .args(["-n", &ranks.to_string()])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let output = Arc::new(Mutex::new(String::new()));
        let readers = vec![
            read_lines(launcher.stdout.take().unwrap(), &output),
            read_lines(launcher.stderr.take().unwrap(), &output),
        ];
        Run { launcher, ranks, out, output, readers }
    }

    /// Waits until steps are being done, and a second checkpoint shows that the first is known to be there.
    fn trains(&mut self) {
        until("the second checkpoint", || (checkpoints(&self.out).len() >= 2).then_some(()));
    }

    /// The processes of the ranks, by rank.
    fn pids(&self) -> Vec<i32> {
        let of_rank = |rank: usize| {
            let wanted = format!("LOCKSTEP_RANK={rank}");
            children(self.launcher.id()).into_iter().find(|pid| {
                let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
            })
        };
        (0..self.ranks).map(|rank| until("a rank to start", || of_rank(rank))).collect()
    }

    fn expect(&self, found: impl Fn(&str) -> bool) {
        until("a line of output", || found(&self.output.lock().unwrap()).then_some(()));
    }

    /// The launcher's exit code, with all output read.
    fn wait(&mut self) -> i32 {
        let status = until("the launcher to end", || self.launcher.try_wait().unwrap());
        self.readers.drain(..).for_each(|reader| reader.join().unwrap());
        status.code().unwrap_or(-1)
    }

    fn output(&self) -> String {
        self.output.lock().unwrap().clone()
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
        let output = self.output();
        output.split("; weights ").nth(1).expect("a digest").lines().next().unwrap().to_string()
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
        if std::thread::panicking() {
            eprintln!("the program said:\n{}", self.output());
        }
    }
}

fn read_lines(from: impl Read + Send + 'static, output: &Arc<Mutex<String>>) -> JoinHandle<()> {
    let output = output.clone();
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(|line| line.ok()) {
            *output.lock().unwrap() += &format!("{line}\n");
        }
    })
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

fn send(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

fn children(parent: u32) -> Vec<i32> {
    let processes =
        fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    processes.filter(|pid| stat(*pid).is_some_and(|(_, other)| other == parent)).collect()
}

/// Whether the process runs; one that is dead and not reaped does not.
fn alive(pid: i32) -> bool {
    stat(pid).is_some_and(|(state, _)| !matches!(state.as_str(), "Z" | "X"))
}

/// State and parent of a process.
fn stat(pid: i32) -> Option<(String, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit(')').next()?.split_whitespace();
    Some((fields.next()?.to_string(), fields.next()?.parse().ok()?))
}

/// Polls until there is something, at most until the watchdog bites.
#[track_caller]
fn until<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = poll() {
            return found;
        }
        assert!(start.elapsed() < WATCHDOG, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(10));
    }
}
