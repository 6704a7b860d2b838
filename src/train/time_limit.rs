//! Stopping before the job's time limit, so late that little time is lost and so early that the checkpoint is whole.
//!
//! All ranks must stop after the same step, so a rank that wants to stop says so in a step's sums, and the run saves after
//! that step. A rank looks at the clock before each step. If it stays silent, then at the least one more pass of the loop
//! (a step with whatever evaluation and checkpoint follow it) goes by until it looks again, then the step that carries its
//! wish, then the save. So it speaks up once
//!
//! ```text
//! now + 2 * longest pass so far + 2 * longest save so far + RESERVE >= end
//! ```
//!
//! where the second save is for a file system that is slower than it was before.

use crate::launch::job::Job;
use crate::report::log::SAID_ONCE;
use indicatif::HumanDuration;
use std::time::{Duration, Instant, SystemTime};

/// For what comes after the save (the summary, the ranks' exit, the batch script's `scontrol requeue`) and for clocks
/// that differ between nodes.
const RESERVE: Duration = Duration::from_secs(10);
/// Until a save has been measured it is taken to write this much, a shared file system at a bad hour.
const BYTES_PER_SECOND: f64 = 100e6;

#[derive(Clone, Copy, Debug)]
pub struct TimeLimit {
    end: Instant,
    /// The longest so far.
    pass: Duration,
    /// The longest so far; before the first one an estimate.
    save: Duration,
    measured: bool,
    looked: Option<Instant>,
}

impl TimeLimit {
    /// The job's, if it has one. Rank 0 says what is to be known of the job.
    pub fn of_job(job: &Job, checkpoint_bytes: usize) -> Option<TimeLimit> {
        if job.requeues() > 0 {
            tracing::info!("the job was requeued: restart {}", job.requeues());
        }
        let end = job.end?;
        let Ok(left) = end.duration_since(SystemTime::now()) else {
            let ago = end.elapsed().unwrap_or_default().as_secs();
            tracing::warn!(
                target: SAID_ONCE,
                "SLURM_JOB_END_TIME was {ago} s ago, so it is taken to be left over from another job; if so, unset it"
            );
            return None;
        };
        // What is beyond the clock's range never comes.
        let limit = TimeLimit::new(Instant::now().checked_add(left)?, checkpoint_bytes);
        let ends = HumanDuration(left);
        tracing::info!("the job ends in {ends}; ahead of that the run saves and exits with code 75");
        if left <= limit.margin() {
            tracing::warn!(
                target: SAID_ONCE,
                "the job ends in {ends}, too soon for more than one step and its checkpoint; ask for more time"
            );
        }
        Some(limit)
    }

    fn new(end: Instant, checkpoint_bytes: usize) -> TimeLimit {
        let save = Duration::from_secs_f64(checkpoint_bytes as f64 / BYTES_PER_SECOND);
        TimeLimit { end, pass: Duration::ZERO, save, measured: false, looked: None }
    }

    /// How long before the end the run has to stop, as far as is known.
    fn margin(&self) -> Duration {
        2 * self.pass + 2 * self.save + RESERVE
    }

    /// Before each step: whether the run must stop after it.
    pub fn is_near(&mut self, now: Instant) -> bool {
        if let Some(looked) = self.looked.replace(now) {
            self.pass = self.pass.max(now.duration_since(looked));
        }
        self.end.saturating_duration_since(now) <= self.margin()
    }

    /// After each checkpoint.
    pub fn saved(&mut self, took: Duration) {
        self.save = if self.measured { self.save.max(took) } else { took };
        self.measured = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_last_pass_and_its_save_fit_before_the_end() {
        let start = Instant::now();
        let end = start + 1000 * SECOND;
        // Seconds of a step, of the evaluation that follows every fifth, and of a save.
        for (step, evaluation, save) in [(1, 0, 1), (7, 0, 40), (3, 60, 20), (50, 100, 50)] {
            let mut limit = TimeLimit::new(end, 0);
            let mut now = start;
            let saved = (1..).find_map(|number| {
                let near = limit.is_near(now);
                now += step * SECOND;
                if near || number == 1 {
                    now += save * SECOND;
                    limit.saved(save * SECOND);
                }
                if near {
                    return Some(now);
                }
                now += if number % 5 == 0 { evaluation * SECOND } else { Duration::ZERO };
                None
            });
            let spare = end.saturating_duration_since(saved.unwrap());
            let longest = (step + evaluation + save) * SECOND;
            assert!(spare >= save * SECOND, "{step} s a step, {save} s a save: {spare:?} are left for a slower save");
            assert!(spare <= 3 * longest + RESERVE, "{step} s a step, {save} s a save: stopped {spare:?} too early");
        }
    }

    #[test]
    fn before_the_first_save_its_time_is_estimated_from_its_bytes() {
        let start = Instant::now();
        let mut limit = TimeLimit::new(start + 100 * SECOND, 1_000_000_000);
        assert_eq!(limit.margin(), 20 * SECOND + RESERVE);
        assert!(!limit.is_near(start + 69 * SECOND));
        let mut sooner = limit;
        assert!(sooner.is_near(start + 99 * SECOND));
        limit.saved(2 * SECOND);
        limit.saved(SECOND);
        assert!(!limit.is_near(start + 69 * SECOND + SECOND / 2), "2 * 0.5 s + 2 * 2 s + RESERVE");
        assert_eq!(limit.margin(), 5 * SECOND + RESERVE);
    }

    #[test]
    fn an_end_that_is_over_is_none() {
        let job = |end| Job { end: Some(end), ..Job::default() };
        let now = SystemTime::now();
        assert!(TimeLimit::of_job(&job(now - SECOND), 0).is_none());
        assert!(TimeLimit::of_job(&Job::default(), 0).is_none());
        let mut limit = TimeLimit::of_job(&job(now + 1000 * SECOND), 0).unwrap();
        assert!(!limit.is_near(Instant::now()));
        assert!(limit.is_near(Instant::now() + 991 * SECOND));
    }
}
