//! The batch job in which this process runs: when it ends, and how often it was started before.
//!
//! Slurm says both in variables (sbatch(1), "OUTPUT ENVIRONMENT VARIABLES"), which whoever starts ranks inside the job
//! hands on: srun, mpirun, torchrun, `trainer -n`. Slurm before 23.02 does not set SLURM_JOB_END_TIME; the script that
//! `trainer slurm` prints asks the queue for it.

use crate::error::{Error, Result};
use std::time::{Duration, SystemTime};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Job {
    /// When its time limit is over.
    pub end: Option<SystemTime>,
    /// How often it was requeued.
    pub restarts: u64,
}

impl Job {
    pub fn detect() -> Result<Job> {
        Job::from_env(|name| std::env::var(name).ok())
    }

    /// The job that the variables describe; outside of one, a job without an end. Errors (kind Usage): numbers that are none.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Result<Job> {
        let number = |name: &str, what: &str| -> Result<Option<u64>> {
            let Some(text) = lookup(name).filter(|text| !text.is_empty()) else { return Ok(None) };
            let value = text.trim().parse().map(Some);
            value.map_err(|_| {
                Error::usage(format!("{name} = \"{text}\" is not {what}; Slurm sets it, so correct or unset it"))
            })
        };
        let end = number("SLURM_JOB_END_TIME", "a time in seconds since 1970")?;
        Ok(Job {
            // What is too far away to be a time is no end.
            end: end.and_then(|seconds| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))),
            restarts: number("SLURM_RESTART_COUNT", "a number of restarts")?.unwrap_or(0),
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
        assert_eq!(job(&variables).unwrap(), Job { end: Some(end), restarts: 3 });
        assert_eq!(job(&[]).unwrap(), Job::default());
        assert_eq!(job(&[("SLURM_JOB_END_TIME", "")]).unwrap(), Job::default());
        assert_eq!(job(&[("SLURM_JOB_END_TIME", "18446744073709551615")]).unwrap(), Job::default());
    }

    #[test]
    fn what_is_no_number_is_refused_by_name() {
        for (name, value) in [("SLURM_JOB_END_TIME", "2026-11-21T11:08:35"), ("SLURM_RESTART_COUNT", "-1")] {
            let error = job(&[(name, value)]).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{name} = \"{value}\" is not a ")), "{error}");
        }
    }
}
