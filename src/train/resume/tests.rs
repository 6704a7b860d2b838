use super::*;
use crate::launch::job::Start;

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
        loss_scale: None,
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
        self.try_start(resume, job, |_| Ok(())).unwrap()
    }

    fn try_start(&self, resume: &Resume, job: &Job, fits: impl Fn(&State) -> Result<()>) -> Result<u64> {
        let anew = is_anew(resume, job, &self.folder())?;
        let found = find(resume, (job, anew), &self.folder(), &self.config, fits)?;
        Ok(found.map_or(0, |(_, state)| state.step))
    }

    fn newest_step(&self, resume: &Resume, job: &Job) -> Option<u64> {
        newest_step(resume, job, &self.folder()).unwrap()
    }

    fn steps(&self, folder: &str) -> Vec<u64> {
        checkpoint::steps(&self.root.path().join(folder)).unwrap()
    }
}

fn launch(id: &str, restarts: u64) -> Job {
    Job { launch: Some(Start { id: id.into(), restarts, time: None }), ..Job::default() }
}

fn slurm(id: &str, restarts: u64) -> Job {
    Job { slurm: Some(Start { id: id.into(), restarts, time: None }), ..Job::default() }
}

#[test]
fn a_job_begins_its_run_once_and_then_goes_on_with_it() {
    let run = Run::new(&[10, 20]);
    for restarts in [0, 1] {
        assert_eq!(run.start(&Resume::Never, &launch("a", restarts)), 0);
        assert_eq!((run.steps("checkpoints"), run.steps("checkpoints.1")), (vec![], vec![20, 10]));
    }
    run.save("checkpoints", 9, 5);
    assert_eq!(run.start(&Resume::Never, &launch("a", 2)), 5);
    assert_eq!(run.start(&Resume::Auto, &launch("b", 0)), 5);
    assert_eq!(run.start(&Resume::Never, &launch("b", 0)), 0);
    assert_eq!(run.steps("checkpoints.2"), [5]);
    // Nobody knows it again.
    run.save("checkpoints", 9, 7);
    for _ in 0..2 {
        assert_eq!(run.start(&Resume::Never, &Job::default()), 0);
    }
    assert_eq!((run.steps("checkpoints.3"), run.steps("checkpoints.4")), (vec![7], vec![]));
}

#[test]
fn the_next_command_of_a_requeued_job_begins_anew() {
    let run = Run::new(&[]);
    assert_eq!(run.start(&Resume::Never, &slurm("7", 0)), 0);
    run.save("checkpoints", 9, 5);
    assert_eq!(run.start(&Resume::Never, &slurm("7", 1)), 5);
    assert_eq!(run.start(&Resume::Never, &slurm("7", 1)), 0);
    run.save("checkpoints", 9, 3);
    assert_eq!(run.start(&Resume::Never, &slurm("7", 2)), 3);
    assert_eq!(run.start(&Resume::Never, &slurm("7", 2)), 0);
}

#[test]
fn a_start_that_was_killed_before_it_noted_its_job_has_begun_nothing() {
    let run = Run::new(&[10, 20]);
    assert_eq!(run.start(&Resume::Never, &launch("earlier", 0)), 0);
    run.save("checkpoints", 9, 15);
    run.save("checkpoints", 9, 30);
    // Killed amid, then behind, the moving.
    fs::create_dir(run.root.path().join("checkpoints.2")).unwrap();
    let to = run.root.path().join("checkpoints.2/step-00000030.safetensors");
    fs::rename(checkpoint::path(&run.folder(), 30), to).unwrap();
    assert_eq!(run.start(&Resume::Never, &launch("a", 1)), 0);
    assert_eq!([2, 3].map(|n| run.steps(&format!("checkpoints.{n}"))), [[30], [15]]);
    fs::remove_file(run.folder().join(BEGUN_BY)).unwrap();
    assert_eq!(run.start(&Resume::Never, &launch("a", 2)), 0);
}

#[test]
fn a_later_start_of_a_job_whose_run_was_moved_aside_is_refused() {
    let run = Run::new(&[]);
    for id in ["a", "b", "c"] {
        assert_eq!(run.start(&Resume::Never, &launch(id, 0)), 0);
        run.save("checkpoints", 9, 5);
    }
    for id in ["a", "b"] {
        let error = run.try_start(&Resume::Never, &launch(id, 1), |_| Ok(())).unwrap_err();
        let words =
            format!("no longer that of trainer -n {id}, which is started again: trainer -n c has begun another");
        assert!(error.kind() == Kind::Usage && error.to_string().contains(&words), "{error}");
    }
    assert_eq!(run.start(&Resume::Never, &launch("c", 1)), 5);
    assert_eq!(run.steps("checkpoints"), [5]);
}

