//! The gradient of one step on one rank: forward and backward of its micro-batches, summed in a pairwise tree, with
//! each bucket handed to the reducer the moment it is final.
//!
//! The tree splits as `comm::split` says. A rank that holds M / N of M micro-batches computes one subtree of the tree
//! over M, and the all-reduce joins the subtrees of N ranks: with N a power of two that divides M, the sum is the same
//! tree, so 1, 2, 4 and 8 ranks get the same bits. The depth of the tree bounds the arenas: ceil(log2(M / N)) + 1.
//!
//! ```text
//! arena 0   m0, then m0 + m1, then (m0 + m1) + (m2 + m3): what the ranks reduce
//! arena 1       m1,                then  m2 + m3
//! arena 2                     m3
//! ```

use super::factors::Leaves;
use super::feed::Feed;
use super::update::{Content, Part, Reduction, Update, bytes};
use crate::comm::bucket::{Reducer, Waited};
use crate::comm::{Communicator, split};
use crate::data::queue::DataQueue;
use crate::device::{self, Arena, SliceMut};
use crate::error::Result;
use crate::launch::signals::STOP;
use crate::launch::watch::{Health, Phase};
use crate::model::Pass;
use crate::model::elementwise::Elementwise;
use crate::model::net::Net;
use crate::model::params::TAIL;
use crate::model::precision::Precision;
use crate::report::budget::{Category, Clock};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// How long the wait for a batch goes on before it looks whether the peers are alive.
const PATIENCE: Duration = Duration::from_millis(50);

/// What a step sums over all ranks beside the gradient: it travels in the tail of the gradient arena.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sums {
    /// Sum of the samples' losses.
    pub loss: f32,
    pub correct: f32,
    pub samples: f32,
    /// How many ranks were first asked to stop by which signal, in the order of `signals::STOP`.
    pub signals: [f32; STOP.len()],
    /// How many ranks found the run's time to be up.
    pub deadline: f32,
    /// How many ranks found the end of the job to be near.
    pub time_limit: f32,
}

impl Sums {
    fn to_tail(self) -> [f32; TAIL] {
        let Sums { loss, correct, samples, signals: [term, usr1, hup, int], deadline, time_limit } = self;
        let mut tail = [0.0; TAIL];
        tail[..9].copy_from_slice(&[loss, correct, samples, term, usr1, hup, int, deadline, time_limit]);
        tail
    }

    fn from_tail(tail: &[f32; TAIL]) -> Sums {
        let [loss, correct, samples, term, usr1, hup, int, deadline, time_limit, ..] = *tail;
        Sums { loss, correct, samples, signals: [term, usr1, hup, int], deadline, time_limit }
    }

    /// That by which a rank was asked to stop; of several the first of `STOP`.
    pub fn signal(&self) -> Option<i32> {
        STOP.into_iter().zip(self.signals).find_map(|(signal, ranks)| (ranks > 0.0).then_some(signal))
    }
}

/// What a leaf of the tree works with.
pub struct Work<'a> {
    pub net: &'a mut Net,
    pub feed: &'a Feed,
    pub queue: &'a mut DataQueue,
    pub clock: &'a mut Clock,
    pub health: &'a Health,
    /// Number of this step, from 1.
    pub step: u64,
    /// Samples of an epoch: with the position, a sample's place in the run.
    pub samples: usize,
    /// This rank's wishes to stop, and a `loss` to start from; the rest is filled in by the leaves.
    pub flags: Sums,
    /// Where a loss that is not finite arose on this rank.
    pub non_finite: Option<String>,
}

pub struct Gradient {
    outbox: Outbox,
    /// By depth of the tree.
    levels: Levels,
    /// This rank's micro-batches of a step, and how many of them are done.
    micros: usize,
    done: usize,
    /// By layer: where it leaves its factors instead of a gradient.
    leaves: Vec<Option<Leaves>>,
}

/// Where the sums of the tree are held: the gradient's on the net's device, those of the step's tail in host memory.
struct Levels {
    /// By depth.
    grads: Vec<Arc<Arena>>,
    tails: Vec<Tail>,
    elementwise: Elementwise,
}

/// The elements of an arena.
struct Tail(Arc<Arena>, Range<usize>);

