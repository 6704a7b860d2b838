//! The bounded queue of batches prepared ahead of the step.
//!
//! A fixed set of batch buffers goes round: free, being filled, ready, in the step's hands, free again. That is the bound and
//! the backpressure: with no free buffer, workers sleep. Batches are opened one after another, each with a ticket, and the
//! workers share out the samples of the open one a few at a time, so a sample that takes long holds up nobody but its own
//! batch: the others take the rest of that batch, then open the next. A batch lies in the slot `ticket % slots`; tickets in
//! flight are consecutive and no more than there are buffers, so slots never clash, and the step takes them in order. Every
//! ticket has a buffer and every sample of it a worker before the next is opened: the batch that the step waits for is always
//! being made, and nothing can deadlock. What a batch holds is a function of its place in the schedule alone, and each sample
//! is written at its own place; the number of workers and their timing change nothing.
//!
//! After the first few batches nothing is allocated: buffers keep their capacity, slots are fixed, locks are futexes.

mod schedule;

use super::augment::{Augmenter, Workspace};
use super::batch::{Desk, Form};
use super::image::Image;
use super::partition::{Batching, share};
use super::sampler::Sampler;
use super::{Batch, Dataset, Reading};
use crate::config::raw;
use crate::error::{Context, Error, Kind, Result};
use schedule::{Evaluation, Schedule, Training};
use std::collections::HashSet;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Values that a worker takes on at a time: one photograph, or many small images, which are not worth a lock each.
const VALUES_AT_A_TIME: usize = 1 << 16;

/// How batches are made.
#[derive(Clone)]
pub struct Loader {
    pub augmenter: Augmenter,
    pub form: Form,
    pub sampler: raw::Sampler,
    pub seed: u64,
    /// Threads of this queue.
    pub workers: usize,
    /// Batches prepared ahead.
    pub prefetch: usize,
    /// Shared by all queues of a rank.
    pub skipped: Arc<Skipped>,
}

/// Images that were passed over because they are damaged.
#[derive(Debug, Default)]
pub struct Skipped {
    times: AtomicU64,
    /// What has been warned of.
    named: Mutex<HashSet<String>>,
}

impl Skipped {
    /// How often one was wanted.
    pub fn times(&self) -> u64 {
        self.times.load(Relaxed)
    }

    /// Counts it, and warns the first time.
    fn note(&self, reason: &Error) {
        self.times.fetch_add(1, Relaxed);
        if self.named.lock().unwrap().insert(reason.to_string()) {
            tracing::warn!("skipped {reason}");
        }
    }
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
    /// The one after it, once somebody has asked for it.
    ahead: Option<Filling>,
    /// The ticket that the step waits for.
    next: u64,
}

struct Shared {
    dataset: Arc<dyn Dataset>,
    augmenter: Augmenter,
    form: Form,
    seed: u64,
    skipped: Arc<Skipped>,
    on_damage: OnDamage,
    /// Samples that a worker takes on at a time.
    chunk: usize,
    state: Mutex<State>,
    /// Signalled when there is work for a worker, and at the close.
    work: Condvar,
    /// Signalled when the ticket that the step waits for is done, and at the end.
    filled: Condvar,
    closed: AtomicBool,
}

/// What takes the place of a damaged image.
#[derive(Clone, Copy)]
enum OnDamage {
    /// Training: the next whole image of the same class, in the set's order. It is a function of the files alone, the number
    /// of steps and of samples in them stays the same, and no rank needs to tell another.
    StandIn,
    /// Evaluation: nothing; the batch is shorter.
    LeaveOut,
}

struct State {
    schedule: Box<dyn Schedule>,
    free: Vec<Batch>,
    /// In flight, at `ticket % slots.len()`.
    slots: Vec<Option<Filling>>,
    /// Tickets given out. The last one's batch is open as long as it has samples that nobody has taken.
    given: u64,
    /// Whether `given` will not grow any more.
    ended: bool,
}

/// A batch on its way.
struct Filling {
    batch: Batch,
    /// Samples that workers have taken on, from the first.
    taken: usize,
    /// Samples that are not done.
    left: usize,
    /// Places of damaged images that are left out, in no order.
    out: Vec<usize>,
    /// The error of the first sample that has one.
    failed: Option<(usize, Error)>,
}

