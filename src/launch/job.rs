//! The batch job in which this process runs, and the launcher inside it: which they are, how often they have started it
//! before, and when the job ends.
//!
//! Slurm says so in variables (sbatch(1), "OUTPUT ENVIRONMENT VARIABLES"), which whoever starts ranks inside the job
//! hands on: srun, mpirun, torchrun, `trainer -n`. They cannot be relied on: Slurm sets SLURM_RESTART_COUNT only once it is
//! not 0, SLURM_JOB_START_TIME and SLURM_JOB_END_TIME only since 23.02, and a job that was submitted from within another has
//! that one's values instead. The script that `trainer slurm` prints asks the queue for all three.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Names a `trainer -n` to its ranks, the same at each of their starts ...
pub const LAUNCH_ID: &str = "LOCKSTEP_LAUNCH_ID";
/// ... and tells the ranks of a restart that they are: how often they were started before.
pub const LAUNCH_RESTARTS: &str = "LOCKSTEP_RESTARTS";
/// torchrun's, for the same. Ranks that were started by hand, with its other variables, do not have it.
pub const TORCHRUN_ID: &str = "TORCHELASTIC_RUN_ID";

/// What is written of it is what tells it from others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// By Slurm. Each task of an array has an id of its own; a requeued job keeps it.
    pub slurm: Option<Start>,
    pub torchrun: Option<Start>,
    /// By `trainer -n`.
    pub launch: Option<Start>,
    /// When its time limit is over.
    #[serde(skip)]
    pub end: Option<SystemTime>,
}

/// A start of this process by something that may start it again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The same at each of them.
    pub id: String,
    /// How often it was started before.
    pub restarts: u64,
    /// In seconds since 1970, where it is known.
    pub time: Option<u64>,
}

impl Job {
    pub fn detect() -> Result<Job> {
        Job::from_env(|name| std::env::var(name).ok())
    }

    /// For a `trainer -n`: this job, with a new launch in it.
    pub fn launching() -> Result<Job> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let launch = Start { id: format!("{}-{}", std::process::id(), now.as_nanos()), ..Start::default() };
        Ok(Job { launch: Some(launch), ..Job::detect()? })
    }

    /// As the ranks see it that its launch starts after so many others.
    pub fn relaunched(&self, restarts: u64) -> Job {
        Job { launch: self.launch.clone().map(|launch| Start { restarts, ..launch }), ..self.clone() }
    }

    /// How often Slurm has requeued it.
    pub fn requeues(&self) -> u64 {
        self.slurm.as_ref().map_or(0, |slurm| slurm.restarts)
    }

    /// Whether this is the start of something that had started before.
    pub fn is_restart(&self) -> bool {
        self.starts().into_iter().flatten().any(|start| start.restarts > 0)
    }

    /// Whether this is a later start of `first`: the job was requeued, or a launcher has started its ranks again. Two
    /// commands in one start of a job, as in an interactive one, have nothing to do with each other.
    pub fn is_again(&self, first: &Job) -> bool {
        let pairs = self.starts().into_iter().zip(first.starts());
        pairs.filter_map(|(later, first)| later.zip(first)).any(|(later, first)| later.is_after(first))
    }

    fn starts(&self) -> [Option<&Start>; 3] {
        [&self.slurm, &self.torchrun, &self.launch].map(Option::as_ref)
    }

    /// The job that the variables describe; outside of one, a job without an end. Errors (kind Usage): numbers that are none.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Result<Job> {
        let lookup = |name: &str| lookup(name).filter(|text| !text.is_empty());
        let number = |name: &str, what: &str| -> Result<Option<u64>> {
            let Some(text) = lookup(name) else { return Ok(None) };
            let value = text.trim().parse().map(Some);
            value.map_err(|_| {
                let by = match name.split('_').next() {
                    Some("SLURM") => "Slurm",
                    Some("TORCHELASTIC") => "torchrun",
                    _ => "`trainer -n`",
                };
                Error::usage(format!("{name} = \"{text}\" is not {what}; {by} sets it, so correct or unset it"))
            })
        };
        let time = |name: &str| number(name, "a time in seconds since 1970");
        let start = |id: &str, restarts: &str, time: Option<u64>| -> Result<Option<Start>> {
            let restarts = number(restarts, "a number of restarts")?.unwrap_or(0);
            Ok(lookup(id).map(|id| Start { id, restarts, time }))
        };
        let end = time("SLURM_JOB_END_TIME")?;
        Ok(Job {
            slurm: start("SLURM_JOB_ID", "SLURM_RESTART_COUNT", time("SLURM_JOB_START_TIME")?)?,
            torchrun: start(TORCHRUN_ID, "TORCHELASTIC_RESTART_COUNT", None)?,
            launch: start(LAUNCH_ID, LAUNCH_RESTARTS, None)?,
            // What is too far away to be a time is no end.
            end: end.and_then(|seconds| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))),
        })
    }
}

