//! `--inject`: failures to order, so that what is meant to survive them can be rehearsed on a laptop.
//!
//! A fault happens once in the course of a run, however often the run is started: that it happens is noted in the run's
//! directory, in the file `injected`, the moment before. A run that goes on from a checkpoint before that step passes it by,
//! whoever has started it again: `--max-restarts`, a batch system, or the user. A run that begins anew has a new course.

mod act;
mod grammar;

pub use grammar::{Fault, Injection};

use super::{Options, Rank};
use crate::error::{Context, Error, Kind, Result};
use crate::launch::job::Job;
use crate::launch::watch::Phase;
use crate::launch::world::World;
use crate::model::net::Net;
use crate::report::log::SAID_ONCE;
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

const RECORD: &str = "injected";

/// When a fault happens.
#[derive(Clone, Copy, PartialEq)]
enum Moment {
    /// As its step begins.
    Step,
    /// Before the ranks compare their parameters after its step.
    Audit,
    /// When the checkpoint of its step is written.
    Save,
}

impl Fault {
    fn moment(self) -> Moment {
        match self {
            Fault::CorruptParams => Moment::Audit,
            Fault::CorruptCheckpoint => Moment::Save,
            _ => Moment::Step,
        }
    }
}

/// Fails (kind Usage) where a rank is named that is not there; a restart on fewer ranks has left it out, which is a warning.
pub fn check_ranks(injections: &[Injection], job: &Job, world: &World) -> Result<()> {
    for injection in injections.iter().filter(|injection| injection.rank >= world.size) {
        let Injection { rank, .. } = injection;
        let text = format!("--inject {injection}: there is no rank {rank}, the last one is {}", world.size - 1);
        if !job.is_restart() {
            return Err(Error::usage(text));
        }
        tracing::warn!(target: SAID_ONCE, "{text}");
    }
    Ok(())
}

/// What is to happen to this rank. Costs nothing where nothing is.
pub struct Faults {
    pending: Vec<Injection>,
    /// Of every step.
    delay: Duration,
    record: PathBuf,
}

impl Faults {
    /// Those of a run that begins `anew` or goes on. All ranks call it before the first step.
    pub fn new(options: &Options, anew: bool, directory: &Path, world: &World) -> Result<Faults> {
        let record = directory.join(RECORD);
        let happened = match anew {
            true => begin_record(&record, world).map(|()| String::new()),
            false => fs::read_to_string(&record),
        };
        let none_yet = |error: io::Error| match error.kind() {
            ErrorKind::NotFound => Ok(String::new()),
            _ => Err(error),
        };
        let happened = happened.or_else(none_yet).or_kind(Kind::Internal, record.display())?;

        let mut faults = Faults { pending: Vec::new(), delay: Duration::ZERO, record };
        for injection in &options.inject {
            match injection {
                Injection { rank, .. } if *rank != world.rank => {}
                Injection { fault: Fault::Delay(delay), .. } => faults.delay += *delay,
                _ if happened.lines().any(|line| line == injection.to_string()) => tracing::warn!(
                    "--inject {injection}: it has happened in this run (see {}) and does not again",
                    faults.record.display()
                ),
                _ => faults.pending.push(injection.clone()),
            }
        }
        Ok(faults)
    }

    /// What happens as a step begins; gives what this rank is to add to its loss.
    pub fn before_step(&mut self, step: u64, rank: &Rank) -> Result<f32> {
        if !self.delay.is_zero() {
            rank.health.set(step, Phase::Data);
            std::thread::sleep(self.delay);
        }
        let mut to_loss = 0.0;
        while let Some(fault) = self.next(Moment::Step, step)? {
            rank.health.set(step, Phase::Data);
            match fault {
                Fault::Signal(signal) => act::signal(signal)?,
                Fault::Stop { wake_after } => act::stop(wake_after)?,
                Fault::DropLink => act::drop_links(&rank.health)?,
                Fault::Nan => to_loss = f32::NAN,
                Fault::Delay(_) | Fault::CorruptParams | Fault::CorruptCheckpoint => unreachable!("of another moment"),
            }
        }
        Ok(to_loss)
    }

    /// What happens before the parameters of all ranks are compared after `step`.
    pub fn before_audit(&mut self, step: u64, net: &mut Net) -> Result<()> {
        while self.next(Moment::Audit, step)?.is_some() {
            net.edit_params(|_, params| act::flip_bit(&mut params[0]))?;
        }
        Ok(())
    }

    /// What happens to the checkpoint that was just saved after `step`.
    pub fn after_save(&mut self, step: u64, checkpoint: &Path) -> Result<()> {
        while self.next(Moment::Save, step)?.is_some() {
            act::flip_byte(checkpoint).or_kind(Kind::Internal, format!("--inject: {}", checkpoint.display()))?;
        }
        Ok(())
    }

    /// The run is over after `step`: says what was to happen and did not.
    pub fn at_end(&self, step: u64) {
        for injection in &self.pending {
            let why = match injection.fault.moment() {
                Moment::Step => format!("the run ended after step {step}"),
                Moment::Save => "no checkpoint was saved after that step".to_string(),
                Moment::Audit => "after that step no copies of the parameters were compared: that takes \
                                  parallel.audit_every_steps, and ranks that do not share one copy, as over tcp"
                    .to_string(),
            };
            tracing::warn!("--inject {injection} did not happen: {why}");
        }
    }

    /// The next fault that is due, noted as having happened.
    fn next(&mut self, moment: Moment, step: u64) -> Result<Option<Fault>> {
        let due = |injection: &Injection| injection.step == step && injection.fault.moment() == moment;
        let Some(index) = self.pending.iter().position(due) else { return Ok(None) };
        let injection = self.pending.swap_remove(index);
        tracing::warn!("--inject {injection}");
        self.note(&injection).or_kind(Kind::Internal, format!("noting an --inject in {}", self.record.display()))?;
        Ok(Some(injection.fault))
    }

    fn note(&self, injection: &Injection) -> io::Result<()> {
        // Another host may not have the directory yet.
        fs::create_dir_all(self.record.parent().unwrap_or(Path::new(".")))?;
        let mut record = OpenOptions::new().append(true).create(true).open(&self.record)?;
        record.write_all(format!("{injection}\n").as_bytes())
    }
}

/// Each host may have a directory of its own. No rank notes anything before all have come this far.
fn begin_record(record: &Path, world: &World) -> io::Result<()> {
    if world.local_rank == 0 { fs::remove_file(record) } else { Ok(()) }
}
