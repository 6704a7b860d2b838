//! SIGTERM, SIGUSR1, SIGHUP and SIGINT mean "finish this step, save, leave"; a second Ctrl-C leaves at once.
//!
//! A terminal sends Ctrl-C to the launcher and to the ranks, and the launcher forwards it: the same request arrives
//! twice within a moment. So a repetition counts only after `REPEAT`.

use crate::error::{Context, Kind, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator;
use signal_hook::low_level;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// The signals that ask a run to stop. Slurm sends SIGTERM (or `--signal=USR1`) ahead of its limit, a closing terminal
/// SIGHUP.
pub const STOP: [i32; 4] = [SIGTERM, SIGUSR1, SIGHUP, SIGINT];
/// A second SIGINT within this time is the same one.
pub const REPEAT: Duration = Duration::from_millis(300);
/// Exit code of a rank that has saved and left.
pub const STOPPED: i32 = Kind::Stopped as i32;
/// Exit code after a second Ctrl-C: 128 + SIGINT, as shells have it.
pub const INTERRUPTED: u8 = 130;

/// Whether this process was asked to stop. Clones share the answer.
#[derive(Clone, Debug)]
pub struct Signals {
    /// 0: none.
    first: Arc<AtomicI32>,
}

impl Signals {
    /// Catches the signals from here on, on a thread that sleeps until one arrives.
    pub fn install() -> Result<Signals> {
        let first = Arc::new(AtomicI32::new(0));
        let mut incoming = iterator::Signals::new(STOP).or_kind(Kind::Internal, "catching signals")?;
        let shared = first.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                let mut interrupts = Interrupts::default();
                for signal in incoming.forever() {
                    let _ = shared.compare_exchange(0, signal, Relaxed, Relaxed);
                    if interrupts.repeated(signal, Instant::now()) {
                        low_level::exit(i32::from(INTERRUPTED));
                    }
                }
            })
            .or_kind(Kind::Internal, "starting the signal thread")?;
        Ok(Signals { first })
    }

    /// The first signal that asked to stop.
    pub fn requested(&self) -> Option<i32> {
        Some(self.first.load(Relaxed)).filter(|signal| *signal != 0)
    }
}

/// Tells a second Ctrl-C from the echo of the first.
#[derive(Default)]
pub struct Interrupts {
    last: Option<Instant>,
}

impl Interrupts {
    pub fn repeated(&mut self, signal: i32, now: Instant) -> bool {
        if signal != SIGINT {
            return false;
        }
        let last = self.last.replace(now);
        last.is_some_and(|last| now.duration_since(last) >= REPEAT)
    }
}

/// `SIGKILL` for 9.
pub fn name(signal: i32) -> &'static str {
    low_level::signal_name(signal).unwrap_or("an unnamed signal")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_second_ctrl_c_after_a_while_is_a_repetition() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut interrupts = Interrupts::default();
        assert!(!interrupts.repeated(SIGTERM, at(0)));
        assert!(!interrupts.repeated(SIGINT, at(1000)));
        assert!(!interrupts.repeated(SIGINT, at(1299)));
        assert!(!interrupts.repeated(SIGTERM, at(1500)));
        assert!(interrupts.repeated(SIGINT, at(1600)));
        assert_eq!(name(9), "SIGKILL");
    }
}
