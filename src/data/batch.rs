//! A batch on its way from the workers to the net: the values that the net reads, or, for a GPU, a packet of what it makes them
//! of.

use super::augment::cuda::Placement;
use crate::device::{Arena, Slice};
use crate::error::{Error, Result};
use std::ops::Range;

/// What the samples of a queue's batches are made into.
#[derive(Clone, Copy, Debug)]
pub enum Form {
    /// The values that the net reads.
    Values,
    /// What a GPU makes them of; without pixels where it has those of the whole set. `allocate` gives host memory that it
    /// copies from.
    Packet { resident: bool, allocate: fn(usize) -> Result<Arena> },
}

/// A rank's samples of one micro-batch (or of one evaluation step), and where they stand in the run.
#[derive(Debug, Default)]
pub struct Batch {
    pub samples: Samples,
    /// (count)
    pub labels: Vec<u32>,
    /// Indices into the dataset.
    pub indices: Vec<u32>,
    /// The round of the epoch in which each is used, as `Sampler::rounds`.
    pub rounds: Vec<u32>,
    pub epoch: u32,
    /// Number of the step in its epoch.
    pub step: usize,
    /// Number of the micro-batch in its step, counted over all ranks.
    pub micro: usize,
    /// Position in the epoch's order of the first sample.
    pub position: usize,
    /// Samples of the whole step, over all ranks and micro-batches: less than the global batch where the epoch ends.
    pub step_count: usize,
}

/// As `Form` says.
#[derive(Debug)]
pub enum Samples {
    /// (count, H, W, C), normalised
    Values(Vec<f32>),
    Packet(Packet),
}

/// All that a GPU needs of a batch, in one piece of memory, so that one copy takes it there.
#[derive(Debug)]
pub struct Packet {
    memory: Arena,
    layout: Layout,
    /// Samples for which there are pixels.
    written: usize,
}

/// Where things lie in a packet: a placement for each sample, then a label, then its pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layout {
    /// Samples that there is room for.
    pub samples: usize,
    /// Bytes of pixels that there is room for in each; 0 where the GPU has them.
    pub pixels: usize,
}

/// Where workers write the samples of one batch, each at its own place.
#[derive(Clone, Copy)]
pub enum Desk {
    Values(*mut f32),
    Packet { placements: *mut Placement, pixels: *mut u8 },
}

impl Batch {
    /// An empty one with room for so many samples, of so many values each.
    pub fn with_room(form: Form, samples: usize, values: usize) -> Result<Batch> {
        let full = || {
            Error::device(format!(
                "out of memory: there is no room for one more batch of {samples} samples of {values} values; lower \
                 data.prefetch or the batch"
            ))
        };
        let mut batch = Batch::default();
        let room = (batch.labels.try_reserve_exact(samples))
            .and_then(|()| batch.indices.try_reserve_exact(samples))
            .and_then(|()| batch.rounds.try_reserve_exact(samples));
        room.map_err(|_| full())?;
        batch.samples = match form {
            Form::Values => {
                let mut images = Vec::new();
                images.try_reserve_exact(samples.saturating_mul(values)).map_err(|_| full())?;
                Samples::Values(images)
            }
            Form::Packet { resident, allocate } => {
                let layout = Layout::new(samples, values, resident);
                let memory = allocate(layout.bytes()).map_err(|error| error.context("a batch of data.prefetch"))?;
                Samples::Packet(Packet { memory, layout, written: 0 })
            }
        };
        Ok(batch)
    }

    /// Whether it is one that `with_room` would make.
    pub fn has_room(&self, form: Form, samples: usize, values: usize) -> bool {
        match (&self.samples, form) {
            (Samples::Values(images), Form::Values) => images.capacity() >= samples * values,
            (Samples::Packet(packet), Form::Packet { resident, .. }) => {
                packet.layout == Layout::new(samples, values, resident)
            }
            _ => false,
        }
    }

    pub fn count(&self) -> usize {
        self.labels.len()
    }

    /// (count, H, W, C), where samples are values.
    pub fn values(&self) -> &[f32] {
        match &self.samples {
            Samples::Values(images) => images,
            Samples::Packet(_) => panic!("the values of a packet are made on the GPU"),
        }
    }

    /// So many samples, of so many values each, are going to be written.
    pub fn open(&mut self, count: usize, values: usize) {
        match &mut self.samples {
            Samples::Values(images) => images.resize(count * values, 0.0),
            Samples::Packet(packet) => packet.written = count,
        }
    }

