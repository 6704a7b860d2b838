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

use crate::comm::bucket::Reducer;
use crate::comm::{Communicator, split};
use crate::data::queue::DataQueue;
use crate::device::{self, Arena};
use crate::error::Result;
use crate::launch::watch::{Health, Phase};
use crate::model::Pass;
use crate::model::loss::Loss;
use crate::model::net::Net;
use crate::model::params::{ParamTable, TAIL};
use crate::report::budget::{Category, Clock};
use std::ops::Range;
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
    /// How many ranks were asked by a signal to stop.
    pub stop: f32,
    /// How many ranks found the run's time to be up.
    pub deadline: f32,
}

impl Sums {
    fn to_tail(self) -> [f32; TAIL] {
        let mut tail = [0.0; TAIL];
        tail[..5].copy_from_slice(&[self.loss, self.correct, self.samples, self.stop, self.deadline]);
        tail
    }

    fn from_tail(tail: &[f32]) -> Sums {
        Sums { loss: tail[0], correct: tail[1], samples: tail[2], stop: tail[3], deadline: tail[4] }
    }
}

/// What a leaf of the tree works with.
pub struct Work<'a> {
    pub net: &'a mut Net,
    pub loss: &'a Loss,
    pub queue: &'a mut DataQueue,
    pub clock: &'a mut Clock,
    pub health: &'a Health,
    /// Number of this step, from 1.
    pub step: u64,
    /// Samples of an epoch: with the position, a sample's place in the run.
    pub samples: usize,
    /// This rank's `stop` and `deadline`; the rest is filled in by the leaves.
    pub flags: Sums,
    /// Where a loss that is not finite arose on this rank.
    pub non_finite: Option<String>,
}

pub struct Gradient {
    /// Before the arenas, so that it is dropped before them: its thread may still be at work in one after an error.
    outbox: Outbox,
    /// By depth of the tree.
    arenas: Vec<Arena>,
    /// This rank's micro-batches of a step.
    micros: usize,
    tail: Range<usize>,
}

/// The way from a finished gradient to the other ranks.
struct Outbox {
    reducer: Reducer,
    buckets: Vec<Range<usize>>,
    /// Buckets of this step that were handed to the reducer.
    started: usize,
}

impl Gradient {
    /// `micros`: this rank's micro-batches of a step, at least one. Collective.
    pub fn new(
        mut comm: Box<dyn Communicator>,
        table: &ParamTable,
        micros: usize,
        bucket_bytes: usize,
        overlap: bool,
    ) -> Result<Gradient> {
        let bytes = table.len_with_tail() * size_of::<f32>();
        let depth = micros.next_power_of_two().ilog2() as usize;
        let mut arenas = vec![comm.allocate(bytes)?];
        for _ in 0..depth {
            arenas.push(Arena::host(bytes)?);
        }
        let buckets = table.buckets(bucket_bytes);
        let reducer = Reducer::new(comm, buckets.len(), overlap)?;
        Ok(Gradient { arenas, outbox: Outbox { reducer, buckets, started: 0 }, micros, tail: table.tail.clone() })
    }

    pub fn buckets(&self) -> usize {
        self.outbox.buckets.len()
    }

    /// The elements of a bucket.
    pub fn range(&self, bucket: usize) -> Range<usize> {
        self.outbox.buckets[bucket].clone()
    }

    /// For the ranks' other collectives, between steps.
    pub fn reducer(&mut self) -> &mut Reducer {
        &mut self.outbox.reducer
    }

    /// Forward and backward of this rank's part of the step. On return the reduction of every bucket has been started.
    pub fn compute(&mut self, work: &mut Work<'_>) -> Result<()> {
        self.outbox.started = 0;
        self.tree(self.micros, 0, true, work)
    }

    /// Waits until a bucket holds the sum over all ranks. Returns for how long other ranks were waited for meanwhile.
    pub fn wait(&mut self, bucket: usize) -> Result<Duration> {
        self.outbox.reducer.wait(bucket)
    }

