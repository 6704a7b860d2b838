//! What learns on one rank, and the step that all ranks take together.

use super::checkpoint::State;
use super::gradient::{Gradient, Sums, Work};
use super::update::Updater;
use crate::data::queue::DataQueue;
use crate::error::Result;
use crate::launch::watch::{Health, Phase};
use crate::model::loss::Loss;
use crate::model::net::Net;
use crate::optim::At;
use crate::optim::schedule::Schedule;
use crate::report::budget::{Category, Clock};
use std::time::Duration;

pub struct Learner {
    pub net: Net,
    pub loss: Loss,
    pub gradient: Gradient,
    pub updater: Updater,
    pub schedule: Schedule,
    /// Samples of an epoch.
    pub samples: usize,
    /// By bucket, in the last step.
    pub bucket_times: Vec<BucketTime>,
}

/// What the training thread spent on one bucket after backward.
#[derive(Clone, Copy, Debug, Default)]
pub struct BucketTime {
    /// Until it held the sum over all ranks; what was reduced behind backward is not in it.
    pub reduce: Duration,
    pub update: Duration,
}

/// What a step needs of the rank around it.
pub struct Step<'a> {
    /// Updates done before.
    pub number: u64,
    pub queue: &'a mut DataQueue,
    pub clock: &'a mut Clock,
    pub health: &'a Health,
    /// This rank's wish to stop.
    pub flags: Sums,
}

/// What came of a step.
pub struct Done {
    /// Over all ranks.
    pub sums: Sums,
    pub lr: f32,
    /// Where this rank's loss stopped being finite.
    pub non_finite: Option<String>,
}

impl Learner {
    /// Forward, backward, all-reduce, update. The reduction of a bucket runs while backward goes on to the layers before
    /// it, and its update while the next bucket is being reduced.
    pub fn step(&mut self, step: Step<'_>) -> Result<Done> {
        let Step { number, queue, clock, health, flags } = step;
        let mut work = Work {
            net: &mut self.net,
            loss: &self.loss,
            queue,
            clock,
            health,
            step: number + 1,
            samples: self.samples,
            flags,
            non_finite: None,
        };
        self.gradient.compute(&mut work)?;
        let non_finite = work.non_finite.take();

        let at = At { lr: self.schedule.lr(number), step: number };
        if self.updater.needs_norm() {
            self.reduce_all_then_update(at, clock, health)?;
        } else {
            for bucket in 0..self.gradient.buckets() {
                self.wait(bucket, at, clock, health)?;
                self.update(bucket, 1.0, at, clock, health);
            }
        }
        Ok(Done { sums: self.gradient.sums(), lr: at.lr, non_finite })
    }

    /// Whether a checkpoint is of this net and optimizer; else what differs.
    pub fn fits(&self, state: &State) -> Result<()> {
        self.updater.fits(self.net.table(), state)
    }

    /// Clipping by norm needs the whole gradient before the first update.
    fn reduce_all_then_update(&mut self, at: At, clock: &mut Clock, health: &Health) -> Result<()> {
        let mut squares = 0.0;
        for bucket in 0..self.gradient.buckets() {
            self.wait(bucket, at, clock, health)?;
            let (range, grads) = self.gradient.bucket(bucket);
            squares += Updater::squares(self.net.table(), &range, grads);
        }
        let factor = self.updater.norm_factor(squares);
        (0..self.gradient.buckets()).for_each(|bucket| self.update(bucket, factor, at, clock, health));
        Ok(())
    }

    fn wait(&mut self, bucket: usize, at: At, clock: &mut Clock, health: &Health) -> Result<()> {
        clock.lap(Category::Compute);
        health.set(at.step + 1, Phase::AllReduce);
        let waited = self.gradient.wait(bucket)?;
        self.bucket_times[bucket].reduce = clock.lap_communication(waited);
        Ok(())
    }

    fn update(&mut self, bucket: usize, factor: f32, at: At, clock: &mut Clock, health: &Health) {
        health.set(at.step + 1, Phase::Update);
        let (range, grads) = self.gradient.bucket(bucket);
        self.updater.update(&mut self.net, &range, grads, factor, at);
        self.bucket_times[bucket].update = clock.lap(Category::Compute);
    }
}
