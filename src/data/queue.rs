//! The bounded queue of batches prepared ahead of the step.
//!
//! A fixed set of batch buffers goes round: free, being filled by a worker, ready, in the step's hands, free again. That
//! is the bound and the backpressure: with no free buffer, workers sleep. A worker first takes a buffer, then, under the
//! schedule's lock, the next batch of the schedule and its ticket, so tickets are given out in order and every ticket
//! given out has a buffer: the batch that the step waits for is always being made, and nothing can deadlock. The filled
//! batch goes into the slot `ticket % slots`. Tickets in flight are consecutive and no more than there are buffers, so
//! slots never clash, and the step takes them in order whichever worker was first. What a batch holds is a function of
//! its place in the schedule alone; the number of workers and their timing change nothing.
//!
//! After the first few batches nothing is allocated: buffers keep their capacity, slots are fixed, locks are futexes.

use super::augment::Augmenter;
use super::partition::{Batching, share};
use super::sampler::Sampler;
use super::{Batch, Dataset};
use crate::config::raw;
use crate::error::{Context, Error, Kind, Result};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// How batches are made.
#[derive(Clone)]
pub struct Loader {
    pub augmenter: Augmenter,
    pub sampler: raw::Sampler,
    pub seed: u64,
    /// Threads of this queue.
    pub workers: usize,
    /// Batches prepared ahead.
    pub prefetch: usize,
}

/// A place in the run: what a checkpoint holds of the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    pub epoch: u32,
    /// Samples of the epoch that all ranks together have used.
    pub consumed: usize,
}

/// Batches in the order of the schedule. Dropping it stops its workers: each ends after the sample that it is reading.
pub struct DataQueue {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// The batch in the step's hands.
    current: Batch,
    /// The ticket that the step waits for.
    next: u64,
}

struct Shared {
    dataset: Arc<dyn Dataset>,
    augmenter: Augmenter,
    seed: u64,
    schedule: Mutex<Tickets>,
    buffers: Mutex<Buffers>,
    /// Signalled when a buffer becomes free, and at the close.
    freed: Condvar,
    /// Signalled when the ticket that the step waits for is done, and at the end.
    filled: Condvar,
    closed: AtomicBool,
}

struct Buffers {
    free: Vec<Batch>,
    /// Done but not yet taken, at `ticket % slots.len()`.
    slots: Vec<Option<(Batch, Result<()>)>>,
    /// Tickets in all, once the schedule has ended.
    end: Option<u64>,
}

struct Tickets {
    schedule: Box<dyn Schedule>,
    given: u64,
}

/// What comes next: fills in the batch's indices and place, or says that there is no more, then and ever after.
trait Schedule: Send {
    fn next(&mut self, batch: &mut Batch) -> bool;
}

impl DataQueue {
    /// This rank's micro-batches from `start` on, epoch after epoch until `epochs` are over: in every step one batch for
    /// each of `batching.micros()`, empty where a short step has no samples for it.
    pub fn train(
        dataset: Arc<dyn Dataset>,
        loader: Loader,
        batching: Batching,
        start: Position,
        epochs: u32,
    ) -> Result<DataQueue> {
        batching.check();
        let samples = dataset.len();
        let Position { epoch, consumed } = start;
        if consumed > samples {
            return Err(Error::data(format!(
                "the run stands {consumed} samples into epoch {epoch}, but the training set has only {samples}; it is \
                 not the set that the checkpoint was made with"
            )));
        }
        let mut training = Training {
            batching,
            epochs,
            sampler: Sampler::new(&*dataset, loader.sampler, loader.seed)?,
            epoch,
            consumed,
            micro: batching.micros().start,
        };
        training.sampler.begin(epoch);
        DataQueue::start(dataset, loader, Box::new(training), batching.largest())
    }

    /// This rank's contiguous share of the set, once, in order, in batches of `batch`; the last may be smaller. `rank` of
    /// `size`; the number of batches may differ by one between ranks.
    pub fn eval(
        dataset: Arc<dyn Dataset>,
        loader: Loader,
        batch: usize,
        rank: usize,
        size: usize,
    ) -> Result<DataQueue> {
        assert!(batch > 0, "evaluation in batches of 0");
        let evaluation = Evaluation { left: share(dataset.len(), rank, size), batch, step: 0 };
        let loader = Loader { augmenter: loader.augmenter.without_randomness(), ..loader };
        DataQueue::start(dataset, loader, Box::new(evaluation), batch)
    }

