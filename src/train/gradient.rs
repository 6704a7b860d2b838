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
use super::judge::Judge;
use super::replay::{Cut, Key, Replay, Tape, Turn};
use super::update::{Content, Part, Reduction, Update, bytes};
use crate::comm::bucket::{Reducer, Waited};
use crate::comm::{Communicator, split};
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
use std::time::{Duration, Instant};

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
    pub feed: &'a mut Feed,
    pub judge: &'a mut Judge,
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
    /// Of this rank's micro-batches of a step: the passes, but of those without samples; and how many of them are done.
    passes: Vec<Option<Pass>>,
    done: usize,
    /// By layer: where it leaves its factors instead of a gradient.
    leaves: Vec<Option<Leaves>>,
    /// Where passes are recorded.
    replay: Option<Replay>,
    /// See `launched`.
    launched: Instant,
}

/// Where the sums of the tree are held, on the net's device.
struct Levels {
    /// By depth.
    grads: Vec<Arc<Arena>>,
    elementwise: Elementwise,
}

/// The way from a finished gradient to the other ranks and into the parameters.
struct Outbox {
    reducer: Reducer<Box<dyn Update>>,
    /// On a GPU.
    reduction: Option<Arc<dyn Reduction>>,
    /// The buckets, and the tail.
    parts: Vec<Part>,
    /// Where the tail's elements are in host memory.
    tail: (Arc<Arena>, Range<usize>),
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
        replay: Option<Replay>,
    ) -> Result<Gradient> {
        let levels = Levels::new(&*updater, micros.next_power_of_two().ilog2() as usize)?;
        let (parts, reduction, leaves) = (updater.parts(), updater.reduction(), updater.leaves());
        let (arena, elements) = updater.tail();
        let tail = (arena.clone(), elements);
        let reducer = Reducer::new(comm, updater, parts.len(), overlap)?;
        let outbox = Outbox { reducer, reduction, parts, tail, started: 0 };
        let launched = Instant::now();
        Ok(Gradient { levels, outbox, passes: vec![None; micros], done: 0, leaves, replay, launched })
    }

    /// The buckets, and the tail: as many `wait`s a step.
    pub fn parts(&self) -> usize {
        self.outbox.parts.len()
    }

    /// The elements of a part.
    pub fn range(&self, part: usize) -> Range<usize> {
        self.outbox.parts[part].elements.clone()
    }

    /// When the first pass of the last step was in the stream of a GPU, which had work from then on.
    pub fn launched(&self) -> Instant {
        self.launched
    }

    /// For the ranks' other collectives, and with the optimizer, between steps.
    pub fn reducer(&self) -> &Reducer<Box<dyn Update>> {
        &self.outbox.reducer
    }

    /// Forward and backward of this rank's share of the step. On return every part has been started. Where the net is on a GPU
    /// the losses are waited for last of all, when all its work is in the streams.
    pub fn compute(&mut self, work: &mut Work<'_>) -> Result<()> {
        (self.outbox.started, self.done) = (0, 0);
        self.tree(self.passes.len(), 0, true, work)?;
        work.feed.look_ahead()?;
        let tail = self.total(0..self.passes.len(), work)?;
        self.outbox.send_tail(tail)
    }

    /// Waits until a part is reduced over all ranks and, where that needs no norms, its parameters are updated on all of
    /// them; on a GPU, until all of that is in its streams. Returns what of this did not go into work.
    pub fn wait(&mut self, part: usize) -> Result<Waited> {
        self.outbox.reducer.wait(part)
    }

    /// After the last `wait`: the sums of the step.
    pub fn sums(&self) -> Sums {
        // SAFETY: nobody writes between steps.
        let tail = unsafe { self.outbox.tail() }.into_f32();
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
            let mut gradients = self.outbox.parts.iter().filter(|part| part.content == Content::Gradients);
            gradients.try_for_each(|part| self.levels.join(depth, part))?;
        }
        Ok(())
    }

    fn leaf(&mut self, depth: usize, last: bool, work: &mut Work<'_>) -> Result<()> {
        work.feed.release()?;
        work.clock.lap(Category::Compute);
        work.health.set(work.step, Phase::Data);
        while !work.feed.ready(PATIENCE) {
            work.health.check()?;
        }
        let fed = work.feed.next()?.expect("the queue goes on until the run's last epoch is over");
        work.clock.lap(Category::Data);
        let (batch, micro) = (fed.batch, self.done);
        let pass = (batch.count() > 0).then(|| Pass {
            batch: batch.count(),
            training: true,
            first_sample: u64::from(batch.epoch) * work.samples as u64 + batch.position as u64,
            share: batch.count() as f32 / batch.step_count as f32,
        });
        (self.passes[micro], self.done) = (pass, micro + 1);
        match pass {
            Some(pass) => self.pass(depth, last, work, pass)?,
            None => {
                for leaves in self.leaves.iter().flatten() {
                    leaves.next(micro, 0);
                }
                self.levels.clear(depth)?;
                if last {
                    self.outbox.ready(&self.levels, depth, self.outbox.gradients(), &mut Tape::off())?;
                }
            }
        }
        if micro == 0 {
            self.launched = Instant::now();
        }
        work.clock.lap(Category::Compute);
        Ok(())
    }

    /// Forward and backward of the feed's batch.
    fn pass(&mut self, depth: usize, last: bool, work: &mut Work<'_>, pass: Pass) -> Result<()> {
        let Work { net, feed, judge, health, non_finite, step, .. } = work;
        let (micro, fed) = (self.done - 1, feed.current());
        let (levels, outbox, leaves) = (&self.levels, &mut self.outbox, &self.leaves);
        health.set(*step, Phase::Forward);
        net.begin(&pass)?;
        let key = Key { micro, batch: pass.batch, step_count: fed.batch.step_count };
        let mut tape =
            match self.replay.as_mut().filter(|_| !net.is_timed()).map(|replay| replay.turn(key)).transpose()? {
                None => Tape::off(),
                Some(Turn::Call(tape)) => tape,
                // SAFETY: nobody touches memory of the net, the feed or the gradient while a step goes on, but the stream.
                Some(Turn::Launch(recorded)) => unsafe {
                    return recorded.launch(|cut| match cut {
                        Cut::Judged => judge.taught(micro),
                        Cut::Written(buckets) => outbox.hand_over(buckets),
                        Cut::End => Ok(()),
                    });
                },
            };
        net.forward_begun(&pass, fed.images)?;
        judge.teach(net, &pass, &fed, 1.0 / fed.batch.step_count as f32, micro)?;
        tape.cut(Cut::Judged, || judge.taught(micro))?;
        if let Some(out) = judge.found_at_once(micro)
            && !out.loss_sum.is_finite()
            && non_finite.is_none()
        {
            *non_finite = Some(net.find_non_finite(&pass, fed.images)?);
        }
        health.set(*step, Phase::Backward);
        let factors = |node: usize| match leaves.get(node) {
            Some(Some(leaves)) => leaves.next(micro, pass.batch),
            _ => SliceMut::empty(),
        };
        net.backward_with_factors(&pass, fed.images, &levels.grads[depth], factors, |final_elements| match last {
            true => outbox.ready(levels, depth, final_elements, &mut tape),
            false => Ok(()),
        })?;
        if last {
            outbox.ready(levels, depth, outbox.gradients(), &mut tape)?;
        }
        tape.cut(Cut::End, || Ok(()))
    }

    /// What these micro-batches add to the step's sums, by the same tree.
    fn total(&self, micros: Range<usize>, work: &mut Work<'_>) -> Result<[f32; TAIL]> {
        if micros.len() == 1 {
            return self.found(micros.start, work).map(Sums::to_tail);
        }
        let middle = micros.start + split(micros.len());
        let (mut sum, right) = (self.total(micros.start..middle, work)?, self.total(middle..micros.end, work)?);
        sum.iter_mut().zip(right).for_each(|(sum, term)| *sum += term);
        Ok(sum)
    }

    fn found(&self, micro: usize, work: &mut Work<'_>) -> Result<Sums> {
        let last = micro + 1 == self.passes.len();
        let sums = if last { work.flags } else { Sums::default() };
        let Some(pass) = &self.passes[micro] else { return Ok(sums) };
        let out = work.judge.found(micro, work.health)?;
        if !out.loss_sum.is_finite() && work.judge.found_at_once(micro).is_none() {
            // The GPU has halted the update, and of the last pass the samples are still there.
            work.non_finite = Some(match last {
                true => work.net.find_non_finite(pass, work.feed.current().images)?,
                false => format!("it arose in micro-batch {} of {} of this rank", micro + 1, self.passes.len()),
            });
        }
        let loss = sums.loss + out.loss_sum;
        Ok(Sums { loss, correct: out.correct as f32, samples: pass.batch as f32, ..sums })
    }
}

