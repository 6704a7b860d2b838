//! Where a run begins: at its first step, or where its newest checkpoint stands.
//!
//! Rank 0 alone decides that, reads the checkpoint and hands everything on, so the ranks cannot disagree, and the folder
//! need not be seen by every node.
//!
//! `--resume none` and `--resume PATH` begin the run anew, once. The same command comes again when a job is requeued or when
//! `trainer -n` starts its ranks again, and then it has to go on with what it has begun. So a run that begins anew moves
//! aside the checkpoints that are not its own past, then notes its job beside those to come, in `job.json`, and then trains.
//! A later start of that job goes on with the newest of them. One that was killed before the note has begun nothing: its
//! next start finds another's note or none, and begins anew.

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
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Beside the checkpoints: the job that has begun their run anew.
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

/// Whether `job` is to begin the run anew, and has not done so already.
pub fn is_anew(resume: &Resume, job: &Job, folder: &Path) -> Result<bool> {
    if *resume == Resume::Auto {
        return Ok(false);
    }
    let path = folder.join(BEGUN_BY);
    let note = match fs::read(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(true),
        note => note.or_kind(Kind::Data, format!("{} cannot be read", path.display()))?,
    };
    let begun_by = serde_json::from_slice(&note).or_kind(
        Kind::Data,
        format!("{} does not say which job has begun the run; remove it, and the run begins anew", path.display()),
    )?;
    Ok(!job.is_again(&begun_by))
}

/// Finds the checkpoint in `folder` to go on from. `beginner` is this job where it begins the run anew (`agree_on_anew`).
/// `fits` says whether a state is of this net and optimizer. Rank 0 only. Nothing is lost: what the run would overwrite is
/// moved aside, and checkpoints that cannot be used stop it.
pub fn find(
    resume: &Resume,
    beginner: Option<&Job>,
    folder: &Path,
    config: &Config,
    fits: impl Fn(&State) -> Result<()>,
) -> Result<Option<(PathBuf, State)>> {
    match (resume, beginner) {
        (Resume::Never, Some(job)) => {
            begin(job, folder, None)?;
            Ok(None)
        }
        (Resume::Auto | Resume::Never, _) => newest(folder, config, fits),
        (Resume::From(path), _) => {
            // PATH itself may be gone once newer ones were saved.
            let own = if beginner.is_none() { checkpoint::newest(folder, fits)? } else { None };
            let (path, state) = match own {
                Some(own) => own,
                None => (path.clone(), load(path)?),
            };
            let different = differences(&state, config)?;
            if !different.is_empty() {
                tracing::warn!("{} was saved with another configuration: {}", path.display(), different.join(", "));
            }
            if let Some(job) = beginner {
                begin(job, folder, same_file(&path, &checkpoint::path(folder, state.step)).then_some(state.step))?;
            }
            Ok(Some((path, state)))
        }
    }
}

fn load(path: &Path) -> Result<State> {
    checkpoint::load(path).map_err(|e| e.context(format!("checkpoint {}", path.display())))
}

