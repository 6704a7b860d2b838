//! How long this rank's GPU stands still in a step because parameters are not yet updated. With NCCL the host does not see that: the
//! GPU waits by itself, for the link and for ranks that come late. So two timers are put into the compute stream.
//!
//! ```text
//! compute   ... backward | begin ............ end | forward of the next step
//! updates                       [ last update ]
//! ```
//!
//! All ranks end together, so whoever is late with backward stands still for the shortest time: what is common to all is
//! communication, and what a rank has beyond that it waited for others.

use crate::device::cuda::{Event, Gpu, Stream};
use crate::error::Result;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

pub struct Stall {
    /// Of the steps by turns: while one goes on, the one before is read.
    timers: [Timers; 2],
    steps: AtomicUsize,
}

struct Timers {
    begin: Event,
    end: Event,
}

impl Stall {
    pub fn new(gpu: &Gpu) -> Result<Stall> {
        let timers = || Ok(Timers { begin: gpu.timer()?, end: gpu.timer()? });
        Ok(Stall { timers: [timers()?, timers()?], steps: AtomicUsize::new(0) })
    }

    /// Behind backward.
    pub fn may_begin(&self, compute: &Stream) -> Result<()> {
        compute.record(&self.of(self.steps.load(Relaxed)).begin)
    }

    /// Behind the wait for the last update. Gives the time of the step before, or zero where that is not over.
    pub fn ends(&self, compute: &Stream) -> Result<Duration> {
        let step = self.steps.fetch_add(1, Relaxed);
        compute.record(&self.of(step).end)?;
        let before = self.of(step + 1);
        match step > 0 && before.end.is_done()? {
            true => before.end.since(&before.begin),
            false => Ok(Duration::ZERO),
        }
    }

    fn of(&self, step: usize) -> &Timers {
        &self.timers[step % 2]
    }
}
