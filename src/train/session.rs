//! The loop over steps: train, log, evaluate, save, until one of `[run]`'s ends comes.

use super::audit::Audit;
use super::checkpoint::{self, State};
use super::ending::{asked_to_end, end_of, has_results, say_complete};
use super::eval::Evaluator;
use super::feed::Feed;
use super::gradient::Sums;
use super::inject::{self, Faults};
use super::learner::{Done, Learner, Step};
use super::memory::Need;
use super::resume::{self, Progress, Resume};
use super::time_limit::TimeLimit;
use super::update::export_params;
use super::{Options, Rank, gpus, setup};
use crate::comm::Communicator;
use crate::config::plan::Plan;
use crate::config::raw::Config;
use crate::data;
use crate::device::SliceMut;
use crate::device::cuda::nvml::Gauge;
use crate::error::{Error, Kind, Result};
use crate::launch::job::Job;
use crate::launch::signals::{self, STOP, Signals};
use crate::launch::watch::Phase;
use crate::model::precision::Precision;
use crate::report::budget::{Category, Clock, Merged};
use crate::report::{self, Ending, Report, Set, StoppedBy};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// One rank's run.
pub struct Session<'a> {
    config: &'a Config,
    options: &'a Options,
    rank: &'a Rank,
    signals: &'a Signals,
    plan: Plan,
    /// Of the training set.
    fingerprint: String,
    learner: Learner,
    evaluator: Evaluator,
    feed: Feed,
    progress: Progress,
    clock: Clock,
    /// Rank 0's.
    report: Option<Report>,
    /// Of this rank's GPU.
    gauge: Option<Gauge>,
    /// When `max_minutes` are over.
    deadline: Option<Instant>,
    job: Job,
    time_limit: Option<TimeLimit>,
    /// Where checkpoints go, and the newest one.
    checkpoints: PathBuf,
    saved: Option<PathBuf>,
    /// Step after which the watched set was last evaluated.
    evaluated: Option<u64>,
    /// Where the ranks have copies of the parameters, and the step after which they were last compared.
    audit: Option<Audit>,
    audited: u64,
    faults: Faults,
    /// The signal to whichever rank for which the run ends.
    ended_by: Option<i32>,
}

/// Trains until the run ends. `Stopped` after a signal or ahead of the job's time limit, with everything saved.
pub fn train(
    config: &Config,
    options: &Options,
    rank: &Rank,
    signals: &Signals,
    mut comm: Box<dyn Communicator>,
) -> Result<()> {
    let clock = Clock::start();
    let job = Job::detect()?;
    let directory = options.directory(config);
    let checkpoints = options.checkpoints(config);
    let parts = setup::Parts::open(config)?;
    let plan = setup::plan(config, &parts, &rank.world)?;
    let fingerprint = data::fingerprint(&*parts.train);
    setup::agree(config, &parts, &fingerprint, rank, &mut *comm)?;
    let config = &gpus::settle(config, rank, &mut *comm)?;
    gpus::take(config, &Need::new(config, &plan, parts.samples(), true)?, rank, &mut *comm)?;
    inject::check_ranks(&options.inject, &job, &rank.world)?;
    let anew = resume::agree_on_anew(&options.resume, &job, &checkpoints, &mut *comm)?;
    let faults = Faults::new(options, anew, &directory, &rank.world)?;
    if rank.world.rank == 0
        && let Some(warning) = plan.cut_warmup()
    {
        tracing::warn!("{warning}");
    }
    let mut learner = setup::learner(config, &plan, &parts, rank, comm)?;
    let found = match rank.world.rank {
        0 => resume::find(&options.resume, (&job, anew), &checkpoints, config, |state| learner.fits(state))?,
        _ => None,
    };
    let progress = resume::distribute(found.as_ref().map(|(_, state)| state), &mut learner)?;
    let saved = found.as_ref().map(|(path, _)| path.clone());
    if let Some((_, state)) = found.as_ref().filter(|(_, state)| state.world_size != rank.world.size)
        && config.batch.local.is_some()
    {
        let size = rank.world.size;
        tracing::warn!(
            "saved by {} ranks, going on with {size}: with batch.local a step is now {} samples, and the schedule counts steps",
            state.world_size,
            plan.global_batch
        );
    }
    if let Some((path, state)) = &found {
        rank.health.saved(way_on(&options.resume, path));
        warn_of_other_data(path, state, &fingerprint, &options.resume.to_begin_anew(&checkpoints));
    }
    let end = end_of(config, &progress);
    if let Some(end) = end
        && has_results(&directory, rank, &mut learner)?
    {
        if rank.world.rank == 0 && options.verbosity >= 0 {
            say_complete(config, end, &progress, &directory, &options.resume.to_begin_anew(&checkpoints));
        }
        return Ok(());
    }
    if let Some(path) = &saved {
        tracing::info!("going on from {} (step {})", path.display(), progress.step);
    }
    let time_limit = TimeLimit::of_job(&job, learner.checkpoint_bytes());
    let gauge = Gauge::of_this_rank();
    let setup = report::Setup {
        directory,
        run: config.run.name.clone(),
        world_size: rank.world.size,
        parameters: learner.net.table().trainable() as u64,
        epochs: config.run.epochs,
        total_steps: plan.total_steps,
        first_step: progress.step,
        log_every: plan.log_every_steps,
        quiet: options.verbosity < 0,
        gauge: gauge.clone(),
    };
    let audit = if plan.audit.every_steps.is_some() { learner.audit()? } else { None };
    let input = (parts.loader(config)?, setup::inlet(config, &plan)?);
    let minutes = |minutes: f64| Instant::now() + Duration::from_secs_f64(minutes * 60.0);
    let mut session = Session {
        config,
        options,
        rank,
        signals,
        feed: setup::feed(config, &plan, &parts, rank, input.clone(), progress.position)?,
        evaluator: setup::evaluator(config, &plan, &parts, rank, input)?,
        plan,
        fingerprint,
        learner,
        progress,
        clock,
        report: if rank.world.rank == 0 { Some(Report::start(setup)?) } else { None },
        gauge,
        deadline: config.run.max_minutes.map(minutes),
        job,
        time_limit,
        checkpoints,
        saved,
        evaluated: None,
        audit,
        audited: progress.step,
        faults,
        ended_by: None,
    };
    gpus::tell_use(session.learner.net.memory_bytes())?;
    session.clock.lap(Category::Other);
    // Without an end, it was interrupted between its last step and its results.
    match end.map_or_else(|| session.run(), Ok) {
        Ok(end) => session.finish(end),
        Err(error) => {
            rank.health.ending();
            let rests = session.learner.comes_to_rest();
            session.summarise_failure(&error, rests);
            // What still waits for another rank does so in vain: NCCL aborts it.
            rank.health.fail(error.clone());
            Err(error)
        }
    }
}

