//! What a run says of itself, on rank 0 only: progress on the terminal, `metrics.jsonl` as it goes, `summary.json` and
//! the step budget at its end.

pub mod budget;
pub mod log;
mod meter;
mod metrics;
mod progress;
pub mod stragglers;
mod summary;
#[cfg(test)]
mod tests;

pub use summary::{Ending, StoppedBy, Summary};

use crate::device::cuda::nvml::Gauge;
use crate::error::Result;
use crate::optim::loss_scale::LossScale;
use budget::{Budget, Category};
use meter::Meter;
use metrics::Metrics;
use progress::{Bar, Rates, epoch_of};
pub(crate) use progress::{Scores, print};
use std::fmt;
use std::path::{Path, PathBuf};

/// What is known when training starts.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The run's directory, where the files go.
    pub directory: PathBuf,
    pub run: String,
    pub world_size: usize,
    /// Trainable values of the net.
    pub parameters: u64,
    pub epochs: Option<u64>,
    pub total_steps: Option<u64>,
    /// Updates done before: 0, or those of the checkpoint from which the run goes on.
    pub first_step: u64,
    /// `[log] every_steps`.
    pub log_every: u64,
    /// Nothing goes to the terminal; the files are written all the same.
    pub quiet: bool,
    /// Of rank 0's GPU, if it has one: log steps tell of it.
    pub gauge: Option<Gauge>,
}

/// Sums over the samples since the last call, from all ranks.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Updates done, this one included.
    pub step: u64,
    /// Epoch in progress, from 0.
    pub epoch: u64,
    pub lr: f32,
    pub loss_sum: f64,
    pub correct: u64,
    pub samples: u64,
    /// At log steps, where the loss is scaled.
    pub loss_scale: Option<LossScale>,
}

/// Which samples were evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    Validation,
    Test,
}

impl Set {
    pub fn name(self) -> &'static str {
        match self {
            Set::Validation => "validation",
            Set::Test => "test",
        }
    }
}

/// Sums over one pass through a set, from all ranks.
#[derive(Clone, Copy, Debug)]
pub struct Evaluation {
    pub set: Set,
    /// Updates done.
    pub step: u64,
    /// Epoch of the last update, from 0.
    pub epoch: u64,
    pub loss_sum: f64,
    pub correct: u64,
    pub samples: u64,
}

/// Rank 0's voice.
pub struct Report {
    setup: Setup,
    metrics: Metrics,
    meter: Option<Meter>,
    /// Where the outputs are a terminal; else log steps print lines.
    bar: Option<Bar>,
    /// Since the last log record; since the bar's text was last set; since the epoch began.
    logged: Window,
    shown: Window,
    epoch: Window,
    last: Step,
    validation: Option<Evaluation>,
    test: Option<Evaluation>,
    trained_samples: u64,
}

/// Seconds between changes of the bar's text, long enough to read it.
const SHOW_SECONDS: f64 = 0.5;

/// Whether `directory` holds the results of a run that ended in order with these weights.
pub fn has_results(directory: &Path, weights_digest: &str) -> bool {
    Summary::is_of(&directory.join("summary.json"), weights_digest)
}

impl Report {
    /// Opens `metrics.jsonl`, cutting off what lies beyond `setup.first_step`, and shows the bar if the outputs are a
    /// terminal. A `log_every` of 0 logs nothing.
    pub fn start(setup: Setup) -> Result<Report> {
        let metrics = Metrics::open(&setup.directory.join("metrics.jsonl"), setup.first_step)?;
        let meter = setup.gauge.clone().map(|gauge| Meter::start(move || gauge.sample())).transpose()?;
        let show = !setup.quiet && progress::is_terminal();
        let bar = show.then(|| Bar::show(setup.first_step, setup.total_steps));
        let window = Window::new(&Budget::default());
        let last =
            Step { step: setup.first_step, epoch: 0, lr: 0.0, loss_sum: 0.0, correct: 0, samples: 0, loss_scale: None };
        Ok(Report {
            setup,
            metrics,
            meter,
            bar,
            logged: window,
            shown: window,
            epoch: window,
            last,
            validation: None,
            test: None,
            trained_samples: 0,
        })
    }

    /// After an update. Cheap and free of allocation except where a bar is drawn and at log steps.
    pub fn step(&mut self, step: &Step, budget: &Budget) -> Result<()> {
        if step.epoch != self.last.epoch {
            self.epoch = Window::new(budget);
        }
        self.last = *step;
        self.trained_samples += step.samples;
        for window in [&mut self.logged, &mut self.shown, &mut self.epoch] {
            window.add(step);
        }
        if let Some(bar) = &self.bar {
            bar.set_step(step.step);
            if budget.total_seconds() - self.shown.start.total_seconds() >= SHOW_SECONDS {
                bar.set_rates(epoch_of(step.epoch, self.setup.epochs), &self.shown.rates(budget));
                self.shown = Window::new(budget);
            }
        }
        if step.step.is_multiple_of(self.setup.log_every) {
            self.log(step, budget)?;
            self.logged = Window::new(budget);
        }
        Ok(())
    }

