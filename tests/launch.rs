//! Faults against the launcher and the watch: ranks that are killed, stopped, late or at odds, and a launcher that dies.
//!
//! The program under test is this test binary itself: `program` is the launcher, and started by the launcher a rank,
//! which loops over barriers. Every wait here has a deadline, and only processes that a test started are signalled.

#[allow(dead_code)]
mod common;

use common::{Launched, WATCHDOG, alive, send, until};
use lockstep::config::raw::Parallel;
use lockstep::error::{Error, Result};
use lockstep::launch::link::Link;
use lockstep::launch::signals::{self, Signals};
use lockstep::launch::watch::{Health, Phase, Watch};
use lockstep::launch::world::{Launcher, World};
use lockstep::launch::{report, spawn};
use lockstep::train;
use rustix::process::Signal;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a rank that hangs does not see the end of.
const FOREVER: Duration = Duration::from_secs(600);

#[test]
fn a_killed_rank_stops_the_others_at_once_and_is_named() {
    for (ranks, victim, after_ms) in [(2, 1, 300), (2, 0, 450), (4, 2, 610), (4, 0, 290)] {
        let mut run = Run::start("loop", ranks, 300.0);
        run.pids();
        std::thread::sleep(Duration::from_millis(after_ms));
        let killed = Instant::now();
        let pid = run.signal_rank(victim, Signal::KILL);
        let code = run.launcher.wait();
        let took = killed.elapsed();
        let output = run.launcher.output();
        assert_eq!(code, 4, "{output}");
        assert!(took < Duration::from_secs(3), "the others took {took:?}\n{output}");
        assert!(output.contains(&format!("rank {victim} (pid {pid}) was killed by signal 9 (SIGKILL)")), "{output}");
        assert!(output.contains(&format!("rank {victim} (pid {pid} on host ")), "{output}");
        assert!(output.contains("was lost") && output.contains(" step ") && output.contains("all-reduce"), "{output}");
        // Only rank 0 knows of it at once.
        assert!(victim == 0 || output.contains("Last checkpoint: step-0"), "{output}");
        assert!(!output.contains("did not stop by itself"), "{output}");
        run.assert_nothing_is_left();
    }
}

#[test]
fn a_rank_killed_while_it_starts_is_named_too() {
    let mut run = Run::start("slow_start", 3, 300.0);
    let pid = run.signal_rank(1, Signal::KILL);
    assert_eq!(run.launcher.wait(), 4);
    let output = run.launcher.output();
    assert!(output.contains(&format!("rank 1 (pid {pid}) was killed by signal 9 (SIGKILL)")), "{output}");
    run.assert_nothing_is_left();
}

#[test]
fn survivors_end_even_while_their_main_thread_computes() {
    let mut run = Run::start("busy", 3, 300.0);
    run.pids();
    std::thread::sleep(Duration::from_millis(500));
    let killed = Instant::now();
    let pid = run.signal_rank(2, Signal::KILL);
    assert_eq!(run.launcher.wait(), 4);
    let (took, output) = (killed.elapsed(), run.launcher.output());
    assert!(took < Duration::from_secs(4), "the others took {took:?}\n{output}");
    assert!(output.contains(&format!("rank 2 (pid {pid} on host ")), "{output}");
    assert!(output.contains("rank 0 was in forward of step 7"), "{output}");
    assert!(!output.contains("did not stop by itself"), "{output}");
}

#[test]
fn a_stopped_rank_is_named_in_one_warning_and_ends_the_run_at_the_timeout() {
    let stop = |victim: usize| {
        let mut run = Run::start("loop", 3, 6.0);
        run.pids();
        std::thread::sleep(Duration::from_millis(300));
        let pid = run.signal_rank(victim, Signal::STOP);
        let name = format!("rank {victim} (pid {pid} on host ");
        let stopped = Instant::now();
        run.launcher.expect(|output| output.contains("has not been heard of for") && output.contains(&name));
        let took = stopped.elapsed();
        assert!(took < Duration::from_secs(8), "the warning came after {took:?}");
        assert_eq!(run.launcher.wait(), 4, "{}", run.launcher.output());
        let output = run.launcher.output();
        assert_eq!(output.matches("has not been heard of").count(), 1, "{output}");
        assert!(output.contains(" in a barrier, in all-reduce of step"), "{output}");
        assert!(output.contains("[parallel] timeout"), "{output}");
        let error = output.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
        assert!(error.contains(" has spent 6.") && error.contains(&name), "{output}");
        run.assert_nothing_is_left();
    };
    std::thread::scope(|scope| {
        scope.spawn(|| stop(1));
        scope.spawn(|| stop(0));
    });
}