/// Some samples of a batch, for one worker. No other has the same.
struct Chunk {
    ticket: u64,
    epoch: u32,
    step: usize,
    /// Places in the batch.
    places: Range<usize>,
    /// The batch's vectors, which stay where they are until all of its samples are done.
    indices: *const u32,
    rounds: *const u32,
    desk: Desk,
}

/// A worker's own.
#[derive(Default)]
struct Tools {
    image: Image,
    workspace: Workspace,
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
        let sampler = Sampler::new(&*dataset, loader.sampler, loader.seed);
        let training = Training::new(sampler, batching, epochs, start);
        DataQueue::start(dataset, loader, Box::new(training), (batching.largest(), Vec::new()), OnDamage::StandIn)
    }

    /// This rank's contiguous share of the set, once, in order, in batches of `batch`; the last may be smaller. `rank` of
    /// `size`; the number of batches may differ by one between ranks. `buffers` are those of an earlier queue that made the same
    /// batches (`take_buffers`), or none.
    pub fn eval(
        dataset: Arc<dyn Dataset>,
        loader: Loader,
        batch: usize,
        rank: usize,
        size: usize,
        buffers: Vec<Batch>,
    ) -> Result<DataQueue> {
        assert!(batch > 0, "evaluation in batches of 0");
        let evaluation = Evaluation::new(share(dataset.len(), rank, size), batch);
        let loader = Loader { augmenter: loader.augmenter.without_randomness(), ..loader };
        DataQueue::start(dataset, loader, Box::new(evaluation), (batch, buffers), OnDamage::LeaveOut)
    }

    fn start(
        dataset: Arc<dyn Dataset>,
        loader: Loader,
        schedule: Box<dyn Schedule>,
        (largest, mut used): (usize, Vec<Batch>),
        on_damage: OnDamage,
    ) -> Result<DataQueue> {
        let workers = loader.workers.max(1);
        let ahead = loader.prefetch.max(workers);
        let values = loader.augmenter.output().len();
        let mut buffer = || match used.pop() {
            Some(batch) => {
                assert!(batch.has_room(loader.form, largest, values), "buffers of other batches");
                Ok(batch)
            }
            None => Batch::with_room(loader.form, largest, values),
        };
        // A packet is on its way while the step has the one before.
        let buffers = ahead + usize::from(matches!(loader.form, Form::Packet { .. }));
        let free = (0..buffers).map(|_| buffer()).collect::<Result<_>>()?;
        let current = buffer()?;
        let shared = Arc::new(Shared {
            dataset,
            augmenter: loader.augmenter,
            form: loader.form,
            seed: loader.seed,
            skipped: loader.skipped,
            on_damage,
            chunk: (VALUES_AT_A_TIME / values).max(1),
            state: Mutex::new(State {
                schedule,
                free,
                slots: std::iter::repeat_with(|| None).take(buffers).collect(),
                given: 0,
                ended: false,
            }),
            work: Condvar::new(),
            filled: Condvar::new(),
            closed: AtomicBool::new(false),
        });
        let mut queue = DataQueue { shared, workers: Vec::with_capacity(workers), current, ahead: None, next: 0 };
        for number in 0..workers {
            let shared = queue.shared.clone();
            let worker = std::thread::Builder::new().name(format!("data-{number}")).spawn(move || shared.work());
            queue.workers.push(worker.or_kind(Kind::Internal, "starting a data worker")?);
        }
        Ok(queue)
    }

    /// Waits at most `patience` for the next batch and says whether `next` would return at once.
    pub fn ready(&self, patience: Duration) -> bool {
        if self.ahead.is_some() {
            return true;
        }
        let state = self.shared.state.lock().unwrap();
        let waited = self.shared.filled.wait_timeout_while(state, patience, |state| !state.has(self.next));
        waited.unwrap().0.has(self.next)
    }

    /// All buffers, for another queue, after `next` has given the last batch and the caller is done with it.
    pub fn take_buffers(&mut self) -> Vec<Batch> {
        let mut buffers = std::mem::take(&mut self.shared.state.lock().unwrap().free);
        buffers.push(std::mem::take(&mut self.current));
        buffers
    }

    /// What `next` has given last.
    pub fn current(&self) -> &Batch {
        &self.current
    }

    /// What `next` will give, where that is made already and without fault. The caller may read it until it is done with the
    /// batch that `next` gives then.
    pub fn ahead(&mut self) -> Option<&Batch> {
        if self.ahead.is_none() {
            let mut state = self.shared.state.lock().unwrap();
            self.ahead = if state.has(self.next) { state.take(self.next) } else { None };
            self.next += u64::from(self.ahead.is_some());
        }
        self.ahead.as_ref().filter(|filling| filling.failed.is_none()).map(|filling| &filling.batch)
    }

    /// The next batch, or none after the last. It is the caller's until the next call. The error of a sample comes with
    /// the batch that the sample belongs to, not before.
    #[expect(clippy::should_implement_trait, reason = "the batch borrows the queue, which an Iterator cannot say")]
    pub fn next(&mut self) -> Result<Option<&Batch>> {
        let shared = &self.shared;
        let state = shared.state.lock().unwrap();
        let (mut state, filling) = match self.ahead.take() {
            Some(filling) => (state, filling),
            None => {
                let mut state = shared.filled.wait_while(state, |state| !state.has(self.next)).unwrap();
                let Some(filling) = state.take(self.next) else { return Ok(None) };
                self.next += 1;
                (state, filling)
            }
        };
        state.free.push(std::mem::replace(&mut self.current, filling.batch));
        drop(state);
        shared.work.notify_one();
        match filling.failed {
            None => Ok(Some(&self.current)),
            Some((_, error)) => Err(error),
        }
    }
}

