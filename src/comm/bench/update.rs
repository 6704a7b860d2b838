//! What `bench-comm --operation reduce_update` does with the sums: SGD with momentum, the optimizer that training uses.

use super::{value, values_mut, vectorised};
use crate::comm::Communicator;
use crate::config::raw;
use crate::device::{Arena, SliceMut};
use crate::error::Result;
use crate::optim::{self, At, Optimizer};
use std::ops::Range;
use std::time::Duration;

/// Halves, so that results are exact.
const LR: f32 = 0.5;
const MOMENTUM: f32 = 0.5;

pub struct Update {
    rule: Box<dyn Optimizer>,
    params: Arena,
    /// Of this rank's share, from its first element on.
    momentum: Arena,
    first: usize,
}

impl Update {
    /// For `len` parameters at most. Collective.
    pub fn new(comm: &mut dyn Communicator, len: usize) -> Result<Update> {
        let rule = raw::Rule::Sgd { momentum: MOMENTUM, nesterov: false };
        let shared = raw::OptimizerShared::with_lr(LR);
        let config = raw::Optimizer { rule, shared };
        let share = len.div_ceil(comm.size()).next_multiple_of(16) + 16;
        Ok(Update {
            rule: optim::new(&config),
            params: comm.allocate_replicated(len * size_of::<f32>())?,
            momentum: Arena::host(share * size_of::<f32>())?,
            first: 0,
        })
    }

    /// New values for this rank's share.
    pub fn fill(&mut self, mine: Range<usize>, iteration: usize) {
        self.first = mine.start;
        let (params, momentum) = (self.params(mine.clone()), self.momentum(mine.clone()));
        for ((index, param), momentum) in mine.zip(params).zip(momentum) {
            (*param, *momentum) = start(index, iteration);
        }
    }

    /// From the gradients in `data` to new parameters on all ranks.
    pub fn run(&mut self, comm: &mut dyn Communicator, data: SliceMut<'_>) -> Result<Duration> {
        // SAFETY: the parameters are in this operation's hands alone.
        let params = unsafe { self.params.slice_mut(0..data.bytes()) };
        comm.reduce_update(data, params, &|range, sums, params| {
            self.rule.update(At { lr: LR, step: 0 }, params, sums, &mut [self.momentum(range)]);
        })
    }

    /// The same as a plain loop over the elements `mine` of every rank's gradients.
    ///
    /// # Safety
    /// The gradients at `mine` of all addresses are valid and aligned, and nobody writes them.
    pub unsafe fn plain(&mut self, addresses: &[usize], mine: Range<usize>) {
        let (params, momentum) = (self.params(mine.clone()), self.momentum(mine.clone()));
        // SAFETY: the caller's promise.
        let gradients = |address: usize| -> &[f32] { unsafe { values_mut(address, mine.clone()) } };
        let first = gradients(addresses[0]);
        if let [_, second] = *addresses {
            return vectorised((params, momentum, first, gradients(second)), |(params, momentum, first, second)| {
                for (((param, momentum), a), b) in params.iter_mut().zip(momentum).zip(first).zip(second) {
                    *momentum = MOMENTUM * *momentum + (a + b);
                    *param -= LR * *momentum;
                }
            });
        }
        for (i, (param, momentum)) in params.iter_mut().zip(momentum).enumerate() {
            let sum: f32 = addresses.iter().map(|address| gradients(*address)[i]).sum();
            *momentum = MOMENTUM * *momentum + sum;
            *param -= LR * *momentum;
        }
    }

    /// Parameters of all ranks' shares that are not what `sum`, the sum of an element's gradients, makes of them.
    pub fn count_wrong(&self, len: usize, iteration: usize, sum: impl Fn(usize) -> f32) -> usize {
        let expected = |index: usize| {
            let (param, momentum) = start(index, iteration);
            param - LR * (MOMENTUM * momentum + sum(index))
        };
        self.params(0..len).iter().enumerate().filter(|(index, param)| **param != expected(*index)).count()
    }

    #[allow(clippy::mut_from_ref)]
    fn params(&self, range: Range<usize>) -> &mut [f32] {
        // SAFETY: between two barriers a rank writes its own share, and no two borrows of an element live together.
        unsafe { values_mut(self.params.address(), range) }
    }

    /// Of elements of this rank's share.
    #[allow(clippy::mut_from_ref)]
    fn momentum(&self, range: Range<usize>) -> &mut [f32] {
        // SAFETY: it is this rank's alone, and parts of an update do not overlap.
        unsafe { values_mut(self.momentum.address(), range.start - self.first..range.end - self.first) }
    }
}

/// Parameter and momentum before an iteration.
fn start(index: usize, iteration: usize) -> (f32, f32) {
    (value(7, index, iteration) as f32, 4.0 * value(11, index, iteration) as f32)
}
