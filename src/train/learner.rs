//! What learns on one rank, and the step that all ranks take together.

use super::audit::Audit;
use super::checkpoint::{self, State, Tensor};
use super::feed::Feed;
use super::gradient::{Gradient, Sums, Work};
use super::judge::Judge;
use super::update::{Update, export_params, import_params};
use crate::comm::Communicator;
use crate::comm::bucket::Waited;
use crate::device::cuda::Gpu;
use crate::device::{Place, SliceMut};
use crate::error::{Kind, Result};
use crate::launch::watch::{Health, Phase};
use crate::model::net::Net;
use crate::optim::At;
use crate::optim::loss_scale::LossScale;
use crate::optim::schedule::Schedule;
use crate::report::budget::{Budget, Category, Clock, Merged};
use std::time::Duration;

pub struct Learner {
    pub net: Net,
    pub judge: Judge,
    pub gradient: Gradient,
    pub schedule: Schedule,
    /// Samples of an epoch.
    pub samples: usize,
    /// The only rank.
    pub alone: bool,
    /// By which gradients are summed.
    pub transport: &'static str,
    /// What the training thread spent on each part after backward, in the last step, and behind them on `finish`.
    pub part_times: Vec<Duration>,
}

/// What a step needs of the rank around it.
pub struct Step<'a> {
    /// Updates done before.
    pub number: u64,
    pub feed: &'a mut Feed,
    pub clock: &'a mut Clock,
    pub health: &'a Health,
    /// This rank's wish to stop, and a loss to start from.
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
    /// Forward, backward, all-reduce, update. A bucket is reduced, and its parameters are updated, while backward goes on to
    /// the layers before it. A GPU may still be at the last updates when this returns; what fails there is noticed later.
    pub fn step(&mut self, step: Step<'_>) -> Result<Done> {
        let number = step.number + 1;
        self.take_step(step).map_err(|error| match error.kind() {
            Kind::Device => error.context(format_args!("noticed in step {number}")),
            _ => error,
        })
    }

    fn take_step(&mut self, step: Step<'_>) -> Result<Done> {
        let Step { number, feed, clock, health, flags } = step;
        let mut work = Work {
            net: &mut self.net,
            feed,
            judge: &mut self.judge,
            clock,
            health,
            step: number + 1,
            samples: self.samples,
            flags,
            non_finite: None,
        };
        let at = At { lr: self.schedule.lr(number), step: number };
        self.gradient.reducer().with(|_, updater| updater.begin(at))?;
        self.gradient.compute(&mut work)?;
        let non_finite = work.non_finite.take();

        clock.lap(Category::Compute);
        health.set(number + 1, Phase::AllReduce);
        for part in 0..self.gradient.parts() {
            let waited = self.gradient.wait(part)?;
            self.part_times[part] = self.lap(clock, waited);
        }
        health.set(number + 1, Phase::Update);
        let finish = |comm: &mut dyn Communicator, updater: &mut Box<dyn Update>| {
            updater.finish(comm).map(|waited| (waited, updater.stood_still()))
        };
        let (waited, stood_still) = self.gradient.reducer().with(finish)?;
        self.part_times[self.gradient.parts()] = self.lap(clock, Waited::for_peers(waited));
        if let Some(time) = stood_still {
            clock.stood_still(time);
        }
        Ok(Done { sums: self.gradient.sums(), lr: at.lr, non_finite })
    }

    /// Reducing and updating are one pass. It counts as communication, but for a rank that has nobody to communicate with, and for
    /// one whose GPU does it by itself: there the host waits while the GPU computes, and what that stood still comes later.
    fn lap(&self, clock: &mut Clock, waited: Waited) -> Duration {
        match self.alone || self.is_over_nccl() {
            true => clock.lap(Category::Compute),
            false => clock.lap_communication(waited),
        }
    }

    /// How long this rank has waited for others, or longer by what is the same for all ranks: NCCL's own time.
    pub fn waited(&self, budget: &Budget) -> Duration {
        let communicated = if self.is_over_nccl() { budget.spent(Category::Communication) } else { Duration::ZERO };
        budget.spent(Category::Waiting) + communicated
    }

    /// What all ranks have spent, waiting for each other set apart.
    pub fn merged(&self, budgets: &[f32]) -> Merged {
        let merged = Merged::from_sum(budgets);
        if self.is_over_nccl() { merged.tell_waiting_apart() } else { merged }
    }

    fn is_over_nccl(&self) -> bool {
        self.transport == "nccl"
    }

    /// Between steps: returns when this rank's GPU has done all that it was given, or with an error where a peer for which it waits
    /// does not come. What is read from the GPU after that keeps nobody waiting.
    pub fn settle(&self, health: &Health) -> Result<()> {
        match self.net.place() {
            Place::Host => Ok(()),
            Place::Cuda => {
                let gpu = Gpu::of_this_rank()?;
                health.wait_for_gpu("finishing a step", || gpu.compute().is_done())
            }
        }
    }

    /// Between steps, where the loss is scaled, when the GPU has settled.
    pub fn loss_scale(&self) -> Result<Option<LossScale>> {
        self.gradient.reducer().with(|_, updater| updater.loss_scale())
    }

    /// What the tensors of a checkpoint take.
    pub fn checkpoint_bytes(&self) -> usize {
        let copies = 1 + self.gradient.reducer().with(|_, updater| updater.state_tensors());
        copies * self.net.table().len() * size_of::<f32>()
    }

    /// After an error: whether all that was given to this rank's GPU is done soon, which it is where no rank is missing.
    pub fn comes_to_rest(&self) -> bool {
        self.net.place() == Place::Host || Gpu::of_this_rank().is_ok_and(|gpu| gpu.compute().is_soon_done())
    }

    /// Then the digest of the weights. None where a GPU that has failed does not give them back, or NCCL was aborted on the way to
    /// them.
    pub fn last_digest(&self, health: &Health) -> Option<String> {
        if self.is_over_nccl() && health.check().is_err() {
            return None;
        }
        export_params(&self.net).ok().map(|weights| checkpoint::weights_digest(&weights))
    }

    /// Whether a checkpoint is of this net and optimizer; else what differs.
    pub fn fits(&self, state: &State) -> Result<()> {
        self.gradient.reducer().with(|_, updater| updater.fits(state))
    }

    /// All parameters and optimizer state for a checkpoint, on rank 0, when the GPU has settled. Collective.
    pub fn export(&self) -> Result<Vec<Tensor>> {
        self.gradient.reducer().with(|comm, updater| updater.export(&self.net, comm))
    }

    /// To compare the parameters of the ranks, where they do not all share one copy. Collective.
    pub fn audit(&self) -> Result<Option<Audit>> {
        let place = self.net.place();
        self.gradient.reducer().with(|comm, _| Audit::new(self.net.table(), place, comm))
    }

    /// Puts every rank where the checkpoint stands, which rank 0 has found. Collective.
    pub fn import(&mut self, found: Option<&State>) -> Result<()> {
        if let Some(state) = found {
            import_params(&mut self.net, state)?;
        }
        let gradient = &self.gradient;
        self.net.edit_params(|_, params| {
            gradient.reducer().with(|comm, updater| {
                comm.broadcast(SliceMut::from(params), 0)?;
                updater.import(found, comm)
            })
        })?
    }
}
