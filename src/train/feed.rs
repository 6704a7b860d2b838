//! Batches on their way from the queue to the net.
//!
//! On the CPU the net reads what the queue's workers have written. A GPU is sent packets: bytes of pixels, or none where the set
//! lies in its memory, with what is to be done to each sample, which the last kernel of augmentation does. The next batch is
//! sent while the GPU works on this one:
//!
//! ```text
//! copies     | packet 1 |              | packet 2 |
//! compute               | augment 1 | forward 1 ... backward 1 | augment 2 | forward 2
//!                    arrived      taken
//! ```
//!
//! There is one packet on the GPU: it is free again when its samples are made, which is early in the pass. A copy waits for
//! `taken`, a pass for `arrived`, both in the streams. The host waits in one place: a batch's memory goes back to the queue's
//! workers with the next call, and its copy must be over then. It is, unless the host is two passes ahead of the GPU.

use crate::data::Batch;
use crate::data::augment::Augmenter;
use crate::data::augment::cuda::OnGpu;
use crate::data::batch::{Form, Layout, Packet, Samples};
use crate::data::queue::DataQueue;
use crate::data::resident::Resident;
use crate::device::cuda::kernels::Element;
use crate::device::cuda::{Event, Gpu};
use crate::device::{Arena, Slice};
use crate::error::Result;
use crate::launch::watch::Health;
use std::sync::Arc;
use std::time::Duration;

pub struct Feed {
    queue: DataQueue,
    /// To a GPU.
    way: Option<Arc<Way>>,
    health: Arc<Health>,
    /// Batches that were sent there, and of these how many `next` has given.
    sent: usize,
    given: usize,
}

/// A batch, and what of it lies where the net reads it, until the next call.
pub struct Fed<'a> {
    pub batch: &'a Batch,
    pub images: Slice<'a>,
    /// On a GPU; on the CPU they are read from the batch.
    pub labels: Slice<'a>,
}

impl Feed {
    /// For a queue whose batches are of the way's form.
    pub fn new(queue: DataQueue, way: Option<Arc<Way>>, health: Arc<Health>) -> Feed {
        Feed { queue, way, health, sent: 0, given: 0 }
    }

    /// Waits until the GPU has read the batch that the next call gives back.
    pub fn release(&self) -> Result<()> {
        match (&self.way, self.given.checked_sub(1)) {
            (Some(way), Some(last)) => way.dock.wait_for_arrival(last, &self.health),
            _ => Ok(()),
        }
    }

    /// Waits at most `patience` for the next batch and says whether `next` would return at once.
    pub fn ready(&self, patience: Duration) -> bool {
        self.queue.ready(patience)
    }

    /// The next batch, or none after the last, when `release` has been called.
    pub fn next(&mut self) -> Result<Option<Fed<'_>>> {
        if self.queue.next()?.is_none() {
            return Ok(None);
        }
        if let Some(way) = &self.way {
            if self.sent == self.given {
                way.send(self.queue.current(), self.sent)?;
                self.sent += 1;
            }
            way.take(self.queue.current(), self.given)?;
            self.given += 1;
        }
        self.look_ahead()?;
        Ok(Some(self.current()))
    }

    /// What `next` has given.
    pub fn current(&self) -> Fed<'_> {
        let batch = self.queue.current();
        match &self.way {
            None => Fed { batch, images: Slice::from(batch.values()), labels: Slice::empty() },
            Some(way) => way.inlet.of(batch),
        }
    }

    /// The buffers of its queue, after the last batch.
    pub fn into_buffers(mut self) -> Result<Vec<Batch>> {
        self.wait_for_last()?;
        Ok(self.queue.take_buffers())
    }

    /// The GPU may be reading what the queue is about to free.
    fn wait_for_last(&self) -> Result<()> {
        match (&self.way, self.sent.checked_sub(1)) {
            (Some(way), Some(last)) => way.dock.wait_for_arrival(last, &self.health),
            _ => Ok(()),
        }
    }

    /// Sends the next batch to the GPU, if it is made.
    pub fn look_ahead(&mut self) -> Result<()> {
        if let Some(way) = &self.way
            && self.sent == self.given
            && let Some(batch) = self.queue.ahead()
        {
            way.send(batch, self.sent)?;
            self.sent += 1;
        }
        Ok(())
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        // What fails here has failed before, and was said there.
        let _ = self.wait_for_last();
    }
}

/// How the samples of one set get to a GPU. All of it lasts for the whole run.
pub struct Way {
    gpu: Gpu,
    inlet: Arc<Inlet>,
    dock: Arc<Dock>,
    layout: Layout,
    augment: OnGpu,
    resident: Option<Resident>,
}

/// Where passes read samples.
pub struct Inlet {
    element: Element,
    /// (batch, H, W, C)
    images: Arena,
    /// u32 (batch)
    labels: Arena,
}

