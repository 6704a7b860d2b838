//! Every wait in the program goes through `Health::wait`: it ends when the awaited thing happens, when a peer is lost, or
//! when the time-out of `[parallel]` has passed; and the others are told meanwhile who waits for what.

use super::reach::Line;
use super::table::Table;
use crate::error::{Error, Kind, Result};
use socket2::Socket;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a rank is doing; shown when it, or a peer, is in trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    Start,
    Data,
    Forward,
    Backward,
    AllReduce,
    Update,
    Evaluate,
    Checkpoint,
    Finish,
}

/// What a rank says of itself, five times a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    pub step: u64,
    pub phase: Phase,
    /// How long it has been waiting for other ranks; zero: it is not.
    pub waited: Duration,
    /// How long it has waited for other ranks in all its steps together.
    pub waiting: Duration,
}

/// This rank's state as its peers see it, and what it knows of them. Shared by the training loop (which sets the phase),
/// the communicator (which waits) and the watch thread (which exchanges heartbeats).
pub struct Health {
    step: AtomicU64,
    phase: AtomicU8,
    /// In all steps together, in microseconds.
    waited_us: AtomicU64,
    waiting: Mutex<Waiting>,
    failed: AtomicBool,
    failure: Mutex<Option<Error>>,
    ending: AtomicBool,
    cut_off: AtomicBool,
    timeout: Duration,
    peers: Mutex<Option<Table>>,
    checkpoint: Mutex<Option<String>>,
    /// The checkpoint is news to the other ranks.
    untold: AtomicBool,
    /// Transports' connections that the watch looks after.
    lines: Mutex<Vec<Line>>,
}

/// The wait that has lasted longest, of all threads that wait.
struct Waiting {
    threads: usize,
    what: String,
    waited: Duration,
}

/// A poll blocks no longer than this, so that a failure is noticed.
const SLICE: Duration = Duration::from_millis(20);
/// More than this between two polls means that this process itself did not run (Ctrl-Z, a sleeping laptop, a crowded
/// machine): not the peers' fault, so it does not count.
const LONGEST_SLICE: Duration = Duration::from_secs(1);
/// Looks at a GPU before the pauses between them begin, and these: short against what a step takes, long against a look.
const LOOKS: u32 = 100;
const PAUSE: Duration = Duration::from_micros(20);
/// A broken connection is often seen before the watch knows whose death it was; so long its word is waited for. When rank 0's
/// host is cut off, nobody tells the others, and each finds out by itself: up to half a second after the first, who leaves.
const ACCOUNT: Duration = Duration::from_secs(1);

impl Health {
    /// `timeout`: how long a rank waits for others, `[parallel] timeout`.
    pub fn new(timeout: Duration) -> Arc<Health> {
        Arc::new(Health {
            step: AtomicU64::new(0),
            phase: AtomicU8::new(Phase::Start as u8),
            waited_us: AtomicU64::new(0),
            waiting: Mutex::new(Waiting { threads: 0, what: String::with_capacity(64), waited: Duration::ZERO }),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            ending: AtomicBool::new(false),
            cut_off: AtomicBool::new(false),
            timeout,
            peers: Mutex::new(None),
            checkpoint: Mutex::new(None),
            untold: AtomicBool::new(false),
            lines: Mutex::new(Vec::new()),
        })
    }

    /// Called by the training loop; cheap.
    pub fn set(&self, step: u64, phase: Phase) {
        self.step.store(step, Relaxed);
        self.phase.store(phase as u8, Relaxed);
    }

    /// How long the training loop has waited for other ranks since it began, by which rank 0 finds the slow ones.
    pub fn set_waiting(&self, total: Duration) {
        self.waited_us.store(total.as_micros() as u64, Relaxed);
    }

    /// Where the run could go on from, and how, for the message when a peer is lost. The watch tells it to the other ranks.
    pub fn saved(&self, checkpoint: impl fmt::Display) {
        *lock(&self.checkpoint) = Some(checkpoint.to_string());
        self.untold.store(true, Relaxed);
    }

    /// From now on the watch looks whether the network still carries what this connection to `peer` sends.
    pub fn look_after(&self, peer: usize, socket: &Arc<Socket>) {
        lock(&self.lines).push(Line::new(peer, socket));
    }

    /// Ends all waits of this process with `error`; the first failure is kept.
    pub fn fail(&self, error: Error) {
        lock(&self.failure).get_or_insert(error);
        self.failed.store(true, Relaxed);
    }

    /// The main thread has an error in hand and is on its way out: the watch gives it more time.
    pub fn ending(&self) {
        self.ending.store(true, Relaxed);
    }

    /// From here on the watch neither hears nor tells, as behind a cable that was cut: `--inject drop-link`.
    pub fn cut_off(&self) {
        self.cut_off.store(true, Relaxed);
    }

    /// The failure, once there is one.
    pub fn check(&self) -> Result<()> {
        self.failure().map_or(Ok(()), Err)
    }

