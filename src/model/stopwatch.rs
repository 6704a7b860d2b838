//! Times of a net's layers in forward and backward, for `trainer bench-step`. A net without a stopwatch asks no clock.

use std::mem;
use std::time::{Duration, Instant};

/// What one layer took since the last `take`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerTime {
    pub forward: Duration,
    /// All gradients: by the parameters and by the inputs.
    pub backward: Duration,
    /// A backward of the gradients by the parameters alone; zero unless `Stopwatch::apart`.
    pub weights_alone: Duration,
}

/// Lies in a net while its layers are timed.
#[derive(Debug)]
pub struct Stopwatch {
    /// Backward first does every layer with the gradients by its parameters alone, then as ever: what a layer takes
    /// longer for both is what its gradient by the inputs costs. Such a backward is for its times: a fused sigmoid or
    /// tanh has then gone twice over the gradient by its output.
    pub apart: bool,
    times: Vec<LayerTime>,
}

impl Stopwatch {
    pub fn new(layers: usize) -> Stopwatch {
        Stopwatch { apart: false, times: vec![LayerTime::default(); layers] }
    }

    /// Times by layer, which start again from zero.
    pub fn take(&mut self) -> Vec<LayerTime> {
        let zeros = vec![LayerTime::default(); self.times.len()];
        mem::replace(&mut self.times, zeros)
    }

    pub(super) fn add(&mut self, layer: usize, part: Part, since: Instant) {
        let time = &mut self.times[layer];
        let part = match part {
            Part::Forward => &mut time.forward,
            Part::Backward => &mut time.backward,
            Part::WeightsAlone => &mut time.weights_alone,
        };
        *part += since.elapsed();
    }
}

#[derive(Clone, Copy)]
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
        let mut stopwatch = Stopwatch::new(3);
        for (layer, part) in [(0, Part::WeightsAlone), (1, Part::Forward), (1, Part::Forward), (2, Part::Backward)] {
            stopwatch.add(layer, part, Instant::now() - SECOND);
        }
        let [alone, forward, backward] = stopwatch.take()[..] else { panic!("three layers") };
        let none = LayerTime::default();
        assert!(alone.weights_alone >= SECOND && alone == LayerTime { weights_alone: alone.weights_alone, ..none });
        assert!(forward.forward >= 2 * SECOND && forward == LayerTime { forward: forward.forward, ..none });
        assert!(backward.backward >= SECOND && backward == LayerTime { backward: backward.backward, ..none });
    }
}
