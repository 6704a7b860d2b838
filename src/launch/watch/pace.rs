//! Who holds up the others while the run goes on: on rank 0, from the waiting times that come with the heartbeats.

use super::health::Beat;
use crate::report::stragglers::Stragglers;
use std::time::{Duration, Instant};

/// Waiting times are compared over at least this long, of which heartbeats, which may be 0.2 s old, miss little.
const WINDOW: Duration = Duration::from_secs(10);
/// And over at least so many steps: of the last, a rank may not have told yet.
const STEPS: u64 = 10;
/// A share of the time that is worth a line.
const SHARE: f64 = 0.1;

#[derive(Default)]
pub struct Pace {
    window: Option<Window>,
    /// Each rank's waiting time when the window began.
    before: Vec<Duration>,
    /// The next warning comes no earlier. The time between them doubles, for the whole run.
    next: Option<Instant>,
    quiet: Duration,
}

struct Window {
    start: Instant,
    step: u64,
}

/// What is worth a warning.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeldUp {
    pub by: Stragglers,
    /// Of the time, 0 to 1.
    pub share: f64,
    pub seconds: f64,
    pub steps: u64,
}

impl Pace {
    /// For so many ranks.
    pub fn new(ranks: usize) -> Pace {
        Pace { before: Vec::with_capacity(ranks), quiet: WINDOW, ..Pace::default() }
    }

    /// Begins anew, after a time that tells nothing.
    pub fn forget(&mut self) {
        self.window = None;
    }

    /// With what all ranks have said last, by rank. Allocates nothing.
    pub fn look<'a>(&mut self, beats: impl Iterator<Item = &'a Beat> + Clone, now: Instant) -> Option<HeldUp> {
        let step = beats.clone().next()?.step;
        let begun = self.window.as_ref().filter(|window| window.step > 0);
        let over = begun.map(|window| (now - window.start, step.saturating_sub(window.step)));
        if over.is_some_and(|(time, steps)| time < WINDOW || steps < STEPS) {
            return None;
        }
        let longer = |(beat, before): (&Beat, &Duration)| beat.waiting.saturating_sub(*before).as_secs_f64();
        let found = over.zip(Stragglers::find(beats.clone().zip(&self.before).map(longer)));
        self.before.clear();
        self.before.extend(beats.map(|beat| beat.waiting));
        self.window = Some(Window { start: now, step });

        let ((time, steps), by) = found?;
        let seconds = time.as_secs_f64();
        let held_up = HeldUp { by, share: by.seconds / seconds, seconds, steps };
        if held_up.share < SHARE || self.next.is_some_and(|next| now < next) {
            return None;
        }
        self.next = Some(now + self.quiet);
        self.quiet *= 2;
        Some(held_up)
    }
}

#[cfg(test)]
mod tests {
    use super::super::health::Phase;
    use super::*;

    /// When and for whom a run of 600 s warns, in which rank r waits `waits[r]` ms of every step, that takes `step_ms`.
    fn warnings(step_ms: u64, waits: &[u64]) -> Vec<(u64, HeldUp)> {
        let start = Instant::now();
        let mut pace = Pace::new(waits.len());
        let look = |ms: u64| {
            let step = ms / step_ms;
            let beat = |wait: &u64| Beat {
                step,
                phase: Phase::Forward,
                waited: Duration::ZERO,
                waiting: Duration::from_millis(step * wait),
            };
            let beats: Vec<Beat> = waits.iter().map(beat).collect();
            pace.look(beats.iter(), start + Duration::from_millis(ms)).map(|held_up| (ms, held_up))
        };
        (0..600_000).step_by(200).filter_map(look).collect()
    }

    #[test]
    fn a_slow_rank_is_named_with_its_cost_and_then_ever_more_rarely() {
        let found = warnings(100, &[31, 30, 0, 33]);
        let (_, first) = found[0];
        assert_eq!((first.by.rank, first.by.count, first.steps), (2, 1, 100));
        assert!((first.share - 0.3).abs() < 0.01 && (first.by.seconds - 3.0).abs() < 0.1, "{first:?}");
        let seconds: Vec<u64> = found.iter().map(|(ms, _)| ms / 1000).collect();
        assert_eq!(seconds, [10, 20, 40, 80, 160, 320]);
    }

    #[test]
    fn little_differences_are_no_news_and_long_steps_take_longer_to_judge() {
        assert_eq!(warnings(100, &[9, 0]), []);
        assert_eq!(warnings(100, &[50, 50]), []);
        let (ms, held_up) = warnings(5000, &[1000, 0])[0];
        assert_eq!((ms, held_up.steps), (55_000, 10));
    }

    #[test]
    fn what_was_before_the_window_does_not_count() {
        let start = Instant::now();
        let mut pace = Pace::new(2);
        let mut look = |seconds: u64, step: u64, waiting: [u64; 2], forget: bool| {
            if forget {
                pace.forget();
            }
            let beat = |s| Beat { step, phase: Phase::Data, waited: Duration::ZERO, waiting: Duration::from_secs(s) };
            pace.look(waiting.map(beat).iter(), start + Duration::from_secs(seconds)).is_some()
        };
        // Between start and the first step nothing is measured: a run that goes on begins with a high number.
        assert!(!look(0, 0, [0, 0], false));
        assert!(!look(60, 5000, [30, 0], false));
        assert!(!look(70, 5100, [30, 0], false));
        assert!(!look(80, 5200, [60, 0], true));
        assert!(look(90, 5300, [65, 0], false));
    }
}
