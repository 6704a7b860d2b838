//! What ends a run, and what is said where it had ended before.

use super::Rank;
use super::checkpoint;
use super::gradient::Sums;
use super::learner::Learner;
use super::resume::Progress;
use super::update::export_params;
use crate::config::raw::Config;
use crate::device::SliceMut;
use crate::error::Result;
use crate::report::{self, StoppedBy};
use std::path::Path;

/// Any rank's signal, or end of its time, ends the run on all ranks, after the same step.
pub fn asked_to_end(sums: &Sums) -> Option<StoppedBy> {
    match sums {
        sums if sums.signal().is_some() => Some(StoppedBy::Signal),
        sums if sums.time_limit > 0.0 => Some(StoppedBy::TimeLimit),
        sums if sums.deadline > 0.0 => Some(StoppedBy::MaxMinutes),
        _ => None,
    }
}

/// Which of `[run]`'s ends has come, if one has.
pub fn end_of(config: &Config, progress: &Progress) -> Option<StoppedBy> {
    let reached = |target: f64| progress.best_accuracy.is_some_and(|best| best >= target);
    if config.run.target_accuracy.is_some_and(reached) {
        Some(StoppedBy::TargetAccuracy)
    } else if config.run.epochs.is_some_and(|epochs| u64::from(progress.position.epoch) >= epochs) {
        Some(StoppedBy::Epochs)
    } else if config.run.steps.is_some_and(|steps| progress.step >= steps) {
        Some(StoppedBy::Steps)
    } else {
        None
    }
}

/// Whether the results of these weights, the run's last, are written: what rank 0 finds holds for all. Collective.
pub fn has_results(directory: &Path, rank: &Rank, learner: &mut Learner) -> Result<bool> {
    let written = rank.world.rank == 0
        && report::has_results(directory, &checkpoint::weights_digest(&export_params(&learner.net)?));
    let mut found = [f32::from(u8::from(written))];
    learner.gradient.reducer().with(|comm, _| comm.broadcast(SliceMut::from(&mut found[..]), 0))?;
    Ok(found == [1.0])
}

/// The run had ended before it began.
pub fn say_complete(config: &Config, end: StoppedBy, progress: &Progress, directory: &Path, anew: &str) {
    let (done, more) = match end {
        StoppedBy::TargetAccuracy => ("has reached run.target_accuracy".to_owned(), "run.target_accuracy=..."),
        StoppedBy::Steps => (format!("has done its {} steps", progress.step), "run.steps=..."),
        _ => (format!("has done its {} epochs ({} steps)", progress.position.epoch, progress.step), "run.epochs=..."),
    };
    report::print(format_args!(
        "the run `{}` is complete: it {done}; results are in {}\nto go on: --set {more}; to begin anew: {anew}, or \
         another --out",
        config.run.name,
        directory.join("summary.json").display()
    ));
}
