//! Where a run begins: at its first step, or where its newest checkpoint stands.
//!
//! Rank 0 alone decides that, reads the checkpoint and hands everything on, so the ranks cannot disagree, and the folder
//! need not be seen by every node.
//!
//! `--resume none` and `--resume PATH` begin the run anew, once. The same command comes again when a job is requeued or when
//! a launcher starts its ranks again, and then it has to go on with what it has begun. So a run that begins anew moves the
//! earlier checkpoints aside, then notes its job beside those to come, and then trains. The note, `job.json`, lists the jobs
//! that have begun a run in this folder, each by its latest start; the last one's run is there now. A later start of that
//! job (`Job::is_again`) goes on with it. A later start of another one is refused, as its run was moved aside. Any other
//! start begins anew, also one of a job that was killed before its note: it has begun nothing.

use super::checkpoint::{self, State};
use super::learner::Learner;
use crate::atomic_file;
use crate::comm::Communicator;
use crate::config::{self, raw::Config};
use crate::data::queue::Position;
use crate::device::SliceMut;
use crate::error::{Context, Error, Kind, Result};
use crate::launch::job::Job;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// Beside the checkpoints: the jobs that have begun a run there.
const BEGUN_BY: &str = "job.json";

/// `--resume`
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// From the newest checkpoint of this run's directory, if there is one.
    Auto,
    /// From the beginning, once a job; checkpoints that are there are moved aside.
    Never,
    /// From this checkpoint, once a job, whatever its configuration.
    From(PathBuf),
}

impl Resume {
    /// What to give in order to go on from `saved`, or from whatever was.
    pub fn again(&self, saved: Option<&Path>) -> &'static str {
        match self {
            Resume::Auto => "the same command",
            // The run itself has saved nothing yet.
            Resume::From(path) if saved == Some(path) => "the same command",
            Resume::Never | Resume::From(_) => "--resume auto",
        }
    }

    /// What to do in order to begin the run anew whose checkpoints are in `folder`.
    pub fn to_begin_anew(&self, folder: &Path) -> String {
        match self {
            Resume::Auto | Resume::From(_) => "--resume none".into(),
            // It was given, and has done so once.
            Resume::Never => format!("remove {}", folder.join(BEGUN_BY).display()),
        }
    }
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

/// Whether the run begins anew: what rank 0 finds in `folder` holds for all. Collective.
pub fn agree_on_anew(resume: &Resume, job: &Job, folder: &Path, comm: &mut dyn Communicator) -> Result<bool> {
    let anew = comm.rank() == 0 && is_anew(resume, job, folder)?;
    let mut flag = [f32::from(u8::from(anew))];
    comm.broadcast(SliceMut::from(&mut flag[..]), 0)?;
    Ok(flag == [1.0])
}

/// Whether `job` is to begin the run anew, and has not done so already. An error (kind Usage) where another job has, since.
fn is_anew(resume: &Resume, job: &Job, folder: &Path) -> Result<bool> {
    if *resume == Resume::Auto {
        return Ok(false);
    }
    let begun = begun_by(folder)?;
    let Some((last, earlier)) = begun.split_last() else { return Ok(true) };
    if job.is_again(last) {
        return Ok(false);
    }
    match earlier.iter().find(|first| job.is_again(first)) {
        None => Ok(true),
        Some(_) => Err(Error::usage(format!(
            "the run in {} is no longer that of {job}, which is started again: {last} has begun another there since, and \
             moved the earlier checkpoints aside; give each an --out of its own, or go on with the other's: --resume auto",
            folder.display()
        ))),
    }
}

/// Step of the newest checkpoint, whole or not, from which the next start of `job` goes on.
pub fn newest_step(resume: &Resume, job: &Job, folder: &Path) -> Result<Option<u64>> {
    let anew = is_anew(resume, job, folder)?;
    let goes_on_from = |step: &u64| match resume {
        Resume::From(path) if anew => same_file(path, &checkpoint::path(folder, *step)),
        _ => !anew,
    };
    Ok(checkpoint::steps(folder)?.into_iter().find(goes_on_from))
}

/// Finds the checkpoint in `folder` to go on from, and takes possession of the folder for `job`, which begins the run `anew`
/// or goes on (`agree_on_anew`). `fits` says whether a state is of this net and optimizer. Rank 0 only. Nothing is lost: what
/// the run would overwrite is moved aside, and checkpoints that cannot be used stop it before anything is touched.
pub fn find(
    resume: &Resume,
    (job, anew): (&Job, bool),
    folder: &Path,
    config: &Config,
    fits: impl Fn(&State) -> Result<()>,
) -> Result<Option<(PathBuf, State)>> {
    let found = match resume {
        Resume::Never if anew => None,
        Resume::Auto | Resume::Never => newest(resume, folder, config, fits)?,
        Resume::From(path) => {
            // PATH itself may be gone once newer ones were saved.
            let own = if anew { None } else { checkpoint::newest(folder, &fits)? };
            let (path, state) = own.map_or_else(|| Ok((path.clone(), load(path, &fits)?)), Ok)?;
            let different = differences(&state, config)?;
            if !different.is_empty() {
                tracing::warn!("{} was saved with another configuration: {}", path.display(), different.join(", "));
            }
            Some((path, state))
        }
    };
    if anew {
        let own = found.as_ref().filter(|(path, state)| same_file(path, &checkpoint::path(folder, state.step)));
        move_aside(folder, own.map(|(_, state)| state.step))?;
    }
    if *resume != Resume::Auto {
        note(job, folder)?;
    }
    Ok(found)
}