#[test]
fn a_run_from_one_of_its_own_checkpoints_leaves_the_earlier_run_whole() {
    let run = Run::new(&[5, 10, 20, 30]);
    let from = Resume::From(checkpoint::path(&run.folder(), 10));
    for restarts in [0, 1] {
        assert_eq!(run.start(&from, &launch("a", restarts)), 10);
        assert_eq!(run.steps("checkpoints"), [10, 5]);
    }
    run.save("checkpoints", 1, 20);
    assert_eq!((run.steps("checkpoints"), run.steps("checkpoints.1")), (vec![20], vec![30, 20, 10, 5]));
    assert_eq!(run.start(&from, &launch("a", 2)), 20);
}

#[test]
fn a_run_from_a_checkpoint_elsewhere_begins_with_none_of_its_own() {
    let run = Run::new(&[10]);
    let from = Resume::From(run.save("elsewhere", 9, 50));
    for restarts in [0, 1] {
        assert_eq!(run.start(&from, &launch("a", restarts)), 50);
        assert_eq!((run.steps("checkpoints"), run.steps("checkpoints.1")), (vec![], vec![10]));
    }
    run.save("checkpoints", 9, 60);
    assert_eq!(run.start(&from, &launch("a", 2)), 60);
}

#[test]
fn a_checkpoint_that_does_not_fit_stops_the_run_before_anything_is_touched() {
    let run = Run::new(&[10, 20]);
    for from in [checkpoint::path(&run.folder(), 10), run.save("elsewhere", 9, 50)] {
        let unfit = |_: &State| Err(Error::data("it was saved by another net"));
        let error = run.try_start(&Resume::From(from.clone()), &launch("a", 0), unfit).unwrap_err();
        assert_eq!(error.to_string(), format!("checkpoint {}: it was saved by another net", from.display()));
        assert_eq!(run.steps("checkpoints"), [20, 10]);
        assert!(!run.folder().join(BEGUN_BY).exists() && !run.root.path().join("checkpoints.1").exists());
    }
}

/// By it a launcher knows whether its ranks have saved anything.
#[test]
fn the_newest_checkpoint_of_a_run_that_begins_anew_is_the_one_it_begins_from() {
    let run = Run::new(&[5, 10, 20]);
    let own = Resume::From(checkpoint::path(&run.folder(), 10));
    let elsewhere = Resume::From(run.save("elsewhere", 9, 10));
    let steps = |job: &Job| [&own, &elsewhere, &Resume::Never, &Resume::Auto].map(|from| run.newest_step(from, job));
    assert_eq!(steps(&launch("a", 0)), [Some(10), None, None, Some(20)]);
    run.start(&own, &launch("a", 0));
    assert_eq!(steps(&launch("a", 1)), [Some(10); 4]);
    run.save("checkpoints", 9, 15);
    assert_eq!(steps(&launch("a", 1)), [Some(15); 4]);
}

#[test]
fn whoever_gave_resume_none_is_not_told_to() {
    let run = Run::new(&[]);
    run.start(&Resume::Never, &launch("a", 0));
    let path = run.save("checkpoints", 9, 5);
    let other = State { config: run.config.resolved().to_string().replace("0.1", "0.2"), step: 6, ..State::default() };
    checkpoint::save(&run.folder(), 9, &other).unwrap();
    let refusal = |resume| run.try_start(resume, &launch("a", 1), |_| Ok(())).unwrap_err().to_string();
    assert!(refusal(&Resume::Auto).contains("; to begin anew: --resume none, or another --out; "));
    let note = run.folder().join(BEGUN_BY).display().to_string();
    assert!(refusal(&Resume::Never).contains(&format!("; to begin anew: remove {note}, or another --out; ")));
    assert_eq!(Resume::Auto.again(Some(&path)), "the same command");
    assert_eq!(Resume::From(path.clone()).again(Some(&path)), "the same command");
    assert_eq!(Resume::From("elsewhere".into()).again(Some(&path)), "--resume auto");
}

#[test]
fn a_note_that_cannot_be_read_is_named() {
    let run = Run::new(&[10]);
    fs::write(run.folder().join(BEGUN_BY), "{").unwrap();
    let error = is_anew(&Resume::Never, &launch("a", 0), &run.folder()).unwrap_err();
    assert!(error.kind() == Kind::Data && error.to_string().contains("job.json does not say"), "{error}");
    assert_eq!(run.start(&Resume::Auto, &launch("a", 0)), 10);
}
