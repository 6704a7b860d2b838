//! Rank 0's GPU while it trains. What the driver measures may take milliseconds to read, and a GPU that fails may keep the
//! reader for ever; so a thread reads it, and a log step takes what was read last.

use crate::device::cuda::nvml::Sample;
use crate::error::{Context, Kind, Result};
use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// Between two readings. The driver's own averages are over a second or less.
const PACE: Duration = Duration::from_secs(1);

/// Reads until it is dropped.
pub(super) struct Meter {
    latest: Arc<Mutex<Sample>>,
    /// Its end is the thread's. That is not waited for, as the thread may be kept.
    _running: Sender<Infallible>,
}

impl Meter {
    /// Calls `read` once here and then every second from a thread.
    pub fn start(mut read: impl FnMut() -> Sample + Send + 'static) -> Result<Meter> {
        let latest = Arc::new(Mutex::new(read()));
        let (running, ended) = bounded(0);
        let thread = thread::Builder::new().name("gpu-meter".to_string());
        let newest = latest.clone();
        let work = move || {
            while ended.recv_timeout(PACE) == Err(RecvTimeoutError::Timeout) {
                let sample = read();
                *newest.lock().unwrap_or_else(PoisonError::into_inner) = sample;
            }
        };
        thread.spawn(work).or_kind(Kind::Internal, "starting the thread that reads the GPU's meter")?;
        Ok(Meter { latest, _running: running })
    }

    pub fn latest(&self) -> Sample {
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn it_goes_on_reading_until_it_is_dropped() {
        let mut memory = 0;
        let (last, dropped) = bounded::<Infallible>(0);
        let meter = Meter::start(move || {
            let _last = &last;
            memory += 1;
            Sample { memory_mib: Some(memory), ..Sample::default() }
        })
        .unwrap();
        assert_eq!(meter.latest().memory_mib, Some(1), "there is a sample from the start");
        let patience = Duration::from_secs(60);
        let start = Instant::now();
        while meter.latest().memory_mib == Some(1) {
            assert!(start.elapsed() < patience, "no second sample");
            thread::sleep(Duration::from_millis(10));
        }
        drop(meter);
        assert_eq!(dropped.recv_timeout(patience), Err(RecvTimeoutError::Disconnected), "the thread has ended");
    }
}