impl Session<'_> {
    /// Steps until an end comes.
    fn run(&mut self) -> Result<StoppedBy> {
        loop {
            let sums = self.step()?;
            let asked = asked_to_end(&sums);
            if self.plan.audit.due(self.progress.step) {
                self.audit()?;
            }
            if self.plan.eval.due(self.progress.step) {
                // Whoever ends the job may not wait for the evaluation.
                if asked.is_some_and(StoppedBy::goes_on) {
                    self.save()?;
                }
                self.evaluate(self.evaluator.watched())?;
            }
            let end = end_of(self.config, &self.progress).or(asked);
            if end.is_some() || self.plan.checkpoint.due(self.progress.step) {
                self.save()?;
            }
            self.clock.lap(Category::Other);
            if let Some(end) = end {
                self.ended_by = sums.signal();
                return Ok(end);
            }
        }
    }

    fn step(&mut self) -> Result<Sums> {
        let now = Instant::now();
        let flag = |flag: bool| if flag { 1.0 } else { 0.0 };
        let injected = self.faults.before_step(self.progress.step + 1, self.rank)?;
        let flags = Sums {
            loss: injected,
            signals: STOP.map(|signal| flag(self.signals.requested() == Some(signal))),
            deadline: flag(self.deadline.is_some_and(|deadline| now >= deadline)),
            time_limit: flag(self.time_limit.as_mut().is_some_and(|limit| limit.is_near(now))),
            ..Sums::default()
        };
        let step = Step {
            number: self.progress.step,
            feed: &mut self.feed,
            clock: &mut self.clock,
            health: &self.rank.health,
            flags,
        };
        let Done { sums, lr, non_finite } = self.learner.step(step)?;
        if !sums.loss.is_finite() {
            let by_order = (!injected.is_finite()).then(|| "it was put there by --inject".to_string());
            return Err(self.not_finite(&sums, by_order.or(non_finite)));
        }
        self.advance();
        let scales_loss = self.config.run.precision == Precision::Fp16;
        let loss_scale = match scales_loss && self.progress.step.is_multiple_of(self.plan.log_every_steps) {
            true => {
                self.learner.settle(&self.rank.health)?;
                self.learner.loss_scale()?
            }
            false => None,
        };
        if let Some(Err(error)) = loss_scale.map(|scale| scale.check()) {
            let error = Error::new(error.kind(), format!("{error}{}", self.last_checkpoint()));
            let world = &self.rank.world;
            return Err(if world.rank > 0 && world.joins_output { error.said_by_rank_0() } else { error });
        }
        self.rank.health.set_waiting(self.learner.waited(self.clock.budget()));
        if let Some(report) = &mut self.report {
            let step = report::Step {
                step: self.progress.step,
                epoch: self.progress.latest_epoch(),
                lr,
                loss_sum: f64::from(sums.loss),
                correct: sums.correct as u64,
                samples: sums.samples as u64,
                loss_scale,
            };
            report.step(&step, self.clock.budget())?;
        }
        Ok(sums)
    }

    fn advance(&mut self) {
        let Progress { step, position, .. } = &mut self.progress;
        *step += 1;
        position.consumed += self.plan.global_batch;
        if position.consumed >= self.learner.samples {
            position.consumed = 0;
            position.epoch += 1;
        }
    }

    /// All ranks that have the parameters to themselves must have the same.
    fn audit(&mut self) -> Result<()> {
        let step = self.progress.step;
        let Some(audit) = self.audit.as_mut().filter(|_| self.audited < step) else { return Ok(()) };
        self.learner.settle(&self.rank.health)?;
        let Learner { net, gradient, .. } = &mut self.learner;
        self.faults.before_audit(step, net)?;
        let difference = gradient.reducer().with(|comm, _| audit.compare(net.table(), &net.params()?, comm))?;
        self.audited = step;
        match difference {
            None => Ok(()),
            Some(difference) => Err(self.not_equal(&difference)),
        }
    }

    fn evaluate(&mut self, set: Set) -> Result<()> {
        self.clock.lap(Category::Other);
        let step = self.progress.step;
        self.rank.health.set(step, Phase::Evaluate);
        let Learner { net, judge, gradient, .. } = &mut self.learner;
        let at = (step, self.progress.latest_epoch());
        let all_reduce = |sums: SliceMut<'_>| gradient.reducer().with(|comm, _| comm.all_reduce(sums));
        let evaluation = self.evaluator.run(set, (net, judge), at, None, all_reduce)?;
        if set == self.evaluator.watched() {
            self.evaluated = Some(step);
            let best = &mut self.progress.best_accuracy;
            *best = Some(best.unwrap_or(0.0).max(evaluation.accuracy()));
        }
        if let Some(report) = &mut self.report {
            report.evaluated(&evaluation)?;
        }
        self.clock.lap(Category::Evaluation);
        Ok(())
    }

    /// Rank 0 writes; the others give it their shares of the optimizer's state and go on.
    fn save(&mut self) -> Result<()> {
        self.audit()?;
        self.clock.lap(Category::Other);
        let start = Instant::now();
        let Progress { step, position, best_accuracy } = self.progress;
        self.rank.health.set(step, Phase::Checkpoint);
        self.learner.settle(&self.rank.health)?;
        let tensors = self.learner.export()?;
        // Where a rank was lost meanwhile, they are not what they should be.
        self.rank.health.check()?;
        if let Some(report) = &self.report {
            let state = State {
                run: self.config.run.name.clone(),
                config: self.config.resolved().to_string(),
                seed: self.config.run.seed,
                world_size: self.rank.world.size,
                step,
                epoch: u64::from(position.epoch),
                samples: position.consumed as u64,
                best_accuracy,
                data: Some(self.fingerprint.clone()),
                loss_scale: self.learner.loss_scale()?,
                tensors,
            };
            let path = checkpoint::save(&self.checkpoints, self.config.checkpoint.keep, &state)?;
            self.rank.health.saved(way_on(&self.options.resume, &path));
            report.saved(&path);
            self.faults.after_save(step, &path)?;
        }
        self.saved = Some(checkpoint::path(&self.checkpoints, step));
        if let Some(limit) = &mut self.time_limit {
            limit.saved(start.elapsed());
        }
        self.clock.lap(Category::Checkpoint);
        Ok(())
    }

    /// The last evaluation, the budget of all ranks, and the summary.
    fn finish(mut self, end: StoppedBy) -> Result<()> {
        if !end.goes_on() {
            let watched = self.evaluator.watched();
            if self.evaluated != Some(self.progress.step) {
                self.evaluate(watched)?;
            }
            if watched != Set::Test {
                self.evaluate(Set::Test)?;
            }
        }
        self.rank.health.set(self.progress.step, Phase::Finish);
        let world = &self.rank.world;
        // What every rank can tell, in one sum: where its time went, how many images it skipped, the energy of its GPU. The sum
        // is not a number if a rank's energy is not.
        let mut told = Merged::contribution(self.clock.budget(), world.rank, world.size);
        let energy = self.gauge.as_ref().and_then(Gauge::energy_joules);
        told.extend([self.skipped() as f32, energy.map_or(f32::NAN, |joules| joules as f32)]);
        self.learner.gradient.reducer().with(|comm, _| comm.all_reduce(SliceMut::from(&mut told[..])))?;
        let energy = told.pop().filter(|joules| joules.is_finite());
        let skipped = told.pop().unwrap_or_default();
        if !end.goes_on() {
            self.faults.at_end(self.progress.step);
        }
        let reason = self.reason(end);
        if let Some(report) = self.report.take() {
            report.finish(Ending {
                stopped_by: end,
                exit_reason: reason.clone(),
                epochs: u64::from(self.progress.position.epoch),
                weights_digest: checkpoint::weights_digest(&export_params(&self.learner.net)?),
                budget: self.learner.merged(&told),
                skipped_images: skipped as u64,
                job_restarts: self.job.requeues(),
                gpu_energy_joules: energy.map(f64::from),
                loss_scale: self.learner.loss_scale()?,
            })?;
        }
        if !end.goes_on() {
            return Ok(());
        }
        let stopped = Error::new(Kind::Stopped, reason);
        Err(if world.rank > 0 && world.joins_output { stopped.said_by_rank_0() } else { stopped })
    }

    /// By this rank.
    fn skipped(&self) -> u64 {
        self.evaluator.loader.skipped.times()
    }

    fn reason(&self, end: StoppedBy) -> String {
        let best = self.progress.best_accuracy.unwrap_or(0.0);
        let interrupted = |by: &str| {
            let step = self.progress.step;
            let again = self.options.resume.again(self.saved.as_deref());
            format!("stopped by {by} after step {step}; everything is saved, {again} goes on from there")
        };
        match end {
            StoppedBy::Signal => interrupted(self.ended_by.map_or("a signal", signals::name)),
            StoppedBy::TimeLimit => interrupted("the job's time limit"),
            StoppedBy::Epochs => format!("all {} epochs are done", self.progress.position.epoch),
            StoppedBy::Steps => format!("all {} steps are done", self.progress.step),
            StoppedBy::TargetAccuracy => format!("the target accuracy is reached: {best:.4}"),
            StoppedBy::MaxMinutes => "the time of run.max_minutes is over".into(),
            StoppedBy::Error => "an error".into(),
        }
    }

    fn not_finite(&self, sums: &Sums, here: Option<String>) -> Error {
        let place = match here {
            Some(place) => format!("on rank {}, {place}", self.rank.world.rank),
            None => "another rank says where".into(),
        };
        let saved = self.last_checkpoint();
        let range = match self.config.run.precision {
            Precision::Fp16 => " fp16 ends at 65504; run.precision = \"bf16\" has the range of f32.",
            _ => "",
        };
        Error::new(
            Kind::NonFinite,
            format!(
                "the loss is {} in step {}: {place}. Lower optimizer.lr, or set optimizer.clip_norm or a \
                 warm-up.{range}{saved}",
                sums.loss,
                self.progress.step + 1
            ),
        )
    }

    /// Not of kind Internal, though it may be a bug: far more often it is a machine that fails.
    fn not_equal(&self, difference: &str) -> Error {
        Error::device(format!(
            "after step {} the ranks no longer have the same parameters: {difference}. The memory or the network of a host \
             has changed bits; or, with parallel.factor_exchange, unlike CPUs compute unlike bits; or Lockstep has a bug. \
             Nothing was saved of it.{}",
            self.progress.step,
            self.last_checkpoint()
        ))
    }

    fn last_checkpoint(&self) -> String {
        let way_on = |path: &PathBuf| format!(" Last checkpoint: {}.", way_on(&self.options.resume, path));
        self.saved.as_ref().map_or_else(String::new, way_on)
    }

    /// What can still be told after an error; the error itself goes to the caller. `rests`: the GPU can be asked.
    fn summarise_failure(&mut self, error: &Error, rests: bool) {
        let Some(report) = self.report.take() else { return };
        let digest = if rests { self.learner.last_digest(&self.rank.health) } else { None };
        let ending = Ending {
            stopped_by: StoppedBy::Error,
            exit_reason: error.to_string(),
            epochs: u64::from(self.progress.position.epoch),
            weights_digest: digest.unwrap_or_default(),
            budget: Merged::single(self.clock.budget()),
            skipped_images: self.skipped(),
            job_restarts: self.job.requeues(),
            // A GPU that has failed may keep whoever asks it.
            gpu_energy_joules: None,
            loss_scale: None,
        };
        if let Err(error) = report.finish(ending) {
            tracing::warn!("{error}");
        }
    }
}

/// Where the run could go on from, and how.
fn way_on(resume: &Resume, saved: &Path) -> String {
    format!("{}; {} goes on from it", saved.display(), resume.again(Some(saved)))
}

/// The position in the epoch means other samples in another set. Checkpoints of before it was kept say nothing.
fn warn_of_other_data(path: &Path, state: &State, fingerprint: &str, anew: &str) {
    if state.data.as_ref().is_some_and(|saved| saved != fingerprint) {
        tracing::warn!(
            "{} was saved with another training set: samples, classes or files have changed since; the run goes on with \
             the set as it is now. If that is not meant, restore the data, or begin anew: {anew}",
            path.display()
        );
    }
}