impl Start {
    fn is_after(&self, first: &Start) -> bool {
        let later = self.time.zip(first.time).is_some_and(|(later, first)| later > first);
        self.id == first.id && (self.restarts > first.restarts || later)
    }
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = ["Slurm job", "torchrun", "trainer -n"].into_iter().zip(self.starts());
        let names: Vec<String> =
            named.filter_map(|(what, start)| start.map(|start| format!("{what} {}", start.id))).collect();
        match &names[..] {
            [] => f.write_str("a command without a name"),
            names => f.write_str(&names.join(", ")),
        }
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
        let variables = [("SLURM_JOB_ID", "7"), ("SLURM_JOB_END_TIME", "1700000000"), ("SLURM_RESTART_COUNT", "3")];
        let found = job(&variables).unwrap();
        assert_eq!((found.end, found.requeues(), found.is_restart()), (Some(end), 3, true));
        assert_eq!(job(&[]).unwrap(), Job::default());
        assert_eq!(job(&[("SLURM_JOB_END_TIME", "")]).unwrap(), Job::default());
        assert_eq!(job(&[("SLURM_JOB_END_TIME", "18446744073709551615")]).unwrap(), Job::default());
    }

    #[test]
    fn a_job_is_known_again_when_it_was_requeued_and_a_launch_when_it_starts_its_ranks_again() {
        // Slurm's id, restarts and time; torchrun's id and restarts; those of `trainer -n`.
        let names = [
            "SLURM_JOB_ID",
            "SLURM_RESTART_COUNT",
            "SLURM_JOB_START_TIME",
            "TORCHELASTIC_RUN_ID",
            "TORCHELASTIC_RESTART_COUNT",
            LAUNCH_ID,
            LAUNCH_RESTARTS,
        ];
        for (first, later, again) in [
            ("7", "7 1", true),
            ("7 1", "7 3", true),
            ("7 1", "7 1", false), // the next command of a script, or of an interactive job
            ("7", "8 1", false),
            ("7 1 100", "7 1 220", true), // the first count was inherited from the job that has submitted this one
            ("7 1 100", "7 1 100", false),
            ("7 0 100", "8 0 220", false),
            ("7 0", "7 0 220", false), // a command that does not know the time, and one that does
            ("- - - none 0", "- - - none 1", true),
            ("- - - none 0", "- - - none 0", false),
            ("- - - a 0", "- - - b 1", false),
            ("- - - - - a 0", "- - - - - a 1", true),
            ("- - - - - a 0", "- - - - - b 0", false),
            ("- - - - - a 0", "- - - - - b 1", false),
            ("7 - - - - a 0", "7 - - - - a 1", true),
            ("7 - - - - a 0", "7 - - - - b 0", false),
            ("7 - - - - a 0", "7 1 - - - b 0", true),
            ("", "", false), // started by something that does not say what it is
            ("", "- 1", false),
        ] {
            let [first_job, later_job] = [first, later].map(|values| {
                let values = values.split(' ').map(|value| if value == "-" { "" } else { value });
                job(&names.into_iter().zip(values).collect::<Vec<_>>()).unwrap()
            });
            let written = serde_json::from_str(&serde_json::to_string(&first_job).unwrap()).unwrap();
            assert_eq!(later_job.is_again(&written), again, "`{first}`, then `{later}`");
        }
    }

    #[test]
    fn every_launch_has_a_name_of_its_own() {
        let [one, other] = [(), ()].map(|()| Job::launching().unwrap());
        assert!(!other.relaunched(1).is_again(&one) && one.relaunched(1).is_again(&one) && !one.is_again(&one));
    }

    #[test]
    fn a_job_is_named_by_all_that_has_started_it() {
        let named = |variables: &[(&str, &str)]| job(variables).unwrap().to_string();
        assert_eq!(named(&[("SLURM_JOB_ID", "7"), (LAUNCH_ID, "4711-1")]), "Slurm job 7, trainer -n 4711-1");
        assert_eq!(named(&[(TORCHRUN_ID, "a")]), "torchrun a");
        assert_eq!(named(&[]), "a command without a name");
    }

    #[test]
    fn what_is_no_number_is_refused_by_name() {
        for (name, value, by) in [
            ("SLURM_JOB_END_TIME", "2026-11-21T11:08:35", "Slurm"),
            ("SLURM_JOB_START_TIME", "now", "Slurm"),
            ("SLURM_RESTART_COUNT", "-1", "Slurm"),
            ("TORCHELASTIC_RESTART_COUNT", "x", "torchrun"),
            ("LOCKSTEP_RESTARTS", "once", "`trainer -n`"),
        ] {
            let error = job(&[(name, value)]).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{name} = \"{value}\" is not a ")), "{error}");
            assert!(error.contains(&format!("; {by} sets it")), "{error}");
        }
    }
}
