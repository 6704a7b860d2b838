//! `summary.json`: how a run ended, in one object.

use super::budget::{Category, Merged};
use super::{Evaluation, Report, Scores};
use crate::atomic_file;
use crate::error::{Context, Kind, Result};
use crate::optim::loss_scale::LossScale;
use indicatif::HumanCount;
use serde::Serialize;
use serde_json::Value;
use std::fmt;
use std::path::Path;

/// Which of `[run]`'s ends came first, or what came before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StoppedBy {
    Epochs,
    Steps,
    TargetAccuracy,
    MaxMinutes,
    /// Of the batch job.
    TimeLimit,
    Signal,
    Error,
}

impl StoppedBy {
    /// Whether the run was interrupted with everything saved, and can go on.
    pub fn goes_on(self) -> bool {
        matches!(self, StoppedBy::TimeLimit | StoppedBy::Signal)
    }
}

/// What the training loop knows at the end.
#[derive(Clone, Debug)]
pub struct Ending {
    pub stopped_by: StoppedBy,
    /// One sentence for people; on an error its text.
    pub exit_reason: String,
    /// Epochs completed.
    pub epochs: u64,
    pub weights_digest: String,
    /// Of all ranks; after an error of this one alone. So is `skipped_images`.
    pub budget: Merged,
    /// How often an image was passed over because it is damaged.
    pub skipped_images: u64,
    /// How often the batch job was requeued before.
    pub job_restarts: u64,
    /// Of all ranks' GPUs since training started, if each has one that tells; not after an error.
    pub gpu_energy_joules: Option<f64>,
    /// Where the loss is scaled; not after an error.
    pub loss_scale: Option<LossScale>,
}

/// The fields of `summary.json`. Losses and accuracies are null where nothing was measured; times and rates are of this
/// process, not of those before a resume.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub run: String,
    pub world_size: usize,
    pub parameters: u64,
    pub steps: u64,
    pub epochs: u64,
    /// Over the last epoch or what this process saw of it, while its weights changed.
    pub train_loss: Option<f64>,
    pub train_accuracy: Option<f64>,
    /// The latest.
    pub val_loss: Option<f64>,
    pub val_accuracy: Option<f64>,
    pub test_loss: Option<f64>,
    pub test_accuracy: Option<f64>,
    /// All ranks together, without evaluation and checkpoints.
    pub samples_per_second: f64,
    pub wall_seconds: f64,
    pub stopped_by: StoppedBy,
    pub exit_reason: String,
    pub weights_digest: String,
    /// Share of the training time, 0 to 1, mean over ranks.
    pub exposed_communication: f64,
    pub waiting: f64,
    /// The rank for which the others waited, and for how many milliseconds a step; null where none stands out.
    pub slowest_rank: Option<usize>,
    pub slowest_rank_ms: Option<f64>,
    /// How often an image was passed over because it is damaged, in training and evaluation.
    pub skipped_images: u64,
    /// How often the batch job was requeued before: Slurm's SLURM_RESTART_COUNT.
    pub job_restarts: u64,
    /// Of all ranks' GPUs; left out where one of them does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_energy_joules: Option<f64>,
    /// The loss's at the end, and how many updates were skipped for it, in the whole run; left out where it is not scaled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped_updates: Option<u32>,
}

impl Summary {
    pub(super) fn new(report: &Report, ending: &Ending) -> Summary {
        let trained = Some(&report.epoch).filter(|epoch| epoch.samples > 0);
        let budget = ending.budget.mean();
        let slowest = ending.budget.slowest();
        let steps = (report.last.step - report.setup.first_step).max(1);
        Summary {
            run: report.setup.run.clone(),
            world_size: report.setup.world_size,
            parameters: report.setup.parameters,
            steps: report.last.step,
            epochs: ending.epochs,
            train_loss: trained.map(|epoch| epoch.loss()),
            train_accuracy: trained.map(|epoch| epoch.accuracy()),
            val_loss: report.validation.as_ref().map(Evaluation::loss),
            val_accuracy: report.validation.as_ref().map(Evaluation::accuracy),
            test_loss: report.test.as_ref().map(Evaluation::loss),
            test_accuracy: report.test.as_ref().map(Evaluation::accuracy),
            samples_per_second: report.trained_samples as f64 / budget.training_seconds(),
            wall_seconds: budget.total_seconds(),
            stopped_by: ending.stopped_by,
            exit_reason: ending.exit_reason.clone(),
            weights_digest: ending.weights_digest.clone(),
            exposed_communication: budget.share(Category::Communication),
            waiting: budget.share(Category::Waiting),
            slowest_rank: slowest.map(|slowest| slowest.rank),
            slowest_rank_ms: slowest.map(|slowest| 1e3 * slowest.seconds / steps as f64),
            skipped_images: ending.skipped_images,
            job_restarts: ending.job_restarts,
            gpu_energy_joules: ending.gpu_energy_joules,
            loss_scale: ending.loss_scale.map(|end| end.scale),
            skipped_updates: ending.loss_scale.map(|end| end.skipped),
        }
    }

    /// Whether `path` holds the results of a run that ended in order with these weights. Its step says less: an earlier run,
    /// or the one from whose checkpoint this one has begun, may have ended after the same.
    pub(super) fn is_of(path: &Path, weights_digest: &str) -> bool {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let summary: Value = serde_json::from_str(&text).unwrap_or_default();
        let stopped_by = summary["stopped_by"].as_str();
        summary["weights_digest"] == weights_digest
            && stopped_by.is_some_and(|by| !["time_limit", "signal", "error"].contains(&by))
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let mut json = serde_json::to_string_pretty(self).expect("a summary can be written as JSON");
        json.push('\n');
        atomic_file::replace(path, json.as_bytes()).or_kind(Kind::Internal, format!("writing {}", path.display()))
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sets = [
            ("training", self.train_loss, self.train_accuracy),
            ("validation", self.val_loss, self.val_accuracy),
            ("test", self.test_loss, self.test_accuracy),
        ];
        for (set, loss, accuracy) in sets {
            if let (Some(loss), Some(accuracy)) = (loss, accuracy) {
                writeln!(f, "{set:<10}  {}", Scores { loss, accuracy })?;
            }
        }
        let speed = HumanCount(self.samples_per_second as u64);
        writeln!(
            f,
            "{} steps in {:.1} s, {speed} samples/s on {} ranks",
            self.steps, self.wall_seconds, self.world_size
        )?;
        if let (Some(rank), Some(ms)) = (self.slowest_rank, self.slowest_rank_ms) {
            writeln!(f, "the others waited {ms:.1} ms a step for rank {rank}")?;
        }
        if self.skipped_images > 0 {
            writeln!(
                f,
                "damaged images were wanted and skipped {} times; the warnings name them",
                self.skipped_images
            )?;
        }
        if let (Some(scale), Some(skipped)) = (self.loss_scale, self.skipped_updates) {
            writeln!(f, "{skipped} updates were skipped for an overflow in fp16; the loss scale is {scale}")?;
        }
        write!(f, "{}; weights {:.16}", self.exit_reason, self.weights_digest)
    }
}