impl Drop for DataQueue {
    fn drop(&mut self) {
        // Set under the lock: a worker that has just seen it unset is asleep by the time of the signal.
        let state = self.shared.state.lock().unwrap();
        self.shared.closed.store(true, Relaxed);
        drop(state);
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl State {
    fn slot(&mut self, ticket: u64) -> &mut Option<Filling> {
        let slots = self.slots.len() as u64;
        &mut self.slots[(ticket % slots) as usize]
    }

    /// Whether the step that waits for `ticket` need wait no longer.
    fn has(&mut self, ticket: u64) -> bool {
        let over = self.ended && ticket >= self.given;
        over || self.slot(ticket).as_ref().is_some_and(|filling| filling.left == 0)
    }

    fn take(&mut self, ticket: u64) -> Option<Filling> {
        self.slot(ticket).take()
    }

    /// The next samples of the open batch.
    fn chunk(&mut self, most: usize) -> Option<Chunk> {
        let ticket = self.given.checked_sub(1)?;
        let filling = self.slot(ticket).as_mut()?;
        let desk = filling.batch.desk();
        let Batch { epoch, step, ref indices, ref rounds, .. } = filling.batch;
        let places = filling.taken..indices.len().min(filling.taken + most);
        filling.taken = places.end;
        let (indices, rounds) = (indices.as_ptr(), rounds.as_ptr());
        (!places.is_empty()).then_some(Chunk { ticket, epoch, step, places, indices, rounds, desk })
    }
}

impl Shared {
    /// A worker's life.
    fn work(&self) {
        let mut tools = Tools::default();
        while let Some(chunk) = self.next_chunk() {
            for place in chunk.places.clone() {
                let outcome = catch_unwind(AssertUnwindSafe(|| self.fill(&chunk, place, &mut tools)))
                    .unwrap_or_else(|_| Err(Error::internal("a data worker panicked; its message is above")));
                self.done(chunk.ticket, place, outcome);
            }
        }
    }

    /// Sleeps until there are samples to read; none when the schedule has ended or the queue is closed.
    fn next_chunk(&self) -> Option<Chunk> {
        let mut state = self.state.lock().unwrap();
        while !self.closed.load(Relaxed) {
            if let Some(chunk) = state.chunk(self.chunk) {
                return Some(chunk);
            }
            if state.ended {
                return None;
            }
            match state.free.pop() {
                Some(batch) => self.open(batch, &mut state),
                None => state = self.work.wait(state).unwrap(),
            }
        }
        None
    }

    /// Gives the next batch of the schedule a ticket and calls the other workers; or tells everybody of the end.
    fn open(&self, mut batch: Batch, state: &mut State) {
        batch.indices.clear();
        batch.rounds.clear();
        batch.labels.clear();
        if !state.schedule.next(&mut batch) {
            state.free.push(batch);
            state.ended = true;
            self.work.notify_all();
            self.filled.notify_one();
            return;
        }
        let left = batch.indices.len();
        batch.open(left, self.augmenter.output().len());
        batch.labels.extend(batch.indices.iter().map(|&index| self.dataset.label(index as usize)));
        let ticket = state.given;
        state.given += 1;
        let slot = state.slot(ticket);
        assert!(slot.is_none(), "ticket {ticket} finds its slot taken");
        *slot = Some(Filling { batch, taken: 0, left, out: Vec::new(), failed: None });
        match left {
            0 => self.filled.notify_one(),
            _ => self.work.notify_all(),
        }
    }

    /// Writes one sample of a batch; false where it is left out.
    fn fill(&self, chunk: &Chunk, place: usize, tools: &mut Tools) -> Result<bool> {
        if self.closed.load(Relaxed) {
            return Ok(true);
        }
        // SAFETY: the batch has as many of both as samples, and no vector is touched until this place is done.
        let (index, round) = unsafe { (*chunk.indices.add(place), *chunk.rounds.add(place)) };
        let draws = (self.seed, chunk.epoch, u64::from(round) << 32 | u64::from(index));
        if let (Desk::Packet { placements, .. }, Form::Packet { resident: true, .. }) = (chunk.desk, self.form) {
            let placement = self.augmenter.placement(index, draws)?;
            // SAFETY: no other worker has this place.
            unsafe { placements.add(place).write(placement) };
            return Ok(true);
        }
        let Tools { image, workspace } = tools;
        let read = self.read(index as usize, image).map_err(|error| {
            let Chunk { epoch, step, .. } = chunk;
            error.context(format_args!("sample {index}, wanted in epoch {epoch} by step {step}"))
        })?;
        if !read {
            return Ok(false);
        }
        let values = self.augmenter.output().len();
        match chunk.desk {
            Desk::Values(images) => {
                // SAFETY: as above.
                let out = unsafe { std::slice::from_raw_parts_mut(images.add(place * values), values) };
                self.augmenter.apply(image, workspace, out, draws)?;
            }
            Desk::Packet { placements, pixels } => {
                // SAFETY: as above.
                let out = unsafe { std::slice::from_raw_parts_mut(pixels.add(place * values), values) };
                let placement = self.augmenter.cut(image, workspace, (out, place as u32), draws)?;
                // SAFETY: as above.
                unsafe { placements.add(place).write(placement) };
            }
        }
        Ok(true)
    }

    /// Reads a sample, or what stands in for it; false where it is left out.
    fn read(&self, index: usize, image: &mut Image) -> Result<bool> {
        let Reading::Damaged(reason) = self.dataset.read(index, image)? else { return Ok(true) };
        self.skipped.note(&reason);
        if let OnDamage::LeaveOut = self.on_damage {
            return Ok(false);
        }
        let (len, class) = (self.dataset.len(), self.dataset.label(index));
        let others = (index + 1..len).chain(0..index).filter(|&other| self.dataset.label(other) == class);
        for other in others {
            if let Reading::Whole = self.dataset.read(other, image)? {
                return Ok(true);
            }
        }
        Err(reason.context(format_args!("no image of class {class} can stand in")))
    }

    fn done(&self, ticket: u64, place: usize, outcome: Result<bool>) {
        let mut state = self.state.lock().unwrap();
        let filling = state.slot(ticket).as_mut().expect("a batch waits for all of its samples");
        match outcome {
            Ok(true) => {}
            Ok(false) => filling.out.push(place),
            Err(error) => {
                if filling.failed.as_ref().is_none_or(|(first, _)| place < *first) {
                    filling.failed = Some((place, error));
                }
            }
        }
        filling.left -= 1;
        if filling.left == 0 {
            filling.close(self.augmenter.output().len());
            self.filled.notify_one();
        }
    }
}

impl Filling {
    /// Takes out what is left out. values: of a sample.
    fn close(&mut self, values: usize) {
        let Filling { batch, out, .. } = self;
        out.sort_unstable();
        out.iter().rev().for_each(|&place| batch.remove(place, values));
        batch.close();
    }
}

#[cfg(test)]
mod tests;