/// Empties `folder` for the run that `job` begins, but for its past: checkpoints up to this step.
fn begin(job: &Job, folder: &Path, past: Option<u64>) -> Result<()> {
    move_aside(folder, past)?;
    let path = folder.join(BEGUN_BY);
    let note = serde_json::to_vec_pretty(job).or_kind(Kind::Internal, "this job")?;
    atomic_file::replace(&path, &note).or_kind(Kind::Internal, format!("writing {}", path.display()))
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

/// Moves the checkpoints after step `past`, or all, from `checkpoints` to `checkpoints.1`, or the first number that is free.
fn move_aside(folder: &Path, past: Option<u64>) -> Result<()> {
    let mut aside = checkpoint::list(folder)?;
    aside.retain(|(step, _)| past.is_none_or(|past| *step > past));
    if aside.is_empty() {
        return Ok(());
    }
    let moving = || format!("moving the checkpoints in {} aside", folder.display());
    // A link may lead to another file system, to which nothing can be moved.
    let real = folder.canonicalize().or_kind(Kind::Internal, moving())?;
    let numbered = |n: u32| {
        let mut name = real.as_os_str().to_owned();
        name.push(format!(".{n}"));
        PathBuf::from(name)
    };
    let to = (1..).map(numbered).find(|path| !path.exists()).expect("there is always a next number");
    fs::create_dir(&to).or_kind(Kind::Internal, moving())?;
    for name in aside.iter().filter_map(|(_, path)| path.file_name()) {
        fs::rename(folder.join(name), to.join(name)).or_kind(Kind::Internal, moving())?;
    }
    // What is written from here on must not come to the disk before this.
    File::open(folder).and_then(|folder| folder.sync_all()).or_kind(Kind::Internal, moving())?;
    tracing::info!("the earlier checkpoints are now in {}", to.display());
    Ok(())
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

    /// A run's checkpoints, and what they hold.
    struct Run {
        root: tempfile::TempDir,
        config: Config,
    }

    impl Run {
        fn new(saved: &[u64]) -> Run {
            let text = r#"
                run = { name = "r", steps = 40 }
                data = { format = "shapes", train = 64, test = 32 }
                batch = { global = 16 }
                model = { input = [32, 32, 3], layers = [{ type = "linear", units = 10 }] }
                optimizer = { type = "sgd", lr = 0.1 }
            "#;
            let root = tempfile::tempdir().unwrap();
            let file = root.path().join("config.toml");
            fs::write(&file, text).unwrap();
            let run = Run { root, config: config::load(&file, &[]).unwrap() };
            saved.iter().for_each(|&step| drop(run.save("checkpoints", 9, step)));
            run
        }

        fn folder(&self) -> PathBuf {
            self.root.path().join("checkpoints")
        }

        fn save(&self, folder: &str, keep: usize, step: u64) -> PathBuf {
            let config = self.config.resolved().to_string();
            let state = State { run: "r".into(), config, world_size: 1, step, ..State::default() };
            checkpoint::save(&self.root.path().join(folder), keep, &state).unwrap()
        }

        /// The step from which a start of this job goes on; 0 is the beginning.
        fn start(&self, resume: &Resume, job: &Job) -> u64 {
            let anew = is_anew(resume, job, &self.folder()).unwrap();
            let found = find(resume, anew.then_some(job), &self.folder(), &self.config, |_| Ok(())).unwrap();
            found.map_or(0, |(_, state)| state.step)
        }

        fn steps(&self, folder: &str) -> Vec<u64> {
            checkpoint::steps(&self.root.path().join(folder)).unwrap()
        }
    }

    fn launch(name: &str) -> Job {
        Job { launch: Some(name.into()), ..Job::default() }
    }

    #[test]
    fn a_job_begins_its_run_once_and_then_goes_on_with_it() {
        let run = Run::new(&[10, 20]);
        for _ in 0..2 {
            assert_eq!(run.start(&Resume::Never, &launch("a")), 0);
            assert_eq!((run.steps("checkpoints"), run.steps("checkpoints.1")), (vec![], vec![20, 10]));
        }
        run.save("checkpoints", 9, 5);
        assert_eq!(run.start(&Resume::Never, &launch("a")), 5);
        assert_eq!(run.start(&Resume::Auto, &launch("b")), 5);
        assert_eq!(run.start(&Resume::Never, &launch("b")), 0);
        assert_eq!(run.steps("checkpoints.2"), [5]);
        // Nobody knows it again.
        run.save("checkpoints", 9, 7);
        for _ in 0..2 {
            assert_eq!(run.start(&Resume::Never, &Job::default()), 0);
        }
        assert_eq!((run.steps("checkpoints.3"), run.steps("checkpoints.4")), (vec![7], vec![]));
    }

    #[test]
    fn a_start_that_was_killed_before_it_noted_its_job_has_begun_nothing() {
        let run = Run::new(&[10, 20]);
        assert_eq!(run.start(&Resume::Never, &launch("earlier")), 0);
        run.save("checkpoints", 9, 15);
        run.save("checkpoints", 9, 30);
        // Killed amid, then behind, the moving.
        move_aside(&run.folder(), Some(15)).unwrap();
        assert_eq!(run.start(&Resume::Never, &launch("a")), 0);
        assert_eq!([2, 3].map(|n| run.steps(&format!("checkpoints.{n}"))), [[30], [15]]);
        fs::remove_file(run.folder().join(BEGUN_BY)).unwrap();
        assert_eq!(run.start(&Resume::Never, &launch("a")), 0);
    }

    #[test]
    fn a_run_from_one_of_its_own_checkpoints_keeps_it_and_what_was_before() {
        let run = Run::new(&[5, 10, 20, 30]);
        let from = Resume::From(checkpoint::path(&run.folder(), 10));
        for _ in 0..2 {
            assert_eq!(run.start(&from, &launch("a")), 10);
            assert_eq!((run.steps("checkpoints"), run.steps("checkpoints.1")), (vec![10, 5], vec![30, 20]));
        }
        run.save("checkpoints", 1, 20);
        assert_eq!(run.steps("checkpoints"), [20]);
        assert_eq!(run.start(&from, &launch("a")), 20);
    }

    #[test]
    fn a_run_from_a_checkpoint_elsewhere_begins_with_none_of_its_own() {
        let run = Run::new(&[10]);
        let from = Resume::From(run.save("elsewhere", 9, 50));
        for _ in 0..2 {
            assert_eq!(run.start(&from, &launch("a")), 50);
            assert_eq!((run.steps("checkpoints"), run.steps("checkpoints.1")), (vec![], vec![10]));
        }
        run.save("checkpoints", 9, 60);
        assert_eq!(run.start(&from, &launch("a")), 60);
    }

    #[test]
    fn a_note_that_cannot_be_read_is_named() {
        let run = Run::new(&[10]);
        fs::write(run.folder().join(BEGUN_BY), "{").unwrap();
        let error = is_anew(&Resume::Never, &launch("a"), &run.folder()).unwrap_err();
        assert!(error.kind() == Kind::Data && error.to_string().contains("job.json does not say"), "{error}");
        assert_eq!(run.start(&Resume::Auto, &launch("a")), 10);
    }
}
