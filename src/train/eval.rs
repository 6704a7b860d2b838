//! Evaluation: every rank takes its share of the set, and the sums go round once.

use super::feed::Feed;
use crate::data::queue::{DataQueue, Loader};
use crate::data::{Batch, Dataset};
use crate::device::SliceMut;
use crate::error::{Error, Result};
use crate::model::Pass;
use crate::model::net::Net;
use crate::report::{Evaluation, Set};
use std::sync::Arc;
use std::time::Duration;

/// The sets that a run is judged by.
pub struct Evaluator {
    pub validation: Option<Arc<dyn Dataset>>,
    pub test: Arc<dyn Dataset>,
    pub loader: Loader,
    /// Samples a pass.
    pub batch: usize,
    pub rank: usize,
    pub size: usize,
}

impl Evaluator {
    /// The set to watch while training: the held-out part of the training set, or the test set if nothing is held out.
    pub fn watched(&self) -> Set {
        match self.validation {
            Some(_) => Set::Validation,
            None => Set::Test,
        }
    }

    /// Loss and accuracy over all ranks' shares of a set, without images that are damaged. `at` is the step and epoch to
    /// report; `all_reduce` adds up what the ranks found; `seen` gets every batch of this rank with the net's outputs.
    pub fn run(
        &self,
        set: Set,
        (net, feed): (&mut Net, &Feed),
        at: (u64, u64),
        mut seen: impl FnMut(&Batch, &[f32]),
        all_reduce: impl FnOnce(SliceMut<'_>) -> Result<Duration>,
    ) -> Result<Evaluation> {
        let dataset = match (set, &self.validation) {
            (Set::Validation, Some(validation)) => validation,
            _ => &self.test,
        };
        let mut queue = DataQueue::eval(dataset.clone(), self.loader.clone(), self.batch, self.rank, self.size)?;
        let (mut loss_sum, mut correct, mut samples) = (0.0, 0, 0);
        while let Some(batch) = queue.next()? {
            if batch.count() == 0 {
                continue;
            }
            let pass = Pass { batch: batch.count(), training: false, first_sample: 0, share: 1.0 };
            net.forward(&pass, feed.images(batch)?)?;
            seen(batch, &net.output_to_host(&pass)?);
            let out = feed.judge(net, &pass, &batch.labels)?;
            loss_sum += f64::from(out.loss_sum);
            correct += out.correct;
            samples += batch.count();
        }
        // Each fits a float: up to 2^24 samples are counted exactly.
        let mut sums = [loss_sum as f32, correct as f32, samples as f32];
        all_reduce(SliceMut::from(&mut sums[..]))?;
        let [loss_sum, correct, samples] = sums;
        if samples == 0.0 {
            return Err(Error::data(format!(
                "every one of the {} images of the {} set is damaged, so there is nothing to evaluate on; the warnings \
                 above name them: repair or replace these files, or give another set",
                dataset.len(),
                set.name()
            )));
        }
        Ok(Evaluation {
            set,
            step: at.0,
            epoch: at.1,
            loss_sum: f64::from(loss_sum),
            correct: correct as u64,
            samples: samples as u64,
        })
    }
}
