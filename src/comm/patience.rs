//! What a wait does between two looks at a library that has nothing to sleep on.

use std::time::{Duration, Instant};

/// At first nothing much, since most answers come at once; then it lets others have the core, and at last it sleeps.
pub struct Patience(Instant);

impl Patience {
    const SPIN: Duration = Duration::from_micros(20);
    const YIELD: Duration = Duration::from_millis(1);
    const SLEEP: Duration = Duration::from_micros(50);

    pub fn new() -> Patience {
        Patience(Instant::now())
    }

    pub fn rest(&self) {
        let waited = self.0.elapsed();
        if waited < Self::SPIN {
            std::hint::spin_loop();
        } else if waited < Self::YIELD {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Self::SLEEP);
        }
    }
}