    fn log(&mut self, step: &Step, budget: &Budget) -> Result<()> {
        let rates = self.logged.rates(budget);
        if self.bar.is_none() {
            self.say(format_args!(
                "{}  step {}  {rates}",
                epoch_of(step.epoch, self.setup.epochs),
                self.step_of(step.step)
            ));
        }
        let gpu = self.meter.as_ref().map(Meter::latest).unwrap_or_default();
        self.metrics.write(&metrics::Train {
            kind: "train",
            step: step.step,
            epoch: step.epoch,
            loss: rates.loss,
            accuracy: rates.accuracy,
            lr: step.lr,
            samples_per_second: rates.samples_per_second,
            exposed_communication: rates.communication,
            waiting: rates.waiting,
            data: rates.data,
            wall_seconds: budget.total_seconds(),
            gpu_memory_mib: gpu.memory_mib,
            gpu_utilization_percent: gpu.utilization_percent,
            gpu_power_watts: gpu.power_watts,
            loss_scale: step.loss_scale.map(|now| now.scale),
            skipped_updates: step.loss_scale.map(|now| now.skipped),
        })
    }

    fn step_of(&self, step: u64) -> String {
        match self.setup.total_steps {
            Some(total) => format!("{step}/{total}"),
            None => step.to_string(),
        }
    }

    /// After an evaluation.
    pub fn evaluated(&mut self, evaluation: &Evaluation) -> Result<()> {
        let set = evaluation.set.name();
        let latest = match evaluation.set {
            Set::Validation => &mut self.validation,
            Set::Test => &mut self.test,
        };
        *latest = Some(*evaluation);
        let epoch = epoch_of(evaluation.epoch, self.setup.epochs);
        self.say(format_args!("{epoch}  step {}  {set}: {}", self.step_of(evaluation.step), evaluation.scores()));
        self.metrics.write(&metrics::Eval {
            kind: "eval",
            set,
            step: evaluation.step,
            epoch: evaluation.epoch,
            loss: evaluation.loss(),
            accuracy: evaluation.accuracy(),
            samples: evaluation.samples,
        })
    }

    /// After a checkpoint.
    pub fn saved(&self, path: &Path) {
        tracing::debug!("saved {}", path.display());
    }

    /// At the end, also one by a signal or an error: takes the bar away, prints the step budget, and writes
    /// `summary.json`, which it returns.
    pub fn finish(mut self, ending: Ending) -> Result<Summary> {
        self.bar = None;
        let path = self.setup.directory.join("summary.json");
        let summary = Summary::new(&self, &ending);
        self.say(format_args!("\n{}\n\n{summary}", ending.budget.table()));
        summary.write(&path)?;
        self.say(format_args!("summary in {}", path.display()));
        Ok(summary)
    }

    fn say(&self, line: impl fmt::Display) {
        if !self.setup.quiet {
            print(line);
        }
    }
}

impl Evaluation {
    pub(crate) fn scores(&self) -> Scores {
        Scores { loss: self.loss(), accuracy: self.accuracy() }
    }
    pub fn loss(&self) -> f64 {
        self.loss_sum / self.samples as f64
    }
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.samples as f64
    }
}

/// Sums since a moment of the clock.
#[derive(Clone, Copy)]
struct Window {
    start: Budget,
    loss_sum: f64,
    correct: u64,
    samples: u64,
}

impl Window {
    fn new(start: &Budget) -> Window {
        Window { start: *start, loss_sum: 0.0, correct: 0, samples: 0 }
    }

    fn add(&mut self, step: &Step) {
        self.loss_sum += step.loss_sum;
        self.correct += step.correct;
        self.samples += step.samples;
    }

    fn loss(&self) -> f64 {
        self.loss_sum / self.samples as f64
    }
    fn accuracy(&self) -> f64 {
        self.correct as f64 / self.samples as f64
    }

    fn rates(&self, now: &Budget) -> Rates {
        let spent = now.since(&self.start);
        Rates {
            loss: self.loss(),
            accuracy: self.accuracy(),
            samples_per_second: self.samples as f64 / spent.training_seconds(),
            communication: spent.share(Category::Communication),
            waiting: spent.share(Category::Waiting),
            data: spent.share(Category::Data),
        }
    }
}
