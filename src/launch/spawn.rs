//! `trainer -n N`: starts N ranks of this executable on this machine, watches over their ends, says once how the run ended,
//! and may start them again (`restart`).
//!
//! Rank 0 speaks for the run: it keeps the terminal. The lines of the others are marked `[1] `. Ranks find each other
//! through sockets that the launcher makes (`lifeline`), so nothing has a name that could stay behind.

use super::job::{LAUNCH_ID, LAUNCH_RESTARTS};
use super::lifeline::{self, LAUNCHER};
use super::link::{self, Link};
use super::rendezvous::Control;
use super::restart::{Restart, Restarts, Variable};
use super::signals::{self, INTERRUPTED, Interrupts, STOP};
use super::verdict::{Ending, How, verdict};
use super::world::{World, foreign_variables};
use crate::error::{Context, Error, Kind, Result};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::SIGCHLD;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// After a rank failed, the others have this long to notice and to stop by themselves (they need well under a second) ...
const UNTIL_TERM: Duration = Duration::from_secs(5);
/// ... and this long after the SIGTERM that follows.
const UNTIL_KILL: Duration = Duration::from_secs(7);
/// How long the launcher waits for the last lines of ranks that have ended.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Runs this executable, with its own arguments, as `size` ranks. Returns the exit code of the run.
pub fn run(size: usize, restarts: Option<Restarts<'_>>) -> Result<u8> {
    let world = World::from_env(|name| std::env::var(name).ok())?;
    if world.size > 1 {
        return Err(Error::usage(format!(
            "-n {size} starts ranks, but {} has already started {}; leave out -n",
            world.launcher, world.size
        )));
    }
    let program = std::env::current_exe().or_kind(Kind::Internal, "finding this executable")?;
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    launch(&program, &args, size, restarts)
}

/// Runs `program args...` as `size` ranks, and again as `restarts` says. Call it on the main thread: when the thread that
/// started them ends, so do the ranks.
pub fn launch(program: &Path, args: &[OsString], mut size: usize, mut restarts: Option<Restarts<'_>>) -> Result<u8> {
    if size == 0 {
        return Err(Error::usage("-n 0: at least one rank is needed"));
    }
    let events = catch_signals()?;
    let goes_on = restarts
        .as_ref()
        .map_or(String::new(), |restarts| format!("; {} goes on with what was saved", restarts.again()));
    loop {
        let variables = restarts.as_ref().map_or(Vec::new(), Restarts::variables);
        let Outcome { endings, code, asked, interrupted } = run_once(program, args, size, &variables, &events)?;
        if interrupted {
            eprintln!("killed by a second Ctrl-C{goes_on}");
            return Ok(INTERRUPTED);
        }
        let next = restarts.as_mut().filter(|_| !asked).map_or(Ok(None), |restarts| restarts.next(&endings, code));
        match next {
            Ok(None) => return Ok(code),
            Err(why) => {
                eprintln!("{why}");
                return Ok(code);
            }
            Ok(Some(Restart { ranks, pause, text })) => {
                eprintln!("{text}");
                if let Some(signal) = signal_within(&events, pause)? {
                    eprintln!("stopped by {} before it{goes_on}", signals::name(signal));
                    return Ok(Kind::Stopped as u8);
                }
                size = ranks;
            }
        }
    }
}

/// How the ranks of one start ended.
struct Outcome {
    endings: Vec<Ending>,
    code: u8,
    /// A signal to the launcher has asked them to.
    asked: bool,
    /// A second Ctrl-C has killed them.
    interrupted: bool,
}

/// Runs the ranks to their end, and says how it was.
fn run_once(
    program: &Path,
    args: &[OsString],
    size: usize,
    variables: &[Variable],
    events: &Receiver<i32>,
) -> Result<Outcome> {
    let (printing, all_printed) = bounded(0);
    let mut ranks = start(program, args, size, variables, &printing)?;
    drop(printing);
    let interrupted = supervise(&mut ranks, events)?;
    let _ = all_printed.recv_timeout(LAST_LINES);

    let asked = ranks.iter().any(|rank| !rank.forwarded.is_empty());
    ranks.sort_by_key(|rank| rank.ended.map(|(_, when)| when));
    let endings: Vec<Ending> = ranks.iter().filter_map(Rank::ending).collect();
    let (code, text) = verdict(&endings);
    if let Some(text) = text.filter(|_| !interrupted) {
        eprintln!("{text}");
    }
    Ok(Outcome { endings, code, asked, interrupted })
}