    /// The elements of a bucket and, after `wait`, their sums.
    pub fn bucket(&mut self, bucket: usize) -> (Range<usize>, &mut [f32]) {
        let range = self.outbox.buckets[bucket].clone();
        // SAFETY: the reducer is done with this bucket, and backward writes it only after the next `compute`.
        let values = unsafe { self.arenas[0].slice_mut(bytes(&range)) }.into_f32();
        (range, values)
    }

    /// After the last `wait`: the sums of the step.
    pub fn sums(&self) -> Sums {
        // SAFETY: nobody writes between steps.
        Sums::from_tail(unsafe { self.arenas[0].slice(bytes(&self.tail)) }.f32())
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
            join(&self.arenas, depth, &(0..self.tail.end));
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
        let (arenas, outbox) = (&self.arenas[..], &mut self.outbox);
        let arena = &arenas[depth];
        let mut sums = if last { work.flags } else { Sums::default() };
        if batch.count() == 0 {
            // SAFETY: nothing of this step has been started, and the last one is over.
            unsafe { arena.slice_mut(0..self.tail.end * size_of::<f32>()) }.f32().fill(0.0);
            write_tail(arena, &self.tail, sums);
        } else {
            let pass = Pass {
                batch: batch.count(),
                training: true,
                first_sample: u64::from(batch.epoch) * work.samples as u64 + batch.position as u64,
                share: batch.count() as f32 / batch.step_count as f32,
            };
            let net = &mut *work.net;
            work.health.set(work.step, Phase::Forward);
            net.forward(&pass, &batch.images)?;
            let (outputs, grad) = net.output_and_gradient(&pass);
            let out = work.loss.forward_backward(outputs, &batch.labels, 1.0 / batch.step_count as f32, grad);
            if !out.loss_sum.is_finite() && work.non_finite.is_none() {
                work.non_finite = Some(net.find_non_finite(&pass, &batch.images)?);
            }
            sums = Sums { loss: out.loss_sum, correct: out.correct as f32, samples: batch.count() as f32, ..sums };
            write_tail(arena, &self.tail, sums);
            work.health.set(work.step, Phase::Backward);
            net.backward(&pass, &batch.images, arena, |final_elements| match last {
                true => outbox.ready(arenas, depth, final_elements),
                false => Ok(()),
            })?;
        }
        if last {
            outbox.ready(arenas, depth, self.tail.end)?;
        }
        work.clock.lap(Category::Compute);
        Ok(())
    }
}

impl Outbox {
    /// The first `elements` of the step's last leaf are final: adds them up the right edge of the tree, where every left
    /// sibling is complete, and starts the buckets that they fill.
    fn ready(&mut self, arenas: &[Arena], depth: usize, elements: usize) -> Result<()> {
        while let Some(bucket) = self.buckets.get(self.started).filter(|bucket| bucket.end <= elements) {
            (0..depth).rev().for_each(|depth| join(arenas, depth, bucket));
            // SAFETY: this rank leaves the bucket alone until `wait` has returned it.
            unsafe { self.reducer.start(self.started, arenas[0].slice_mut(bytes(bucket))) }?;
            self.started += 1;
        }
        Ok(())
    }
}

/// Adds the right child, one arena down, to the left one.
fn join(arenas: &[Arena], depth: usize, elements: &Range<usize>) {
    // SAFETY: two arenas, and neither is in the reducer's hands in this range.
    let (sum, term) = unsafe { (arenas[depth].slice_mut(bytes(elements)), arenas[depth + 1].slice(bytes(elements))) };
    device::add(sum, term);
}

fn write_tail(arena: &Arena, tail: &Range<usize>, sums: Sums) {
    // SAFETY: the tail belongs to the last bucket, which starts after the last leaf.
    unsafe { arena.slice_mut(bytes(tail)) }.f32().copy_from_slice(&sums.to_tail());
}

fn bytes(elements: &Range<usize>) -> Range<usize> {
    elements.start * size_of::<f32>()..elements.end * size_of::<f32>()
}