impl Tail {
    /// # Safety
    /// Nobody else touches them during the returned lifetime.
    unsafe fn values<'a>(&self) -> SliceMut<'a> {
        // SAFETY: the caller's promise.
        unsafe { self.0.slice_mut(bytes(&self.1)) }
    }
}

/// The way from a finished gradient to the other ranks and into the parameters.
struct Outbox {
    reducer: Reducer<Box<dyn Update>>,
    /// On a GPU.
    reduction: Option<Arc<dyn Reduction>>,
    /// The buckets, and the tail.
    parts: Vec<Part>,
    /// Parts of this step that were handed to the reducer.
    started: usize,
}

impl Gradient {
    /// `micros`: this rank's micro-batches of a step, at least one.
    pub fn new(
        comm: Box<dyn Communicator>,
        updater: Box<dyn Update>,
        micros: usize,
        overlap: bool,
    ) -> Result<Gradient> {
        let levels = Levels::new(&*updater, micros.next_power_of_two().ilog2() as usize)?;
        let (parts, reduction, leaves) = (updater.parts(), updater.reduction(), updater.leaves());
        let reducer = Reducer::new(comm, updater, parts.len(), overlap)?;
        Ok(Gradient { levels, outbox: Outbox { reducer, reduction, parts, started: 0 }, micros, done: 0, leaves })
    }

    /// The buckets, and the tail: as many `wait`s a step.
    pub fn parts(&self) -> usize {
        self.outbox.parts.len()
    }

    /// The elements of a part.
    pub fn range(&self, part: usize) -> Range<usize> {
        self.outbox.parts[part].elements.clone()
    }

    /// For the ranks' other collectives, and with the optimizer, between steps.
    pub fn reducer(&self) -> &Reducer<Box<dyn Update>> {
        &self.outbox.reducer
    }

    /// Forward and backward of this rank's share of the step. On return every part has been started.
    pub fn compute(&mut self, work: &mut Work<'_>) -> Result<()> {
        (self.outbox.started, self.done) = (0, 0);
        self.tree(self.micros, 0, true, work)
    }

    /// Waits until a part is reduced over all ranks and, where that needs no norms, its parameters are updated on all of
    /// them; on a GPU, until all of that is in its streams. Returns what of this did not go into work.
    pub fn wait(&mut self, part: usize) -> Result<Waited> {
        self.outbox.reducer.wait(part)
    }

    /// After the last `wait`: the sums of the step.
    pub fn sums(&self) -> Sums {
        // SAFETY: nobody writes between steps.
        let tail = unsafe { self.levels.tails[0].values() }.into_f32();
        Sums::from_tail((&*tail).try_into().expect("the tail has its length"))
    }

    /// Leaves the sum of the next `micros` micro-batches in the arena of this depth. `last` says that the step ends with
    /// them, so that what is final can go out.
    fn tree(&mut self, micros: usize, depth: usize, last: bool, work: &mut Work<'_>) -> Result<()> {
        if micros == 1 {
            return self.leaf(depth, last, work);
        }
        let left = split(micros);
        self.tree(left, depth, false, work)?;
        self.tree(micros - left, depth + 1, last, work)?;
        if !last {
            let mut gradients = self.outbox.parts.iter().filter(|part| part.content != Content::Factors);
            gradients.try_for_each(|part| self.levels.join(depth, part))?;
        }
        Ok(())
    }