    fn start(
        dataset: Arc<dyn Dataset>,
        loader: Loader,
        schedule: Box<dyn Schedule>,
        largest: usize,
    ) -> Result<DataQueue> {
        let workers = loader.workers.max(1);
        let ahead = loader.prefetch.max(workers);
        let values = dataset.shape().len();
        let free = (0..ahead).map(|_| buffer(largest, values)).collect::<Result<_>>()?;
        let current = buffer(largest, values)?;
        let shared = Arc::new(Shared {
            dataset,
            augmenter: loader.augmenter,
            seed: loader.seed,
            schedule: Mutex::new(Tickets { schedule, given: 0 }),
            buffers: Mutex::new(Buffers {
                free,
                slots: std::iter::repeat_with(|| None).take(ahead).collect(),
                end: None,
            }),
            freed: Condvar::new(),
            filled: Condvar::new(),
            closed: AtomicBool::new(false),
        });
        let mut queue = DataQueue { shared, workers: Vec::with_capacity(workers), current, next: 0 };
        for number in 0..workers {
            let shared = queue.shared.clone();
            let worker = std::thread::Builder::new().name(format!("data-{number}")).spawn(move || shared.work());
            queue.workers.push(worker.or_kind(Kind::Internal, "starting a data worker")?);
        }
        Ok(queue)
    }

    /// Waits at most `patience` for the next batch and says whether `next` would return at once.
    pub fn ready(&self, patience: Duration) -> bool {
        let buffers = self.shared.buffers.lock().unwrap();
        let waited = self.shared.filled.wait_timeout_while(buffers, patience, |buffers| !buffers.has(self.next));
        waited.unwrap().0.has(self.next)
    }

    /// The next batch, or none after the last. It is the caller's until the next call. The error of a sample comes with
    /// the batch that the sample belongs to, not before.
    #[expect(clippy::should_implement_trait, reason = "the batch borrows the queue, which an Iterator cannot say")]
    pub fn next(&mut self) -> Result<Option<&Batch>> {
        let shared = &self.shared;
        let buffers = shared.buffers.lock().unwrap();
        let mut buffers = shared.filled.wait_while(buffers, |buffers| !buffers.has(self.next)).unwrap();
        let Some((batch, outcome)) = buffers.take(self.next) else { return Ok(None) };
        self.next += 1;
        buffers.free.push(std::mem::replace(&mut self.current, batch));
        drop(buffers);
        shared.freed.notify_one();
        outcome.map(|()| Some(&self.current))
    }
}

/// An empty batch with room for `samples` samples of `values` values each.
fn buffer(samples: usize, values: usize) -> Result<Batch> {
    let mut batch = Batch::default();
    let images = samples.saturating_mul(values);
    let room = (batch.images.try_reserve_exact(images))
        .and_then(|()| batch.labels.try_reserve_exact(samples))
        .and_then(|()| batch.indices.try_reserve_exact(samples))
        .and_then(|()| batch.rounds.try_reserve_exact(samples));
    room.map(|()| batch).map_err(|_| {
        Error::device(format!(
            "out of memory: there is no room for one more batch of {samples} samples of {values} values; lower \
             data.prefetch or the batch"
        ))
    })
}

