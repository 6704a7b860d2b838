//! Waiting for what a program under test does. The module above says how long at most.

use super::WATCHDOG;
use std::thread;
use std::time::{Duration, Instant};

/// Polls until there is something, at most until the watchdog bites.
#[track_caller]
pub fn until<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = poll() {
            return found;
        }
        assert!(start.elapsed() < WATCHDOG, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(10));
    }
}