#[test]
fn a_rank_that_is_continued_goes_on_and_a_signal_stops_all() {
    let mut run = Run::start("loop", 3, 300.0);
    run.pids();
    let pid = run.signal_rank(2, Signal::STOP);
    run.launcher.expect(|output| output.contains("has not been heard of for"));
    run.signal_rank(2, Signal::CONT);
    run.launcher
        .expect(|output| output.contains(&format!("rank 2 (pid {pid} on host ")) && output.contains("goes on after"));
    run.signal_launcher(Signal::TERM);
    assert_eq!(run.launcher.wait(), 75);
    let output = run.launcher.output();
    assert_eq!(output.matches("stopped by SIGTERM").count(), 1, "said once for all ranks\n{output}");
    run.assert_nothing_is_left();
}

#[test]
fn a_late_rank_is_a_warning_and_not_an_error() {
    let mut run = Run::start("late", 2, 300.0);
    assert_eq!(run.launcher.wait(), 0);
    let output = run.launcher.output();
    let warnings = output.matches("is alive but keeps the others waiting").count();
    assert_eq!(warnings, 1, "{output}");
    assert!(output.contains("it is in data of step 10, and rank 0 has waited for"), "{output}");
}

#[test]
fn an_error_of_one_rank_is_what_the_run_reports() {
    let mut run = Run::start("fail", 4, 300.0);
    assert_eq!(run.launcher.wait(), 3);
    let output = run.launcher.output();
    assert!(output.contains("error: rank 3: train.idx: image 5 is cut off"), "{output}");
    assert!(!output.contains("was lost"), "{output}");
    run.assert_nothing_is_left();
}

#[test]
fn an_error_of_all_ranks_is_said_once() {
    let mut run = Run::start("usage", 4, 300.0);
    assert_eq!(run.launcher.wait(), 2);
    let output = run.launcher.output();
    assert_eq!(output.matches("unknown key `lr`").count(), 1, "{output}");
    assert!(output.contains("\n[1] a line of rank 1\n"), "{output}");
    assert!(output.contains("\na line of rank 0\n"), "{output}");
}

#[test]
fn a_rank_that_ends_early_does_not_leave_the_others_waiting() {
    for mode in ["early", "early_alive"] {
        let mut run = Run::start(mode, 2, 300.0);
        assert_eq!(run.launcher.wait(), 4);
        let output = run.launcher.output();
        assert!(output.contains("has ended its run while others still wait for it"), "{output}");
    }
}

#[test]
fn ranks_die_with_their_launcher() {
    let run = Run::start("busy", 3, 300.0);
    run.pids();
    let killed = Instant::now();
    run.signal_launcher(Signal::KILL);
    run.assert_nothing_is_left();
    assert!(killed.elapsed() < WATCHDOG / 2, "they died of something else");
}

#[test]
fn the_first_ctrl_c_saves_and_the_second_kills() {
    let mut run = Run::start("stubborn", 2, 300.0);
    run.pids();
    run.signal_launcher(Signal::INT);
    run.launcher.expect(|output| output.contains("was asked by SIGINT"));
    std::thread::sleep(Duration::from_millis(350));
    run.signal_launcher(Signal::INT);
    assert_eq!(run.launcher.wait(), 130);
    run.assert_nothing_is_left();
}

#[test]
fn a_signal_before_the_first_step_stops_too() {
    let mut run = Run::start("slow_start", 2, 300.0);
    run.pid(1);
    run.signal_launcher(Signal::TERM);
    assert_eq!(run.launcher.wait(), 75, "{}", run.launcher.output());
    assert!(
        run.launcher.output().contains("stopped by SIGTERM; there was nothing to save"),
        "{}",
        run.launcher.output()
    );
}

