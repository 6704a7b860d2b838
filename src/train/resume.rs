//! Where a run begins: at its first step, or where its newest checkpoint stands.
//!
//! Rank 0 alone reads the checkpoint and hands everything on, so the ranks cannot disagree, and the folder need not be
//! seen by every node.

use super::Options;
use super::checkpoint::{self, State};
use super::learner::Learner;
use crate::config::{self, raw::Config};
use crate::data::queue::Position;
use crate::device::SliceMut;
use crate::error::{Context, Error, Kind, Result};
use std::path::{Path, PathBuf};

/// `--resume`
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// From the newest checkpoint of this run's directory, if there is one.
    Auto,
    /// From the beginning; checkpoints that are there are moved aside.
    Never,
    /// From this checkpoint, whatever its configuration.
    From(PathBuf),
}

/// How far a run has come.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Updates done.
    pub step: u64,
    /// Epochs completed, and samples of the next one.
    pub position: Position,
    /// Best accuracy on the watched set, 0 to 1.
    pub best_accuracy: Option<f64>,
}

impl Progress {
    /// The epoch, from 0, to which the last step belonged.
    pub fn latest_epoch(&self) -> u64 {
        let Position { epoch, consumed } = self.position;
        u64::from(if consumed == 0 { epoch.saturating_sub(1) } else { epoch })
    }
}

/// Finds the checkpoint in `folder` to go on from. `fits` says whether a state is of this net and optimizer. Rank 0 only.
/// Nothing is lost: what the run would overwrite is moved aside, and checkpoints that cannot be used stop it.
/// A run that its launcher has started again goes on with what it has saved since it began.
pub fn find(
    options: &Options,
    folder: &Path,
    config: &Config,
    fits: impl Fn(&State) -> Result<()>,
) -> Result<Option<(PathBuf, State)>> {
    match &options.resume {
        Resume::Never if options.begins_anew() => {
            move_aside(folder)?;
            Ok(None)
        }
        Resume::From(path) => {
            let state = checkpoint::load(path).map_err(|e| e.context(format!("checkpoint {}", path.display())))?;
            let different = differences(&state, config)?;
            if !different.is_empty() {
                tracing::warn!("{} was saved with another configuration: {}", path.display(), different.join(", "));
            }
            if checkpoint::steps(folder)?.first().is_some_and(|&newest| newest > state.step) {
                if options.restarted {
                    return newest(folder, config, fits);
                }
                move_aside(folder)?;
            }
            Ok(Some((path.clone(), state)))
        }
        Resume::Auto | Resume::Never => newest(folder, config, fits),
    }
}

fn newest(folder: &Path, config: &Config, fits: impl Fn(&State) -> Result<()>) -> Result<Option<(PathBuf, State)>> {
    // One of another configuration is not skipped: it would be overwritten.
    let accept = |state: &State| if differences(state, config)?.is_empty() { fits(state) } else { Ok(()) };
    let Some((path, state)) = checkpoint::newest(folder, accept)? else {
        return match checkpoint::steps(folder)?.is_empty() {
            true => Ok(None),
            false => Err(Error::data(format!(
                "none of the checkpoints in {} can be used, for the reasons above; to begin anew: --resume none, which \
                 moves them aside",
                folder.display()
            ))),
        };
    };
    let different = differences(&state, config)?;
    if different.is_empty() {
        return Ok(Some((path, state)));
    }
    Err(Error::usage(format!(
        "{} was saved with another configuration ({}); to begin anew: --resume none, or another --out; to go on from it \
         all the same: --resume {}",
        path.display(),
        different.join(", "),
        path.display()
    )))
}

/// Puts every rank where `found` stands, of which only rank 0 knows. Collective.
pub fn distribute(found: Option<&State>, learner: &mut Learner) -> Result<Progress> {
    if let Some(state) = found {
        learner.fits(state)?;
    }
    let mut header = encode(found);
    learner.gradient.reducer().with(|comm, _| comm.broadcast(SliceMut::from(&mut header[..]), 0))?;
    let progress = decode(&header);
    if progress.step > 0 {
        learner.import(found)?;
    }
    Ok(progress)
}

/// What of the configuration a checkpoint was saved with would make going on from it a different run.
fn differences(state: &State, config: &Config) -> Result<Vec<String>> {
    let saved = state.config.parse().or_kind(Kind::Data, "the checkpoint's configuration cannot be read")?;
    Ok(config::difference(&saved, &config.resolved()))
}

/// `checkpoints` becomes `checkpoints.1`, or the first number that is free.
fn move_aside(folder: &Path) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    let numbered = |n: u32| {
        let mut name = folder.as_os_str().to_owned();
        name.push(format!(".{n}"));
        PathBuf::from(name)
    };
    let to = (1..).map(numbered).find(|path| !path.exists()).expect("there is always a next number");
    std::fs::rename(folder, &to).or_kind(Kind::Internal, format!("moving {} aside", folder.display()))?;
    tracing::info!("the earlier checkpoints are now in {}", to.display());
    Ok(())
}

/// A `Progress` as words that collectives carry; each f32 is 32 bits of an integer, never a number.
fn encode(found: Option<&State>) -> [f32; 8] {
    let Some(state) = found else { return [0.0; 8] };
    let accuracy = state.best_accuracy.unwrap_or(f64::NAN);
    let words = [state.step, state.epoch, state.samples, accuracy.to_bits()];
    let halves = words.map(|word| [f32::from_bits(word as u32), f32::from_bits((word >> 32) as u32)]);
    std::array::from_fn(|i| halves[i / 2][i % 2])
}

fn decode(header: &[f32; 8]) -> Progress {
    let word = |i: usize| u64::from(header[2 * i].to_bits()) | u64::from(header[2 * i + 1].to_bits()) << 32;
    let accuracy = f64::from_bits(word(3));
    Progress {
        step: word(0),
        position: Position { epoch: word(1) as u32, consumed: word(2) as usize },
        best_accuracy: Some(accuracy).filter(|accuracy| accuracy.is_finite() && word(0) > 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_survives_the_broadcast() {
        let state = State {
            run: "r".into(),
            config: String::new(),
            seed: 1,
            world_size: 2,
            step: 1 << 40 | 7,
            epoch: 3,
            samples: 0x7fc0_0001,
            best_accuracy: Some(0.75),
            data: None,
            tensors: Vec::new(),
        };
        let progress = decode(&encode(Some(&state)));
        assert_eq!((progress.step, progress.best_accuracy), (state.step, Some(0.75)));
        assert_eq!(progress.position, Position { epoch: 3, consumed: 0x7fc0_0001 });
        assert_eq!(decode(&encode(None)), Progress::default());
    }

    #[test]
    fn what_is_there_is_moved_and_never_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("checkpoints");
        for n in 1..3 {
            std::fs::create_dir(&folder).unwrap();
            std::fs::write(folder.join("a"), n.to_string()).unwrap();
            move_aside(&folder).unwrap();
            let moved = root.path().join(format!("checkpoints.{n}/a"));
            assert_eq!(std::fs::read_to_string(moved).unwrap(), n.to_string());
        }
        move_aside(&folder).unwrap();
    }
}
