//! Which samples come next, as a function of the place in the run.

use super::Position;
use crate::data::Batch;
use crate::data::partition::Batching;
use crate::data::sampler::Sampler;
use std::ops::Range;

/// What comes next: fills in the batch's indices and place, or says that there is no more, then and ever after.
pub trait Schedule: Send {
    fn next(&mut self, batch: &mut Batch) -> bool;
}

/// One epoch after another, from anywhere in one of them.
pub struct Training {
    batching: Batching,
    epochs: u32,
    /// The order of `epoch`.
    sampler: Sampler,
    epoch: u32,
    consumed: usize,
    /// The micro-batch of this rank that is next in the step.
    micro: usize,
}

impl Training {
    pub fn new(mut sampler: Sampler, batching: Batching, epochs: u32, start: Position) -> Training {
        let Position { epoch, consumed } = start;
        sampler.begin(epoch);
        Training { batching, epochs, sampler, epoch, consumed, micro: batching.micros().start }
    }
}

impl Schedule for Training {
    fn next(&mut self, batch: &mut Batch) -> bool {
        let (samples, micros) = (self.sampler.positions(), self.batching.micros());
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
pub struct Evaluation {
    left: Range<usize>,
    batch: usize,
    step: usize,
}

impl Evaluation {
    pub fn new(samples: Range<usize>, batch: usize) -> Evaluation {
        Evaluation { left: samples, batch, step: 0 }
    }
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