#[test]
fn a_rank_that_says_that_it_is_ending_may_finish_its_last_words() {
    let mut run = Run::start("last_words", 2, 300.0);
    assert_eq!(run.launcher.wait(), 3, "{}", run.launcher.output());
    assert!(run.launcher.output().contains("the summary of rank 0"), "{}", run.launcher.output());
}

#[test]
fn the_timeout_of_the_configuration_counts_while_ranks_set_up_too() {
    let mut run = Run::start("slow_set_up", 2, 2.0);
    let start = Instant::now();
    assert_eq!(run.launcher.wait(), 4, "{}", run.launcher.output());
    assert!(run.launcher.output().contains("rank 1 did not answer in time"), "{}", run.launcher.output());
    assert!(start.elapsed() < Duration::from_secs(20), "it was some other time-out: {:?}", start.elapsed());
}

#[test]
fn ranks_of_a_foreign_launcher_meet_at_a_socket_named_after_their_parent() {
    let started: Vec<Run> = (0..2)
        .map(|rank| {
            Run::with(
                "late",
                0,
                300.0,
                &[("PMI_RANK", rank), ("PMI_SIZE", 2), ("MPI_LOCALRANKID", rank), ("MPI_LOCALNRANKS", 2)],
            )
        })
        .collect();
    for mut run in started {
        assert_eq!(run.launcher.wait(), 0, "{}", run.launcher.output());
    }
}

/// The program under test; a test of its own only in name.
#[test]
fn program() {
    let Ok(mode) = std::env::var("LAUNCH_TEST_MODE") else { return };
    let setting = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    let world = World::detect().expect("a world");
    let ranks = setting("LAUNCH_TEST_RANKS") as usize;
    if world.launcher == Launcher::None {
        let args: Vec<OsString> = std::env::args_os().skip(1).collect();
        let code = spawn::launch(&std::env::current_exe().unwrap(), &args, ranks, None).expect("a launch");
        std::process::exit(code.into());
    }
    tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).init();
    let timeout = setting("LAUNCH_TEST_TIMEOUT");
    let result = match mode.as_str() {
        "slow_set_up" => slow_set_up(timeout),
        mode => rank(&world, mode, Health::new(Duration::from_secs_f64(timeout))),
    };
    if let Err(error) = &result {
        report(error);
    }
    std::process::exit(result.map_or_else(|error| error.exit_code().into(), |()| 0));
}

/// Joins as training does; rank 1 comes late to the first memory that all share.
fn slow_set_up(timeout: f64) -> Result<()> {
    let parallel = Parallel { timeout, ..Parallel::default() };
    train::join(&parallel, 0, |rank, mut comm| {
        if rank.world.rank == 1 {
            std::thread::sleep(FOREVER);
        }
        comm.allocate(64).map(drop)
    })
}

/// Meets, is watched, works, says good-bye.
fn rank(world: &World, mode: &str, health: Arc<Health>) -> Result<()> {
    eprintln!("a line of rank {}", world.rank);
    if mode == "usage" {
        return Err(Error::usage("unknown key `lr`"));
    }
    if mode == "slow_start" && world.rank == 1 {
        tell_pid(world.rank);
        std::thread::sleep(FOREVER);
    }
    let (data, watch) = world.connect(&Parallel::default())?;
    let watch = Watch::start(watch, health.clone())?;
    if world.rank == 0 {
        health.saved("step-0");
    }
    let links = data.into_links();
    let result = work(world, mode, &health, &links);
    watch.finish(&result);
    if mode == "early_alive" && world.rank == 1 {
        std::thread::sleep(FOREVER);
    }
    result
}

/// Lets the test know that this rank is where it can be disturbed.
fn tell_pid(rank: usize) {
    let folder = PathBuf::from(std::env::var_os("LAUNCH_TEST_FOLDER").expect("a folder"));
    let file = folder.join(format!("{rank}.tmp"));
    std::fs::write(&file, std::process::id().to_string()).expect("writing the pid");
    std::fs::rename(&file, folder.join(rank.to_string())).expect("naming the pid's file");
}