fn load(path: &Path, fits: impl Fn(&State) -> Result<()>) -> Result<State> {
    let state = checkpoint::load(path).and_then(|state| fits(&state).map(|()| state));
    state.map_err(|error| error.context(format!("checkpoint {}", path.display())))
}

fn newest(
    resume: &Resume,
    folder: &Path,
    config: &Config,
    fits: impl Fn(&State) -> Result<()>,
) -> Result<Option<(PathBuf, State)>> {
    // One of another configuration is not skipped: it would be overwritten.
    let accept = |state: &State| if differences(state, config)?.is_empty() { fits(state) } else { Ok(()) };
    let anew = resume.to_begin_anew(folder);
    let Some((path, state)) = checkpoint::newest(folder, accept)? else {
        return match checkpoint::steps(folder)?.is_empty() {
            true => Ok(None),
            false => Err(Error::data(format!(
                "none of the checkpoints in {} can be used, for the reasons above; to begin anew, with these moved aside: \
                 {anew}",
                folder.display()
            ))),
        };
    };
    let different = differences(&state, config)?;
    if different.is_empty() {
        return Ok(Some((path, state)));
    }
    Err(Error::usage(format!(
        "{} was saved with another configuration ({}); to begin anew: {anew}, or another --out; to go on from it all the \
         same: --resume {}",
        path.display(),
        different.join(", "),
        path.display()
    )))
}

/// The jobs that have begun a run in `folder`, the newest last.
fn begun_by(folder: &Path) -> Result<Vec<Job>> {
    let path = folder.join(BEGUN_BY);
    let note = match fs::read(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        note => note.or_kind(Kind::Data, format!("{} cannot be read", path.display()))?,
    };
    serde_json::from_slice(&note).or_kind(
        Kind::Data,
        format!("{} does not say which job has begun the run; remove it, and the run begins anew", path.display()),
    )
}

/// The run in `folder` is that of `job` from here on, and this is its latest start: another command in the same start of a
/// batch job is none of its.
fn note(job: &Job, folder: &Path) -> Result<()> {
    let mut begun = begun_by(folder)?;
    // One that says nothing of itself is never known again.
    begun.retain(|first| !job.is_again(first) && *first != Job::default());
    begun.push(job.clone());
    let path = folder.join(BEGUN_BY);
    let note = serde_json::to_vec_pretty(&begun).or_kind(Kind::Internal, "this job")?;
    atomic_file::replace(&path, &note).or_kind(Kind::Internal, format!("writing {}", path.display()))
}

/// Puts every rank where `found` stands, which fits and of which only rank 0 knows. Collective.
pub fn distribute(found: Option<&State>, learner: &mut Learner) -> Result<Progress> {
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

/// Moves the checkpoints from `checkpoints` to `checkpoints.1`, or the first number that is free. Those up to step `past` are
/// the new run's too, which will remove them as it saves: they get a second name there.
fn move_aside(folder: &Path, past: Option<u64>) -> Result<()> {
    let earlier = checkpoint::list(folder)?;
    if earlier.is_empty() {
        return Ok(());
    }
    // A link may lead to another file system, to which nothing can be moved.
    let moving = || format!("moving the checkpoints in {} aside", folder.display());
    let real = folder.canonicalize().or_kind(Kind::Internal, moving())?;
    let numbered = |n: u32| {
        let mut name = real.as_os_str().to_owned();
        name.push(format!(".{n}"));
        PathBuf::from(name)
    };
    let to = (1..).map(numbered).find(|path| !path.exists()).expect("there is always a next number");
    let move_all = || -> io::Result<()> {
        fs::create_dir(&to)?;
        for (step, from) in &earlier {
            let new = to.join(from.file_name().expect("listed by its name"));
            match past {
                Some(past) if *step <= past => link_or_copy(from, &new)?,
                _ => fs::rename(from, new)?,
            }
        }
        // No name may be gone from the disk before it is there anew, and what is written from here on must not come first.
        [Some(&*to), real.parent(), Some(&real)].into_iter().flatten().try_for_each(sync)
    };
    move_all().or_kind(Kind::Internal, moving())?;
    tracing::info!("the earlier checkpoints are now in {}", to.display());
    Ok(())
}

fn link_or_copy(from: &Path, to: &Path) -> io::Result<()> {
    // Not every file system has links.
    fs::hard_link(from, to).or_else(|_| fs::copy(from, to).and_then(|_| sync(to)))
}

fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn same_file(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
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
mod tests;