    /// Where they are to be written.
    pub fn desk(&mut self) -> Desk {
        match &mut self.samples {
            Samples::Values(images) => Desk::Values(images.as_mut_ptr()),
            Samples::Packet(Packet { memory, layout, .. }) => {
                let at = |range: Range<usize>| memory.address() + range.start;
                let (placements, pixels) = (at(layout.placements(0)), at(layout.pixels(0)));
                Desk::Packet { placements: placements as *mut Placement, pixels: pixels as *mut u8 }
            }
        }
    }

    /// Takes out the sample at `place`, of so many values; those behind it move up.
    pub fn remove(&mut self, place: usize, values: usize) {
        let count = self.count();
        match &mut self.samples {
            Samples::Values(images) => {
                images.copy_within((place + 1) * values.., place * values);
                images.truncate((count - 1) * values);
            }
            // The pixels stay: a placement says where they are.
            Samples::Packet(packet) => packet.placements(count).copy_within(place + 1.., place),
        }
        self.labels.remove(place);
        self.indices.remove(place);
        self.rounds.remove(place);
    }

    /// All samples are written: what a packet needs of the rest is put into it.
    pub fn close(&mut self) {
        if let Samples::Packet(packet) = &mut self.samples {
            let range = packet.layout.labels(self.labels.len());
            // SAFETY: `&mut self`; the workers are done with it.
            unsafe { packet.memory.slice_mut(range) }.u8().copy_from_slice(bytemuck::cast_slice(&self.labels));
        }
    }
}

impl Default for Samples {
    fn default() -> Self {
        Samples::Values(Vec::new())
    }
}

impl Packet {
    /// What is to be sent.
    pub fn contents(&self) -> Slice<'_> {
        // SAFETY: `&self`; the workers are done with it.
        unsafe { self.memory.slice(0..self.layout.pixels(self.written).end) }
    }

    fn placements(&mut self, count: usize) -> &mut [Placement] {
        // SAFETY: `&mut self`; the workers are done with it.
        bytemuck::cast_slice_mut(unsafe { self.memory.slice_mut(self.layout.placements(count)) }.into_u8())
    }
}

impl Layout {
    /// For samples of so many values each, of which the GPU has the pixels or not.
    pub fn new(samples: usize, values: usize, resident: bool) -> Layout {
        Layout { samples, pixels: if resident { 0 } else { values } }
    }
    pub fn placements(self, count: usize) -> Range<usize> {
        0..count * size_of::<Placement>()
    }
    pub fn labels(self, count: usize) -> Range<usize> {
        let start = self.placements(self.samples).end;
        start..start + count * size_of::<u32>()
    }
    pub fn pixels(self, count: usize) -> Range<usize> {
        let start = self.labels(self.samples).end;
        start..start + count * self.pixels
    }
    pub fn bytes(self) -> usize {
        self.pixels(self.samples).end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::raw::Augment;
    use crate::data::augment::Augmenter;
    use crate::data::memory::InMemory;
    use crate::model::Shape;

    #[test]
    fn a_packet_without_some_samples_says_where_the_pixels_of_the_others_are() {
        let shape = Shape::new(2, 2, 1);
        let set = InMemory::new(shape, 9, vec![0; 4], vec![0]);
        let augmenter = Augmenter::new(&[Augment::HorizontalFlip {}], &set, shape).unwrap();
        let placement = |number: usize| augmenter.placement(number as u32, (0, 0, number as u64)).unwrap();
        let form = Form::Packet { resident: false, allocate: Arena::host };
        let mut batch = Batch::with_room(form, 5, 4).unwrap();
        batch.open(4, 4);
        batch.labels.extend([6, 7, 8, 6]);
        batch.indices.extend([0; 4]);
        batch.rounds.extend([0; 4]);
        let Desk::Packet { placements, pixels } = batch.desk() else { panic!("a packet was asked for") };
        for place in 0..4 {
            // SAFETY: there is room for five.
            unsafe {
                placements.add(place).write(placement(place));
                pixels.add(4 * place).write_bytes(place as u8, 4);
            }
        }
        batch.remove(2, 4);
        batch.remove(0, 4);
        batch.close();

        assert_eq!(batch.labels, [7, 6]);
        let Samples::Packet(packet) = &batch.samples else { panic!("it was one") };
        let (layout, sent) = (packet.layout, packet.contents().u8());
        let expected = [placement(1), placement(3)];
        assert_eq!(&sent[layout.placements(2)], bytemuck::cast_slice::<_, u8>(&expected));
        assert_eq!(&sent[layout.labels(2)], bytemuck::cast_slice::<u32, u8>(&[7, 6]));
        assert_eq!(&sent[layout.pixels(4)], [[0; 4], [1; 4], [2; 4], [3; 4]].as_flattened());
        assert_eq!(sent.len(), layout.pixels(4).end, "of the fifth nothing is sent");
    }
}