    fn leaf(&mut self, depth: usize, last: bool, work: &mut Work<'_>) -> Result<()> {
        work.health.set(work.step, Phase::Data);
        while !work.queue.ready(PATIENCE) {
            work.health.check()?;
        }
        let batch = work.queue.next()?.expect("the queue goes on until the run's last epoch is over");
        work.clock.lap(Category::Data);
        let (levels, outbox, leaves, micro) = (&self.levels, &mut self.outbox, &self.leaves, self.done);
        self.done += 1;
        let mut sums = if last { work.flags } else { Sums::default() };
        if batch.count() == 0 {
            for leaves in leaves.iter().flatten() {
                leaves.next(micro, 0);
            }
            levels.clear(depth)?;
            levels.write_tail(depth, sums);
        } else {
            let pass = Pass {
                batch: batch.count(),
                training: true,
                first_sample: u64::from(batch.epoch) * work.samples as u64 + batch.position as u64,
                share: batch.count() as f32 / batch.step_count as f32,
            };
            let net = &mut *work.net;
            work.health.set(work.step, Phase::Forward);
            let images = work.feed.images(batch)?;
            net.forward(&pass, images)?;
            let out = work.feed.judge_and_teach(net, &pass, &batch.labels, 1.0 / batch.step_count as f32)?;
            if !out.loss_sum.is_finite() && work.non_finite.is_none() {
                work.non_finite = Some(net.find_non_finite(&pass, images)?);
            }
            let loss = sums.loss + out.loss_sum;
            sums = Sums { loss, correct: out.correct as f32, samples: batch.count() as f32, ..sums };
            levels.write_tail(depth, sums);
            work.health.set(work.step, Phase::Backward);
            let factors = |node: usize| match leaves.get(node) {
                Some(Some(leaves)) => leaves.next(micro, batch.count()),
                _ => SliceMut::empty(),
            };
            net.backward_with_factors(&pass, images, &levels.grads[depth], factors, |final_elements| match last {
                true => outbox.ready(levels, depth, final_elements),
                false => Ok(()),
            })?;
        }
        if last {
            outbox.ready(levels, depth, usize::MAX)?;
        }
        work.clock.lap(Category::Compute);
        Ok(())
    }
}

impl Outbox {
    /// The first `elements` of the step's last leaf are final: adds them up the right edge of the tree, where every left
    /// sibling is complete, and starts the parts that they fill.
    fn ready(&mut self, levels: &Levels, depth: usize, elements: usize) -> Result<()> {
        while let Some(part) = self.parts.get(self.started).filter(|part| part.elements.end <= elements) {
            let joins = if part.content == Content::Factors { 0 } else { depth };
            (0..joins).rev().try_for_each(|depth| levels.join(depth, part))?;
            if let Some(reduction) = self.reduction.as_ref().filter(|_| part.content == Content::Gradients) {
                reduction.written(self.started)?;
            }
            // SAFETY: this rank leaves these gradients alone until `wait` has returned; and their parameters, since their
            // layers' backward is over, and forward does not begin before.
            unsafe { self.reducer.start(self.started) }?;
            self.started += 1;
        }
        Ok(())
    }
}

impl Levels {
    /// For a tree of this depth; at its root is what the ranks reduce.
    fn new(updater: &dyn Update, depth: usize) -> Result<Levels> {
        let (root, (arena, elements)) = (updater.grads(), updater.tail());
        let (mut grads, mut tails) = (vec![root.clone()], vec![Tail(arena.clone(), elements)]);
        for _ in 0..depth {
            grads.push(Arc::new(device::allocate(root.place(), root.bytes())?));
            tails.push(Tail(Arc::new(Arena::host(TAIL * size_of::<f32>())?), 0..TAIL));
        }
        Ok(Levels { elementwise: Elementwise::new(root.place(), Precision::F32)?, grads, tails })
    }

    /// Adds the right child, one level down, to the left one.
    fn join(&self, depth: usize, part: &Part) -> Result<()> {
        // SAFETY: two arenas, and neither is in the reducer's hands in this range; on a GPU in the order of its stream.
        unsafe {
            if part.content == Content::Tail {
                let [sum, term] = [depth, depth + 1].map(|depth| self.tails[depth].values());
                device::add(sum, term.into_shared());
                return Ok(());
            }
            let range = bytes(&part.elements);
            self.elementwise.add(self.grads[depth].slice_mut(range.clone()), self.grads[depth + 1].slice(range))
        }
    }

    /// A leaf without samples has no gradient.
    fn clear(&self, depth: usize) -> Result<()> {
        let grads = &self.grads[depth];
        // SAFETY: nothing of this step has been started, and the last one is over.
        unsafe { self.elementwise.clear(grads.slice_mut(0..grads.bytes())) }
    }

    fn write_tail(&self, depth: usize, sums: Sums) {
        // SAFETY: the tail is the last part to be started, after the last leaf.
        unsafe { self.tails[depth].values() }.f32().copy_from_slice(&sums.to_tail());
    }
}