impl Outbox {
    /// The first `elements` of the step's last leaf are final: adds them up the right edge of the tree, where every left
    /// sibling is complete, and starts the parts that they fill.
    fn ready(&mut self, levels: &Levels, depth: usize, elements: usize, tape: &mut Tape<'_>) -> Result<()> {
        let filled = self.parts[self.started..].iter().take_while(|part| part.elements.end <= elements).count();
        if filled == 0 {
            return Ok(());
        }
        for part in &self.parts[self.started..self.started + filled] {
            let joins = if part.content == Content::Factors { 0 } else { depth };
            (0..joins).rev().try_for_each(|depth| levels.join(depth, part))?;
        }
        tape.cut(Cut::Written(filled), || self.hand_over(filled))
    }

    /// Starts the next parts, whose gradients are written.
    fn hand_over(&mut self, parts: usize) -> Result<()> {
        for _ in 0..parts {
            let gradients = self.parts[self.started].content == Content::Gradients;
            if let Some(reduction) = self.reduction.as_ref().filter(|_| gradients) {
                reduction.written(self.started)?;
            }
            self.start()?;
        }
        Ok(())
    }

    /// Starts the last part, when all buckets are.
    fn send_tail(&mut self, values: [f32; TAIL]) -> Result<()> {
        // SAFETY: the tail is not started.
        unsafe { self.tail() }.f32().copy_from_slice(&values);
        self.start()
    }