fn work(world: &World, mode: &str, health: &Health, links: &[Link]) -> Result<()> {
    let signals = Signals::install()?;
    tell_pid(world.rank);
    for step in 1.. {
        health.set(step, Phase::Data);
        match (mode, step) {
            ("late", 10) if world.rank == 1 => std::thread::sleep(Duration::from_millis(5500)),
            ("late", 20) => return Ok(()),
            ("early" | "early_alive", 10) if world.rank == 1 => return Ok(()),
            ("last_words", 10) => return last_words(world.rank, health),
            ("fail", 10) if world.rank == 3 => return Err(Error::data("train.idx: image 5 is cut off")),
            ("busy", 7) => {
                health.set(step, Phase::Forward);
                let start = Instant::now();
                while start.elapsed() < FOREVER {
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
            _ => {}
        }
        let request = signals.requested().map(signals::name);
        if let (Some(name), "stubborn") = (request, mode) {
            eprintln!("rank {} was asked by {name}", world.rank);
            std::thread::sleep(FOREVER);
        }
        health.set(step, Phase::AllReduce);
        let stop = any(world.rank, health, links, request.is_some())?;
        if stop {
            return Err(Error::new(lockstep::error::Kind::Stopped, "stopped by SIGTERM"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    unreachable!("steps do not run out")
}

/// All ranks fail alike, and rank 0 has to write about it while it already hears of rank 1's end.
fn last_words(rank: usize, health: &Health) -> Result<()> {
    if rank == 0 {
        health.ending();
        std::thread::sleep(Duration::from_millis(1500));
        eprintln!("the summary of rank 0");
    }
    Err(Error::data("the loss is NaN"))
}

/// A barrier that tells everyone whether anyone wants to stop: a byte to rank 0 and one back.
fn any(rank: usize, health: &Health, links: &[Link], mine: bool) -> Result<bool> {
    let receive = |link: &Link| -> Result<bool> {
        let mut byte = [0];
        let what = format!("waiting for rank {} in a barrier", link.peer);
        health.wait(&what, |slice| match link.read(&mut byte, Instant::now() + slice) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::TIMEDOUT) => Ok(false),
            Err(error) => Err(Error::peer_lost(format!("the link to rank {} broke: {error}", link.peer))),
        })?;
        Ok(byte[0] == 1)
    };
    let send = |link: &Link, value: bool| {
        // A link that broke is noticed by the next receive.
        let _ = link.write(&[value.into()], Instant::now() + WATCHDOG);
    };
    if rank != 0 {
        send(&links[0], mine);
        return receive(&links[0]);
    }
    let mut all = mine;
    for link in links {
        all |= receive(link)?;
    }
    links.iter().for_each(|link| send(link, all));
    Ok(all)
}

/// A launcher with its ranks, as the test sees it. Dropped, the launcher is killed, and its ranks with it.
struct Run {
    launcher: Launched,
    ranks: usize,
    folder: tempfile::TempDir,
}

impl Run {
    fn start(mode: &str, ranks: usize, timeout: f64) -> Run {
        Run::with(mode, ranks, timeout, &[])
    }

    fn with(mode: &str, ranks: usize, timeout: f64, variables: &[(&str, usize)]) -> Run {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["program", "--exact", "--nocapture"])
            .env("LAUNCH_TEST_MODE", mode)
            .env("LAUNCH_TEST_RANKS", ranks.to_string())
            .env("LAUNCH_TEST_TIMEOUT", timeout.to_string())
            .env("LAUNCH_TEST_FOLDER", folder.path())
            .envs(variables.iter().map(|(name, value)| (name, value.to_string())));
        Run { launcher: Launched::start(&mut command), ranks, folder }
    }

    /// The ranks' processes, once all have started.
    fn pids(&self) -> Vec<i32> {
        (0..self.ranks).map(|rank| self.pid(rank)).collect()
    }

    fn pid(&self, rank: usize) -> i32 {
        let file = self.folder.path().join(rank.to_string());
        until("a rank to start", || std::fs::read_to_string(&file).ok()).parse().unwrap()
    }

    fn signal_rank(&self, rank: usize, signal: Signal) -> i32 {
        let pid = self.pid(rank);
        send(pid, signal);
        pid
    }

    fn signal_launcher(&self, signal: Signal) {
        send(self.launcher.pid(), signal);
    }

    fn assert_nothing_is_left(&self) {
        for file in std::fs::read_dir(self.folder.path()).unwrap() {
            let pid = std::fs::read_to_string(file.unwrap().path()).unwrap().parse().unwrap();
            until("a rank to be gone", || (!alive(pid)).then_some(()));
        }
    }
}