    /// Waits until `poll` says true. `poll` is given how long it may block at most (a few tens of milliseconds); between
    /// polls the health is checked. Returns the time waited. `what` reads behind "rank 0 is": "waiting for rank 1 in ...".
    pub fn wait(&self, what: &str, mut poll: impl FnMut(Duration) -> Result<bool>) -> Result<Duration> {
        let start = Instant::now();
        if self.poll(&mut poll)? {
            return Ok(start.elapsed());
        }
        let waiter = Waiter::enter(self, what);
        let (mut waited, mut last) = (Duration::ZERO, start);
        loop {
            self.check()?;
            let now = Instant::now();
            waited += (now - last).min(LONGEST_SLICE);
            last = now;
            waiter.waited(waited);
            if waited > self.timeout {
                return Err(self.timed_out(what, waited));
            }
            if self.poll(&mut poll)? {
                return Ok(start.elapsed());
            }
        }
    }

    /// Waits until this rank's own GPU is done with `what`. The others are told nothing of it: it is not for them that this
    /// rank waits. Ends as `wait` does; a GPU that does not come to an end is an error of kind `Device`.
    pub fn wait_for_gpu(&self, what: &str, mut is_done: impl FnMut() -> Result<bool>) -> Result<()> {
        let (mut looks, mut waited, mut last) = (0, Duration::ZERO, Instant::now());
        while !is_done()? {
            self.check()?;
            let now = Instant::now();
            waited += (now - last).min(LONGEST_SLICE);
            last = now;
            if waited > self.timeout {
                let Beat { step, phase, .. } = self.beat();
                // So that the watch ends this process, where memory of a GPU that hangs cannot be given back.
                let error = Error::device(format!(
                    "the GPU has spent {:.1} s {what}, in {phase} of step {step}, and is not done: see nvidia-smi for its \
                     state and dmesg for errors of its driver (Xid); over NCCL it may be a peer's GPU that it waits for. \
                     [parallel] timeout sets how long a rank waits",
                    waited.as_secs_f64()
                ));
                self.fail(error.clone());
                return Err(error);
            }
            match looks < LOOKS {
                true => std::thread::yield_now(),
                false => std::thread::sleep(PAUSE),
            }
            looks += 1;
        }
        Ok(())
    }

    fn poll(&self, poll: &mut impl FnMut(Duration) -> Result<bool>) -> Result<bool> {
        poll(SLICE).map_err(|error| if error.kind() == Kind::PeerLost { self.account(error) } else { error })
    }

    /// The watch's account of a lost peer, which knows rank, pid, step and phase, for a connection that broke with
    /// `error`; that one if the watch has none.
    pub fn account(&self, error: Error) -> Error {
        let start = Instant::now();
        while lock(&self.peers).is_some() && start.elapsed() < ACCOUNT {
            if let Some(failure) = self.failure() {
                return failure;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let gone = lock(&self.peers).as_ref().and_then(|peers| peers.gone(Duration::ZERO, Instant::now()));
        gone.map_or(error.clone(), |gone| error.context(gone))
    }

    fn timed_out(&self, what: &str, waited: Duration) -> Error {
        let Beat { step, phase, .. } = self.beat();
        let (rank, late) = match lock(&self.peers).as_ref() {
            Some(peers) => (format!("rank {}", peers.me()), peers.late(Instant::now())),
            None => ("this rank".to_string(), String::new()),
        };
        let late = if late.is_empty() { late } else { format!("Late: {late}. ") };
        let (waited, hint) = (waited.as_secs_f64(), self.hint());
        Error::peer_lost(format!(
            "{rank} has spent {waited:.1} s {what}, in {phase} of step {step}. {late}[parallel] timeout sets how long a rank \
             waits{hint}"
        ))
    }

    /// Where to go on, as a sentence to be appended.
    pub(super) fn hint(&self) -> String {
        lock(&self.checkpoint)
            .as_ref()
            .map_or_else(String::new, |checkpoint| format!(". Last checkpoint: {checkpoint}"))
    }

    /// A checkpoint that was saved since the last call.
    pub(super) fn news(&self) -> Option<String> {
        if self.untold.swap(false, Relaxed) { lock(&self.checkpoint).clone() } else { None }
    }

    pub(super) fn failure(&self) -> Option<Error> {
        if !self.failed.load(Relaxed) {
            return None;
        }
        lock(&self.failure).clone()
    }

    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Relaxed)
    }

    pub(super) fn is_cut_off(&self) -> bool {
        self.cut_off.load(Relaxed)
    }

    pub(super) fn beat(&self) -> Beat {
        Beat {
            step: self.step.load(Relaxed),
            phase: Phase::from_number(self.phase.load(Relaxed).into()).unwrap_or(Phase::Start),
            waited: lock(&self.waiting).waited,
            waiting: Duration::from_micros(self.waited_us.load(Relaxed)),
        }
    }

