//! Evaluation: every rank takes its share of the set, and the sums go round once.

use super::feed::{Feed, Way};
use super::judge::Judge;
use crate::data::queue::{DataQueue, Loader};
use crate::data::{Batch, Dataset};
use crate::device::SliceMut;
use crate::error::{Error, Result};
use crate::launch::watch::Health;
use crate::model::Pass;
use crate::model::loss::LossOut;
use crate::model::net::Net;
use crate::report::{Evaluation, Set};
use std::sync::Arc;
use std::time::Duration;

/// The sets that a run is judged by.
pub struct Evaluator {
    pub validation: Option<Source>,
    pub test: Source,
    pub loader: Loader,
    /// Samples a pass.
    pub batch: usize,
    pub rank: usize,
    pub size: usize,
    pub health: Arc<Health>,
}

/// A set, and its way to a GPU.
pub struct Source {
    pub set: Arc<dyn Dataset>,
    pub way: Option<Arc<Way>>,
    /// Of the evaluation before, since memory that a GPU copies from takes milliseconds to get.
    pub buffers: Vec<Batch>,
}

/// Gets a batch with the net's outputs.
pub type Seen<'a> = &'a mut dyn FnMut(&Batch, &[f32]);

impl Evaluator {
    /// Passes whose loss is kept: a GPU is given one while it works on the one before.
    pub const PASSES: usize = 2;

    /// The set to watch while training: the held-out part of the training set, or the test set if nothing is held out.
    pub fn watched(&self) -> Set {
        match self.validation {
            Some(_) => Set::Validation,
            None => Set::Test,
        }
    }

    /// Loss and accuracy over all ranks' shares of a set, without images that are damaged. `at` is the step and epoch to
    /// report; `all_reduce` adds up what the ranks found; `seen` gets every batch of this rank.
    pub fn run(
        &mut self,
        set: Set,
        (net, judge): (&mut Net, &mut Judge),
        at: (u64, u64),
        mut seen: Option<Seen<'_>>,
        all_reduce: impl FnOnce(SliceMut<'_>) -> Result<Duration>,
    ) -> Result<Evaluation> {
        let Source { set: dataset, way, buffers } = match (set, &mut self.validation) {
            (Set::Validation, Some(validation)) => validation,
            _ => &mut self.test,
        };
        let loader = Loader { form: Way::form(way), ..self.loader.clone() };
        let used = std::mem::take(buffers);
        let queue = DataQueue::eval(dataset.clone(), loader, self.batch, self.rank, self.size, used)?;
        let mut feed = Feed::new(queue, way.clone(), self.health.clone());
        let (mut loss_sum, mut correct, mut samples) = (0.0, 0, 0);
        let mut add = |LossOut { loss_sum: loss, correct: right }| {
            loss_sum += f64::from(loss);
            correct += right;
        };
        let mut passes = 0;
        loop {
            feed.release()?;
            let Some(fed) = feed.next()? else { break };
            if fed.batch.count() == 0 {
                continue;
            }
            let pass = Pass { batch: fed.batch.count(), training: false, first_sample: 0, share: 1.0 };
            net.forward(&pass, fed.images)?;
            if let Some(seen) = &mut seen {
                seen(fed.batch, &net.output_to_host(&pass)?);
            }
            judge.judge(net, &pass, &fed, passes % Self::PASSES)?;
            samples += pass.batch;
            if passes > 0 {
                add(judge.found((passes - 1) % Self::PASSES, &self.health)?);
            }
            passes += 1;
        }
        if passes > 0 {
            add(judge.found((passes - 1) % Self::PASSES, &self.health)?);
        }
        *buffers = feed.into_buffers()?;
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