/// The first signal to stop that comes within this time.
fn signal_within(events: &Receiver<i32>, time: Duration) -> Result<Option<i32>> {
    let deadline = Instant::now() + time;
    loop {
        match events.recv_deadline(deadline) {
            Ok(SIGCHLD) => {}
            Ok(signal) => return Ok(Some(signal)),
            Err(RecvTimeoutError::Timeout) => return Ok(None),
            Err(RecvTimeoutError::Disconnected) => return Err(Error::internal("the signal thread ended")),
        }
    }
}

/// Signals that concern the launcher, from a thread that sleeps until one arrives.
fn catch_signals() -> Result<Receiver<i32>> {
    let caught = STOP.into_iter().chain([SIGCHLD]);
    let mut incoming = signal_hook::iterator::Signals::new(caught).or_kind(Kind::Internal, "catching signals")?;
    let (sender, events) = unbounded();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || incoming.forever().try_for_each(|signal| sender.send(signal)))
        .or_kind(Kind::Internal, "starting the signal thread")?;
    Ok(events)
}

/// A child process. Dropped alive, it is killed.
struct Rank {
    rank: usize,
    child: Child,
    lifeline: Link,
    ended: Option<(ExitStatus, Instant)>,
    /// Signals that were passed on to it.
    forwarded: Vec<i32>,
    killed_by_us: bool,
}

fn start(
    program: &Path,
    args: &[OsString],
    size: usize,
    variables: &[Variable],
    printing: &Sender<()>,
) -> Result<Vec<Rank>> {
    let stars = Control::pairs(size)?.into_iter().zip(Control::pairs(size)?);
    let mut ranks = Vec::with_capacity(size);
    for (rank, (first, second)) in stars.enumerate() {
        let mut command = Command::new(program);
        command.args(args).env(LAUNCHER, std::process::id().to_string());
        for (name, value) in [("RANK", rank), ("SIZE", size), ("LOCAL_RANK", rank), ("LOCAL_SIZE", size)] {
            command.env(format!("LOCKSTEP_{name}"), value.to_string());
        }
        foreign_variables().for_each(|name| {
            command.env_remove(name);
        });
        command.env_remove(LAUNCH_ID).env_remove(LAUNCH_RESTARTS).envs(variables.iter().cloned());
        let (ours, theirs) = link::pair()?;
        command.stdin(theirs);
        if rank > 0 {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        let mut child = command.spawn().or_kind(Kind::Internal, format!("starting rank {rank} of {size}"))?;
        // Closes the launcher's copy of the rank's end: the rank's death must be an end of file.
        drop(command);
        print_lines(rank, child.stdout.take(), std::io::stdout(), printing)?;
        print_lines(rank, child.stderr.take(), std::io::stderr(), printing)?;
        let rank = Rank {
            rank,
            child,
            lifeline: Link::new(rank, ours),
            ended: None,
            forwarded: Vec::new(),
            killed_by_us: false,
        };
        lifeline::send_stars(&rank.lifeline, [first, second])?;
        ranks.push(rank);
    }
    Ok(ranks)
}

/// Copies lines on a thread of their own, each behind its rank, until the rank closes the pipe.
fn print_lines(
    rank: usize,
    from: Option<impl Read + Send + 'static>,
    mut to: impl Write + Send + 'static,
    printing: &Sender<()>,
) -> Result<()> {
    let Some(from) = from else { return Ok(()) };
    let until_done = printing.clone();
    let copy = move || {
        let _until_done = until_done;
        let mut from = BufReader::new(from);
        let mut line = format!("[{rank}] ").into_bytes();
        let prefix = line.len();
        while from.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            if line.last() != Some(&b'\n') {
                line.push(b'\n');
            }
            // A closed terminal is no reason to let the rank block on a full pipe.
            let _ = to.write_all(&line).and_then(|()| to.flush());
            line.truncate(prefix);
        }
    };
    let thread = std::thread::Builder::new().name(format!("lines of {rank}"));
    thread.spawn(copy).or_kind(Kind::Internal, "starting a thread for a rank's output")?;
    Ok(())
}