    /// What this rank is doing: `waiting for rank 1 in a collective, in all-reduce of step 40`.
    pub(super) fn activity(&self) -> String {
        let Beat { step, phase, .. } = self.beat();
        let waiting = lock(&self.waiting);
        let what = if waiting.threads > 0 { format!("{}, ", waiting.what) } else { String::new() };
        format!("{what}in {phase} of step {step}")
    }

    pub(super) fn lines(&self) -> MutexGuard<'_, Vec<Line>> {
        lock(&self.lines)
    }

    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// What is known of the peers; `None` where nobody watches (one rank, or ranks that are threads of a test).
    pub(super) fn peers(&self) -> MutexGuard<'_, Option<Table>> {
        lock(&self.peers)
    }
}

/// Registers a thread's wait for as long as it lasts.
struct Waiter<'a>(&'a Health);

impl<'a> Waiter<'a> {
    fn enter(health: &'a Health, what: &str) -> Self {
        let mut waiting = lock(&health.waiting);
        if waiting.threads == 0 {
            waiting.what.clear();
            waiting.what.push_str(what);
        }
        waiting.threads += 1;
        Waiter(health)
    }

    fn waited(&self, waited: Duration) {
        let mut waiting = lock(&self.0.waiting);
        waiting.waited = waiting.waited.max(waited);
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let mut waiting = lock(&self.0.waiting);
        waiting.threads -= 1;
        if waiting.threads == 0 {
            waiting.waited = Duration::ZERO;
        }
    }
}

/// What these locks guard is whole at every moment, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Phase {
    pub(super) fn from_number(number: u64) -> Option<Phase> {
        use Phase::*;
        let all = [Start, Data, Forward, Backward, AllReduce, Update, Evaluate, Checkpoint, Finish];
        all.into_iter().find(|phase| *phase as u64 == number)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Start => "start",
            Phase::Data => "data",
            Phase::Forward => "forward",
            Phase::Backward => "backward",
            Phase::AllReduce => "all-reduce",
            Phase::Update => "update",
            Phase::Evaluate => "evaluate",
            Phase::Checkpoint => "checkpoint",
            Phase::Finish => "finish",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_by_success_failure_or_timeout() {
        let health = Health::new(Duration::from_millis(50));
        let mut polls = 0;
        let third = |_| {
            polls += 1;
            Ok(polls == 3)
        };
        health.wait("waiting for a friend", third).unwrap();

        health.set(40, Phase::AllReduce);
        let never = |limit| {
            std::thread::sleep(limit);
            Ok(false)
        };
        let error = health.wait("waiting for Godot", never).unwrap_err().to_string();
        assert!(error.contains("waiting for Godot, in all-reduce of step 40. [parallel] timeout"), "{error}");
        assert_eq!(health.beat().waited, Duration::ZERO, "no wait is left behind");

        let broken = |_| Err(Error::peer_lost("the line is dead"));
        assert_eq!(health.wait("waiting", broken).unwrap_err().to_string(), "the line is dead");

        health.fail(Error::data("the first"));
        health.fail(Error::data("the second"));
        assert_eq!(health.wait("waiting", never).unwrap_err().to_string(), "the first");
    }

    #[test]
    fn a_wait_for_the_gpu_ends_too_and_is_not_one_for_peers() {
        let health = Health::new(Duration::from_millis(50));
        health.set(40, Phase::AllReduce);
        let mut looks = 0;
        let done = || {
            looks += 1;
            assert_eq!(health.activity(), "in all-reduce of step 40");
            Ok(looks == LOOKS + 2)
        };
        health.wait_for_gpu("computing", done).unwrap();

        let error = health.wait_for_gpu("computing", || Ok(false)).unwrap_err();
        assert_eq!(error.kind(), Kind::Device);
        assert!(error.to_string().contains("s computing, in all-reduce of step 40, and is not done"), "{error}");

        assert_eq!(health.failure().unwrap().to_string(), error.to_string(), "what the watch is to say");

        let health = Health::new(Duration::from_secs(60));
        let broken = || Err(Error::device("the GPU is dead"));
        assert_eq!(health.wait_for_gpu("computing", broken).unwrap_err().to_string(), "the GPU is dead");
        health.fail(Error::peer_lost("rank 1 is gone"));
        let error = health.wait_for_gpu("computing", || Ok(false)).unwrap_err();
        assert_eq!(error.to_string(), "rank 1 is gone");
    }

    #[test]
    fn while_waiting_the_beat_says_so() {
        let health = Health::new(Duration::from_secs(300));
        let mut polls = 0;
        let poll = |_| {
            polls += 1;
            std::thread::sleep(Duration::from_millis(2));
            if polls == 4 {
                assert!(health.beat().waited >= Duration::from_millis(4));
                assert_eq!(health.activity(), "waiting for rank 1, in start of step 0");
            }
            Ok(polls == 4)
        };
        health.wait("waiting for rank 1", poll).unwrap();
        assert_eq!(health.activity(), "in start of step 0");
    }
}
