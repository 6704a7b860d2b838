//! Every wait in the program goes through `Health::wait`: it ends when the awaited thing happens, when a peer is lost, or
//! when the time-out of `[parallel]` has passed; and it says meanwhile whom it waits for.

use crate::error::{Error, Result};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
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

/// This rank's state as its peers see it, and what it knows of them. Shared by the training loop (which sets the phase),
/// the communicator (which waits) and the watch thread (which exchanges heartbeats).
pub struct Health {
    step: AtomicU64,
    phase: AtomicU8,
    failed: AtomicBool,
    failure: Mutex<Option<Error>>,
    timeout: Duration,
}

impl Health {
    pub fn new(timeout: Duration) -> Arc<Health> {
        Arc::new(Health {
            step: AtomicU64::new(0),
            phase: AtomicU8::new(Phase::Start as u8),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            timeout,
        })
    }

    /// Called by the training loop; cheap.
    pub fn set(&self, step: u64, phase: Phase) {
        self.step.store(step, Relaxed);
        self.phase.store(phase as u8, Relaxed);
    }

    /// Ends all waits of this process with `error`; the first failure is kept.
    pub fn fail(&self, error: Error) {
        self.failure.lock().unwrap().get_or_insert(error);
        self.failed.store(true, Relaxed);
    }

    /// The failure, once there is one.
    pub fn check(&self) -> Result<()> {
        if self.failed.load(Relaxed) {
            return Err(self.failure.lock().unwrap().clone().expect("set before the flag"));
        }
        Ok(())
    }

    /// Waits until `poll` says true. `poll` is given how long it may block at most (a few tens of milliseconds); between
    /// polls the health is checked. Returns the time waited.
    pub fn wait(&self, what: &str, mut poll: impl FnMut(Duration) -> Result<bool>) -> Result<Duration> {
        let start = Instant::now();
        while !poll(Duration::from_millis(20))? {
            self.check()?;
            if start.elapsed() > self.timeout {
                return Err(Error::peer_lost(format!("{what}: waited {:?}", self.timeout)));
            }
        }
        Ok(start.elapsed())
    }
}
