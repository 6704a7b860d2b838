//! Which samples a rank takes. Pure arithmetic on positions in the epoch's shuffled order.
//!
//! A step takes the next `global` positions, or what is left at the end of the epoch, and deals them out as
//! micro-batches. Every position of an epoch belongs to exactly one micro-batch of one rank, whatever the number of
//! ranks, and wherever the epoch was resumed:
//!
//! ```text
//! positions   consumed ........................ consumed + global
//! without micro  | rank 0      | rank 1      | rank 2      |      parts that differ by at most one
//! with micro     | m0 | m1 | m2 | m3 | m4 | m5 | m6 | m7  |      rank r of N owns [r*M/N, (r+1)*M/N) of M
//! ```
//!
//! Without `micro`, a short last step is spread evenly too. With it, micro-batches keep their size and the last ones are
//! short or empty, so which samples are summed together does not depend on N; that makes the weights bit-identical.

use std::ops::Range;

/// How a step is dealt out, seen by one rank.
#[derive(Clone, Copy, Debug)]
pub struct Batching {
    /// Samples a step over all ranks.
    pub global: usize,
    /// Samples a micro-batch; without it, a rank's part of the step is its one micro-batch.
    pub micro: Option<usize>,
    pub rank: usize,
    /// Ranks.
    pub size: usize,
}

impl Batching {
    /// Asserts what `config::plan` sees to: every rank has work in a full step.
    pub fn check(&self) {
        let Batching { global, micro, rank, size } = *self;
        assert!(rank < size, "rank {rank} of {size}");
        assert!(micro != Some(0), "micro-batches of 0 samples");
        let pieces = micro.map_or(global, |_| self.micro_count());
        assert!(pieces >= size, "a step of {global} samples in {pieces} pieces for {size} ranks");
    }

    /// Micro-batches of a step over all ranks.
    pub fn micro_count(&self) -> usize {
        self.micro.map_or(self.size, |micro| self.global.div_ceil(micro))
    }

    /// Numbers of this rank's micro-batches: in every step the same, some of them empty in a short one.
    pub fn micros(&self) -> Range<usize> {
        share(self.micro_count(), self.rank, self.size)
    }

    /// Samples at most in a micro-batch.
    pub fn largest(&self) -> usize {
        self.micro.map_or(self.global.div_ceil(self.size), |micro| micro.min(self.global))
    }

    /// Positions of the step that begins after `consumed` of the epoch's `samples`.
    pub fn step(&self, samples: usize, consumed: usize) -> Range<usize> {
        consumed..samples.min(consumed + self.global)
    }

    /// Positions of micro-batch `number` of a step.
    pub fn positions(&self, step: &Range<usize>, number: usize) -> Range<usize> {
        let part = match self.micro {
            None => share(step.len(), number, self.size),
            Some(micro) => step.len().min(number * micro)..step.len().min((number + 1) * micro),
        };
        step.start + part.start..step.start + part.end
    }
}

/// The contiguous part of `samples` positions that falls to `rank`; parts differ by at most one. Evaluation uses it too.
pub fn share(samples: usize, rank: usize, size: usize) -> Range<usize> {
    samples * rank / size..samples * (rank + 1) / size
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Takes steps from `consumed` on with `size` ranks, at most `steps`, and counts how often each position is used.
    /// Returns where it stopped.
    fn run(uses: &mut [usize], global: usize, micro: Option<usize>, size: usize, from: usize, steps: usize) -> usize {
        let samples = uses.len();
        let mut consumed = from;
        for _ in 0..steps {
            if consumed == samples {
                break;
            }
            for rank in 0..size {
                let batching = Batching { global, micro, rank, size };
                let step = batching.step(samples, consumed);
                for number in batching.micros() {
                    let positions = batching.positions(&step, number);
                    assert!(positions.len() <= batching.largest());
                    positions.for_each(|position| uses[position] += 1);
                }
            }
            consumed = samples.min(consumed + global);
        }
        consumed
    }

    proptest! {
        #[test]
        fn an_epoch_interrupted_and_resumed_on_other_ranks_uses_every_sample_once(
            samples in 1usize..400, global in 8usize..70, micro in proptest::option::of(1usize..8),
            before in 1usize..9, after in 1usize..9, steps in 0usize..20,
        ) {
            let mut uses = vec![0; samples];
            let stopped = run(&mut uses, global, micro, before, 0, steps);
            prop_assert_eq!(run(&mut uses, global, micro, after, stopped, usize::MAX), samples);
            prop_assert!(uses.iter().all(|&count| count == 1), "{:?}", uses);
        }

        #[test]
        fn micro_batches_hold_the_same_samples_for_any_number_of_ranks(
            samples in 1usize..400, micro in 1usize..9, count in 8usize..20, size in 1usize..9, consumed in 0usize..400,
        ) {
            let batching = |rank, size| Batching { global: micro * count, micro: Some(micro), rank, size };
            let step = batching(0, 1).step(samples, consumed.min(samples));
            let dealt = |size| -> Vec<(usize, Range<usize>)> {
                let ranks = (0..size).map(|rank| batching(rank, size));
                ranks.flat_map(|rank| rank.micros().map(|number| (number, rank.positions(&step, number))).collect::<Vec<_>>()).collect()
            };
            prop_assert_eq!(dealt(size), dealt(1));
        }

        #[test]
        fn a_short_step_without_micro_is_spread_evenly(left in 0usize..64, size in 1usize..9) {
            let lengths: Vec<usize> = (0..size)
                .map(|rank| Batching { global: 64, micro: None, rank, size }.positions(&(100..100 + left), rank).len())
                .collect();
            prop_assert!(lengths.iter().max().unwrap() - lengths.iter().min().unwrap() <= 1, "{:?}", lengths);
        }

        #[test]
        fn evaluation_shares_are_contiguous_and_cover(samples in 0usize..500, size in 1usize..20) {
            let mut next = 0;
            for rank in 0..size {
                let part = share(samples, rank, size);
                prop_assert_eq!(part.start, next);
                next = part.end;
            }
            prop_assert_eq!(next, samples);
        }
    }
}
