//! The batch job in which this process runs, and the `trainer -n` inside it: which they are, whether they have started it
//! before, and when the job ends.
//!
//! Slurm says so in variables (sbatch(1), "OUTPUT ENVIRONMENT VARIABLES"), which whoever starts ranks inside the job
//! hands on: srun, mpirun, torchrun, `trainer -n`. Slurm before 23.02 does not set SLURM_JOB_END_TIME; the script that
//! `trainer slurm` prints asks the queue for it.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Names a `trainer -n` to its ranks, the same at each of their starts ...
pub const LAUNCH_ID: &str = "LOCKSTEP_LAUNCH_ID";
/// ... and tells the ranks of a restart that they are: how often they were started before.
pub const LAUNCH_RESTARTS: &str = "LOCKSTEP_RESTARTS";

/// What is written of it is what tells it from others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Slurm's, of each task of an array its own; a requeued job keeps it.
    pub slurm_id: Option<String>,
    /// How often Slurm has requeued it.
    pub restarts: u64,
    /// The `trainer -n` that has started this rank.
    pub launch: Option<String>,
    /// How often that has started its ranks again.
    #[serde(skip)]
    pub launch_restarts: u64,
    /// When its time limit is over.
    #[serde(skip)]
    pub end: Option<SystemTime>,
}

impl Job {
    pub fn detect() -> Result<Job> {
        Job::from_env(|name| std::env::var(name).ok())
    }

    /// For a `trainer -n`: this job, with a new launch in it.
    pub fn launching() -> Result<Job> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Job { launch: Some(format!("{}-{}", std::process::id(), now.as_nanos())), ..Job::detect()? })
    }

    /// Whether this is the start of something that had started before.
    pub fn is_restart(&self) -> bool {
        self.restarts > 0 || self.launch_restarts > 0
    }

    /// Whether this is a later start of `first`: the job was requeued, or a `trainer -n` has started its ranks again. Two
    /// commands in one start of a job, as in an interactive one, have nothing to do with each other.
    pub fn is_again(&self, first: &Job) -> bool {
        let requeued = self.slurm_id.is_some() && self.slurm_id == first.slurm_id && self.restarts > first.restarts;
        requeued || (self.launch.is_some() && self.launch == first.launch)
    }

    /// The job that the variables describe; outside of one, a job without an end. Errors (kind Usage): numbers that are none.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Result<Job> {
        let lookup = |name: &str| lookup(name).filter(|text| !text.is_empty());
        let number = |name: &str, what: &str| -> Result<Option<u64>> {
            let Some(text) = lookup(name) else { return Ok(None) };
            let value = text.trim().parse().map(Some);
            value.map_err(|_| {
                let by = if name == LAUNCH_RESTARTS { "`trainer -n`" } else { "Slurm" };
                Error::usage(format!("{name} = \"{text}\" is not {what}; {by} sets it, so correct or unset it"))
            })
        };
        let end = number("SLURM_JOB_END_TIME", "a time in seconds since 1970")?;
        Ok(Job {
            // What is too far away to be a time is no end.
            end: end.and_then(|seconds| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))),
            restarts: number("SLURM_RESTART_COUNT", "a number of restarts")?.unwrap_or(0),
            launch_restarts: number(LAUNCH_RESTARTS, "a number of restarts")?.unwrap_or(0),
            slurm_id: lookup("SLURM_JOB_ID"),
            launch: lookup(LAUNCH_ID),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(variables: &[(&str, &str)]) -> Result<Job> {
        Job::from_env(|name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn a_job_has_an_end_and_a_number_of_restarts() {
        let end = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let variables = [("SLURM_JOB_END_TIME", "1700000000"), ("SLURM_RESTART_COUNT", "3")];
        assert_eq!(job(&variables).unwrap(), Job { end: Some(end), restarts: 3, ..Job::default() });
        assert_eq!(job(&[]).unwrap(), Job::default());
        assert_eq!(job(&[("SLURM_JOB_END_TIME", "")]).unwrap(), Job::default());
        assert_eq!(job(&[("SLURM_JOB_END_TIME", "18446744073709551615")]).unwrap(), Job::default());
    }

    #[test]
    fn a_job_is_known_again_when_it_was_requeued_and_a_launch_when_it_starts_its_ranks_again() {
        let of = |slurm_id: &str, restarts: &str, launch: &str| {
            let variables =
                [("SLURM_JOB_ID", slurm_id), ("SLURM_RESTART_COUNT", restarts), ("LOCKSTEP_LAUNCH_ID", launch)];
            job(&variables).unwrap()
        };
        for (first, later, again) in [
            (["7", "", ""], ["7", "1", ""], true),
            (["7", "1", ""], ["7", "3", ""], true),
            (["7", "1", ""], ["7", "1", ""], false), // the next command of a script, or of an interactive job
            (["7", "", ""], ["8", "1", ""], false),
            (["", "", "a"], ["", "", "a"], true),
            (["", "", "a"], ["", "", "b"], false),
            (["7", "", "a"], ["7", "", "a"], true),
            (["7", "", "a"], ["7", "", "b"], false),
            (["7", "", "a"], ["7", "1", "b"], true),
            (["", "", ""], ["", "", ""], false), // started by something that does not say what it is
            (["", "", ""], ["", "1", ""], false),
        ] {
            let [first, later] = [first, later].map(|[id, restarts, launch]| of(id, restarts, launch));
            let written = serde_json::from_str(&serde_json::to_string(&first).unwrap()).unwrap();
            assert_eq!(later.is_again(&written), again, "{first:?}, then {later:?}");
        }
    }

    #[test]
    fn every_launch_has_a_name_of_its_own() {
        let [one, other] = [(), ()].map(|()| Job::launching().unwrap());
        assert!(!other.is_again(&one) && one.is_again(&one));
    }

    #[test]
    fn what_is_no_number_is_refused_by_name() {
        for (name, value) in [
            ("SLURM_JOB_END_TIME", "2026-11-21T11:08:35"),
            ("SLURM_RESTART_COUNT", "-1"),
            ("LOCKSTEP_RESTARTS", "once"),
        ] {
            let error = job(&[(name, value)]).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{name} = \"{value}\" is not a ")), "{error}");
        }
    }
}