/// Waits until every rank has ended; forwards signals meanwhile, and ends the ranks that a failure leaves hanging.
/// Returns whether a second Ctrl-C ended them.
fn supervise(ranks: &mut [Rank], events: &Receiver<i32>) -> Result<bool> {
    let mut interrupts = Interrupts::default();
    let mut interrupted = false;
    let mut escalation = [(UNTIL_TERM, Signal::TERM), (UNTIL_KILL, Signal::KILL)].into_iter().peekable();
    loop {
        ranks.iter_mut().try_for_each(Rank::reap)?;
        if ranks.iter().all(|rank| rank.ended.is_some()) {
            return Ok(interrupted);
        }
        let failed = ranks.iter().filter_map(Rank::failed).min();
        let due = failed.zip(escalation.peek()).map(|(failed, (after, _))| failed + *after);
        let wait = due.map_or(Duration::from_secs(3600), |due| due.saturating_duration_since(Instant::now()));
        match events.recv_timeout(wait) {
            Ok(SIGCHLD) => {}
            Ok(signal) if interrupts.repeated(signal, Instant::now()) => {
                interrupted = true;
                ranks.iter_mut().for_each(|rank| rank.end(Signal::KILL));
            }
            Ok(signal) => ranks.iter_mut().for_each(|rank| rank.forward(signal)),
            Err(RecvTimeoutError::Timeout) if due.is_some_and(|due| due <= Instant::now()) => {
                if let Some((_, signal)) = escalation.next() {
                    ranks.iter_mut().for_each(|rank| rank.end(signal));
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(Error::internal("the signal thread ended")),
        }
    }
}

impl Rank {
    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn reap(&mut self) -> Result<()> {
        if self.ended.is_none() {
            let status = self.child.try_wait().or_kind(Kind::Internal, format!("waiting for rank {}", self.rank))?;
            self.ended = status.map(|status| (status, Instant::now()));
        }
        Ok(())
    }

    /// When this rank failed, if it did: its peers cannot go on.
    fn failed(&self) -> Option<Instant> {
        let (status, when) = self.ended?;
        (!matches!(status.code(), Some(0) | Some(signals::STOPPED))).then_some(when)
    }

    fn forward(&mut self, signal: i32) {
        self.forwarded.push(signal);
        self.send(Signal::from_named_raw(signal));
    }

    fn send(&self, signal: Option<Signal>) {
        let pid = Pid::from_raw(self.pid() as i32);
        // A child that is not reaped keeps its pid, so the signal cannot hit a stranger.
        if let (None, Some(pid), Some(signal)) = (self.ended, pid, signal) {
            let _ = kill_process(pid, signal);
        }
    }

    /// A stopped process takes a SIGTERM only when it is woken.
    fn end(&mut self, signal: Signal) {
        self.killed_by_us |= self.ended.is_none();
        self.send(Some(signal));
        self.send(Some(Signal::CONT));
    }

    fn ending(&self) -> Option<Ending> {
        let (status, _) = self.ended?;
        let word = lifeline::last_word_of(&self.lifeline);
        let how = match status.signal() {
            Some(signal) if self.forwarded.contains(&signal) => How::Asked(signal),
            Some(signal) => How::Signal(signal),
            None => How::Exit(status.code().unwrap_or(1)),
        };
        Some(Ending {
            rank: self.rank,
            pid: self.pid(),
            how,
            killed_by_us: self.killed_by_us,
            lacking: word.as_ref().is_some_and(Error::is_lacking),
            report: word.map(|error| error.to_string()),
        })
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