impl Drop for DataQueue {
    fn drop(&mut self) {
        // Set under the lock: a worker that has just seen it unset is asleep by the time of the signal.
        let buffers = self.shared.buffers.lock().unwrap();
        self.shared.closed.store(true, Relaxed);
        drop(buffers);
        self.shared.freed.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl Buffers {
    /// Whether the step that waits for `ticket` need wait no longer.
    fn has(&self, ticket: u64) -> bool {
        self.slots[ticket as usize % self.slots.len()].is_some() || self.end.is_some_and(|end| ticket >= end)
    }

    fn take(&mut self, ticket: u64) -> Option<(Batch, Result<()>)> {
        let slot = ticket as usize % self.slots.len();
        self.slots[slot].take()
    }
}

impl Shared {
    /// A worker's life.
    fn work(&self) {
        let mut image = vec![0; self.dataset.shape().len()];
        while let Some(mut batch) = self.free_buffer() {
            let Some(ticket) = self.schedule.lock().unwrap().next(&mut batch) else { return self.end() };
            let outcome = catch_unwind(AssertUnwindSafe(|| self.fill(&mut batch, &mut image)))
                .unwrap_or_else(|_| Err(Error::internal("a data worker panicked; its message is above")));
            let mut buffers = self.buffers.lock().unwrap();
            let slot = ticket as usize % buffers.slots.len();
            assert!(buffers.slots[slot].is_none(), "ticket {ticket} finds its slot taken");
            buffers.slots[slot] = Some((batch, outcome));
            drop(buffers);
            self.filled.notify_one();
        }
    }

    /// Sleeps until there is a free buffer; none when the queue is closed.
    fn free_buffer(&self) -> Option<Batch> {
        let buffers = self.buffers.lock().unwrap();
        let none_free = |buffers: &mut Buffers| buffers.free.is_empty() && !self.closed.load(Relaxed);
        let mut buffers = self.freed.wait_while(buffers, none_free).unwrap();
        if self.closed.load(Relaxed) { None } else { buffers.free.pop() }
    }

    /// Tells the step how many batches there are. The other workers come here by themselves.
    fn end(&self) {
        let given = self.schedule.lock().unwrap().given;
        self.buffers.lock().unwrap().end = Some(given);
        self.filled.notify_one();
    }

    /// Reads and augments the samples that `batch.indices` names. image: bytes of one sample.
    fn fill(&self, batch: &mut Batch, image: &mut [u8]) -> Result<()> {
        batch.labels.clear();
        batch.images.resize(batch.indices.len() * image.len(), 0.0);
        for (&index, out) in batch.indices.iter().zip(batch.images.chunks_exact_mut(image.len())) {
            if self.closed.load(Relaxed) {
                break;
            }
            self.dataset.read(index as usize, image).map_err(|error| {
                error.context(format_args!("sample {index}, wanted in epoch {} by step {}", batch.epoch, batch.step))
            })?;
            self.augmenter.apply(image, out, self.seed, batch.epoch, index);
            batch.labels.push(self.dataset.label(index as usize));
        }
        Ok(())
    }
}

impl Tickets {
    /// Fills in the next batch's place and gives its ticket.
    fn next(&mut self, batch: &mut Batch) -> Option<u64> {
        batch.indices.clear();
        batch.rounds.clear();
        let more = self.schedule.next(batch);
        self.given += u64::from(more);
        more.then(|| self.given - 1)
    }
}

/// Shuffled epochs, from anywhere in one of them.
struct Training {
    batching: Batching,
    epochs: u32,
    /// The order of `epoch`.
    sampler: Sampler,
    epoch: u32,
    consumed: usize,
    /// The micro-batch of this rank that is next in the step.
    micro: usize,
}

impl Schedule for Training {
    fn next(&mut self, batch: &mut Batch) -> bool {
        let (samples, micros) = (self.sampler.len(), self.batching.micros());
        if self.micro == micros.end {
            self.micro = micros.start;
            self.consumed = self.batching.step(samples, self.consumed).end;
        }
        if self.consumed == samples {
            self.epoch += 1;
            self.consumed = 0;
            self.sampler.begin(self.epoch);
        }
        if self.epoch >= self.epochs {
            return false;
        }
        let step = self.batching.step(samples, self.consumed);
        let positions = self.batching.positions(&step, self.micro);
        batch.epoch = self.epoch;
        batch.step = self.consumed / self.batching.global;
        batch.micro = self.micro;
        batch.position = positions.start;
        batch.step_count = step.len();
        batch.indices.extend_from_slice(self.sampler.indices(positions.clone()));
        batch.rounds.extend_from_slice(self.sampler.rounds(positions));
        self.micro += 1;
        true
    }
}

/// A contiguous range, once.
struct Evaluation {
    left: Range<usize>,
    batch: usize,
    step: usize,
}

impl Schedule for Evaluation {
    fn next(&mut self, batch: &mut Batch) -> bool {
        let end = self.left.end.min(self.left.start + self.batch);
        let positions = self.left.start..end;
        batch.step = self.step;
        batch.position = positions.start;
        batch.step_count = positions.len();
        batch.rounds.resize(positions.len(), 0);
        batch.indices.extend(positions.map(|position| position as u32));
        self.left.start = end;
        self.step += 1;
        !batch.indices.is_empty()
    }
}

#[cfg(test)]
mod tests;