/// Where packets arrive, of one queue at a time.
pub struct Dock {
    packet: Arena,
    /// The copies of the last two batches are over.
    arrived: [Event; 2],
    /// The packet's samples are made.
    taken: Event,
}

/// Bytes of a GPU's memory for at most `batch` samples of so many values of a type: of the inlet, and of a dock.
pub fn gpu_bytes(batch: usize, values: usize, element: Element, resident: bool) -> (usize, usize) {
    (batch * (values * element.bytes() + size_of::<u32>()), Layout::new(batch, values, resident).bytes())
}

impl Inlet {
    /// For at most `batch` samples of so many values of a type, the net's.
    pub fn new(gpu: &Gpu, batch: usize, values: usize, element: Element) -> Result<Inlet> {
        let images = gpu.allocate(batch * values * element.bytes());
        Ok(Inlet {
            element,
            images: images.map_err(|error| error.context("images of a batch"))?,
            labels: gpu.allocate(batch * size_of::<u32>())?,
        })
    }

    fn of<'a>(&'a self, batch: &'a Batch) -> Fed<'a> {
        let capacity = self.labels.bytes() / size_of::<u32>();
        let part = |arena: &'a Arena| {
            // SAFETY: written by `Way::take` alone, in the order of the compute stream.
            unsafe { arena.slice(0..arena.bytes() / capacity * batch.count()) }
        };
        Fed { batch, images: part(&self.images), labels: part(&self.labels) }
    }
}

impl Dock {
    /// For packets of these layouts.
    pub fn new(gpu: &Gpu, layouts: &[Layout]) -> Result<Dock> {
        let bytes = layouts.iter().map(|layout| layout.bytes()).max().unwrap_or(0);
        Ok(Dock {
            packet: gpu.allocate(bytes).map_err(|error| error.context("a batch as it is sent"))?,
            arrived: [gpu.event()?, gpu.event()?],
            taken: gpu.event()?,
        })
    }

    /// Of the batch of this number.
    fn arrived(&self, number: usize) -> &Event {
        &self.arrived[number % 2]
    }

    fn wait_for_arrival(&self, number: usize, health: &Health) -> Result<()> {
        health.wait_for_gpu("copying a batch", || self.arrived(number).is_done())
    }
}

impl Way {
    /// For a set whose samples `augmenter` makes, sent in packets of this layout, without pixels if they are resident.
    pub fn new(
        gpu: &Gpu,
        (inlet, dock, layout): (Arc<Inlet>, Arc<Dock>, Layout),
        augmenter: &Augmenter,
        resident: Option<Resident>,
    ) -> Result<Way> {
        let augment = OnGpu::new(gpu, augmenter, inlet.element)?;
        Ok(Way { gpu: gpu.clone(), inlet, dock, layout, augment, resident })
    }

    /// What a queue makes of samples that go this way; without one the net is on the CPU.
    pub fn form(way: &Option<Arc<Way>>) -> Form {
        let allocate = |bytes| Gpu::of_this_rank()?.allocate_pinned(bytes);
        way.as_ref().map_or(Form::Values, |way| Form::Packet { resident: way.resident.is_some(), allocate })
    }

    /// Has the batch of this number copied to the dock.
    fn send(&self, batch: &Batch, number: usize) -> Result<()> {
        let (copies, contents) = (self.gpu.copies(), packet(batch).contents());
        copies.wait_for(&self.dock.taken)?;
        // SAFETY: `taken` and `arrived` keep the streams apart; the queue keeps the batch until `release` has waited.
        unsafe { copies.copy(contents, self.dock.packet.slice_mut(0..contents.bytes())) }?;
        copies.record(self.dock.arrived(number))
    }

    /// Has its samples made in the inlet, for the passes after it in the compute stream.
    fn take(&self, batch: &Batch, number: usize) -> Result<()> {
        let (compute, count) = (self.gpu.compute(), batch.count());
        compute.wait_for(self.dock.arrived(number))?;
        let values = self.inlet.images.bytes() / self.layout.samples;
        // SAFETY: the dock as in `send`; the inlet is used in the order of the compute stream.
        unsafe {
            let part = |range| self.dock.packet.slice(range);
            let pixels = match &self.resident {
                Some(resident) => resident.pixels(),
                None => part(self.layout.pixels(self.layout.samples)),
            };
            let images = self.inlet.images.slice_mut(0..count * values);
            self.augment.apply(pixels, part(self.layout.placements(count)), images)?;
            let labels = part(self.layout.labels(count));
            compute.copy(labels, self.inlet.labels.slice_mut(0..labels.bytes()))?;
        }
        compute.record(&self.dock.taken)
    }
}

fn packet(batch: &Batch) -> &Packet {
    match &batch.samples {
        Samples::Packet(packet) => packet,
        Samples::Values(_) => unreachable!("a way to a GPU is given packets"),
    }
}