    fn start(&mut self) -> Result<()> {
        // SAFETY: this rank leaves these gradients alone until `wait` has returned; and their parameters, since their layers'
        // backward is over, and forward does not begin before.
        unsafe { self.reducer.start(self.started) }?;
        self.started += 1;
        Ok(())
    }

    /// Elements of all buckets.
    fn gradients(&self) -> usize {
        self.parts.last().expect("there is a tail").elements.start
    }

    /// # Safety
    /// Nobody else touches it during the returned lifetime.
    unsafe fn tail<'a>(&self) -> SliceMut<'a> {
        let (arena, elements) = &self.tail;
        // SAFETY: the caller's promise.
        unsafe { arena.slice_mut(bytes(elements)) }
    }
}

impl Levels {
    /// For a tree of this depth; at its root is what the ranks reduce.
    fn new(updater: &dyn Update, depth: usize) -> Result<Levels> {
        let root = updater.grads();
        let mut grads = vec![root.clone()];
        for _ in 0..depth {
            grads.push(Arc::new(device::allocate(root.place(), root.bytes())?));
        }
        Ok(Levels { elementwise: Elementwise::new(root.place(), Precision::F32)?, grads })
    }

    /// Adds the right child, one level down, to the left one.
    fn join(&self, depth: usize, part: &Part) -> Result<()> {
        let range = bytes(&part.elements);
        // SAFETY: two arenas, and neither is in the reducer's hands in this range; on a GPU in the order of its stream.
        unsafe { self.elementwise.add(self.grads[depth].slice_mut(range.clone()), self.grads[depth + 1].slice(range)) }
    }

    /// A leaf without samples has no gradient.
    fn clear(&self, depth: usize) -> Result<()> {
        let grads = &self.grads[depth];
        // SAFETY: nothing of this step has been started, and the last one is over.
        unsafe { self.elementwise.clear(grads.slice_mut(0..grads.bytes())) }
    }
}
