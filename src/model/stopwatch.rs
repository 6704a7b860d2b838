//! Times of a net's layers in forward and backward, for `trainer bench-step`. A net without a stopwatch asks no clock.
//!
//! On the CPU a layer is done when its call returns. On a GPU the call only launches work: what that takes is the time between
//! two events in the compute stream, read when the step is over, so that the host waits for nothing between layers.

use crate::device::Place;
use crate::device::cuda::{Event, Gpu};
use crate::error::Result;
use std::mem;
use std::time::Duration;

/// What one layer took since the last `take`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerTime {
    pub forward: Duration,
    /// All gradients: by the parameters and by the inputs.
    pub backward: Duration,
    /// A backward of the gradients by the parameters alone; zero unless `Stopwatch::apart`.
    pub weights_alone: Duration,
    /// Of the host in forward and backward: on the CPU the same time, on a GPU that of the launches.
    pub host: Duration,
}

/// Lies in a net while its layers are timed.
pub struct Stopwatch {
    /// Backward first does every layer with the gradients by its parameters alone, then as ever: what a layer takes
    /// longer for both is what its gradient by the inputs costs. Such a backward is for its times: a fused sigmoid or
    /// tanh has then gone twice over the gradient by its output.
    pub apart: bool,
    times: Vec<LayerTime>,
    gpu: Option<Gpu>,
    laps: Vec<Lap>,
}

/// A layer's work between two events.
struct Lap {
    layer: usize,
    part: Part,
    start: Event,
    end: Event,
}

impl Stopwatch {
    /// For a net on `place`.
    pub fn new(layers: usize, place: Place) -> Result<Stopwatch> {
        let gpu = if place == Place::Cuda { Some(Gpu::of_this_rank()?) } else { None };
        Ok(Stopwatch { apart: false, times: vec![LayerTime::default(); layers], gpu, laps: Vec::new() })
    }

    /// Times by layer, which start again from zero. Waits for a GPU to be done with what is timed.
    pub fn take(&mut self) -> Result<Vec<LayerTime>> {
        for Lap { layer, part, start, end } in mem::take(&mut self.laps) {
            *self.times[layer].part(part) += end.since(&start)?;
        }
        let zeros = vec![LayerTime::default(); self.times.len()];
        Ok(mem::replace(&mut self.times, zeros))
    }

    /// An event where the stream of a GPU is now; nothing on the CPU.
    pub(super) fn mark(&self) -> Result<Option<Event>> {
        let Some(gpu) = &self.gpu else { return Ok(None) };
        let event = gpu.timer()?;
        gpu.compute().record(&event)?;
        Ok(Some(event))
    }

    /// The host was in this part for so long; `start` is its mark from before.
    pub(super) fn add(&mut self, layer: usize, part: Part, host: Duration, start: Option<Event>) -> Result<()> {
        if part != Part::WeightsAlone {
            self.times[layer].host += host;
        }
        match (start, self.mark()?) {
            (Some(start), Some(end)) => self.laps.push(Lap { layer, part, start, end }),
            _ => *self.times[layer].part(part) += host,
        }
        Ok(())
    }
}

impl LayerTime {
    fn part(&mut self, part: Part) -> &mut Duration {
        match part {
            Part::Forward => &mut self.forward,
            Part::Backward => &mut self.backward,
            Part::WeightsAlone => &mut self.weights_alone,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Forward,
    Backward,
    WeightsAlone,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_micro_batches_add_up_each_in_its_part() {
        const SECOND: Duration = Duration::from_secs(1);
        let mut stopwatch = Stopwatch::new(3, Place::Host).unwrap();
        for (layer, part) in [(0, Part::WeightsAlone), (1, Part::Forward), (1, Part::Forward), (2, Part::Backward)] {
            stopwatch.add(layer, part, SECOND, None).unwrap();
        }
        let none = LayerTime::default();
        let expected = [
            LayerTime { weights_alone: SECOND, ..none },
            LayerTime { forward: 2 * SECOND, host: 2 * SECOND, ..none },
            LayerTime { backward: SECOND, host: SECOND, ..none },
        ];
        assert_eq!(stopwatch.take().unwrap(), expected);
        assert_eq!(stopwatch.take().unwrap(), [none; 3]);
    }
}
