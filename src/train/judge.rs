//! The loss of the net's outputs, on the net's device. On a GPU it is known only when the GPU has come so far, and nobody waits
//! for that before it must be: `found` does.

use super::feed::Fed;
use crate::device::cuda::kernels::Element;
use crate::device::cuda::{Event, Gpu};
use crate::device::{Arena, Place, Slice, SliceMut};
use crate::error::Result;
use crate::launch::watch::Health;
use crate::model::Pass;
use crate::model::loss::{self, Loss, LossOut};
use crate::model::net::Net;
use crate::optim::cuda::Control;
use std::ops::Range;
use std::sync::Arc;

/// One for each rank.
pub enum Judge {
    /// With what was found, by number.
    Host(Loss, Vec<LossOut>),
    Cuda(Box<OnGpu>),
}

pub struct OnGpu {
    gpu: Gpu,
    loss: loss::cuda::Loss,
    /// What is told when a loss is not finite.
    control: Option<Arc<Control>>,
    /// By number: of the loss, and of the samples that are right; and a copy of it in pinned host memory.
    sums: Arena,
    copy: Arena,
    /// By number: the copy is made.
    copied: Vec<Event>,
}

impl Judge {
    /// For a net on `place` whose batches are at most `batch` samples; it keeps what it finds for so many passes. `control`
    /// halts the update of a step whose loss is not finite.
    pub fn new(place: Place, loss: Loss, batch: usize, passes: usize, control: Option<Arc<Control>>) -> Result<Judge> {
        if place == Place::Host {
            return Ok(Judge::Host(loss, vec![LossOut::default(); passes]));
        }
        let gpu = Gpu::of_this_rank()?;
        let bytes = range_of(passes).start;
        Ok(Judge::Cuda(Box::new(OnGpu {
            loss: loss::cuda::Loss::new(&loss, batch, Element::F32)?,
            control,
            sums: gpu.allocate(bytes)?,
            copy: gpu.allocate_pinned(bytes)?,
            copied: (0..passes).map(|_| gpu.event()).collect::<Result<_>>()?,
            gpu,
        })))
    }

    /// The loss, to be kept as that of pass `number`, and `scale` times its gradient by the outputs, which the net is given.
    /// `taught` follows.
    pub fn teach(&mut self, net: &mut Net, pass: &Pass, fed: &Fed<'_>, scale: f32, number: usize) -> Result<()> {
        let (outputs, gradient) = net.output_and_gradient(pass);
        match self {
            Judge::Host(loss, found) => {
                found[number] = loss.forward_backward(outputs, &fed.batch.labels, scale, gradient);
                Ok(())
            }
            Judge::Cuda(on) => on.compute(number, |sums| {
                let halt = on.control.as_ref().map(|control| control.halt());
                // SAFETY: the net's, the feed's and this judge's memory, in the order of the compute stream; the data set has
                // checked the labels.
                unsafe { on.loss.forward_backward(outputs, fed.labels, scale, gradient, sums, halt) }
            }),
        }
    }

    /// `teach` is in the stream of pass `number`.
    pub fn taught(&self, number: usize) -> Result<()> {
        match self {
            Judge::Host(..) => Ok(()),
            Judge::Cuda(on) => on.gpu.compute().record(&on.copied[number]),
        }
    }

    /// The loss alone.
    pub fn judge(&mut self, net: &Net, pass: &Pass, fed: &Fed<'_>, number: usize) -> Result<()> {
        let outputs = net.output(pass);
        match self {
            Judge::Host(loss, found) => {
                found[number] = loss.evaluate(outputs, &fed.batch.labels);
                Ok(())
            }
            Judge::Cuda(on) => {
                // SAFETY: as above.
                on.compute(number, |sums| unsafe { on.loss.evaluate(outputs, fed.labels, sums) })?;
                self.taught(number)
            }
        }
    }

    /// What was found last as that of pass `number`, where nobody has to wait for it.
    pub fn found_at_once(&self, number: usize) -> Option<LossOut> {
        match self {
            Judge::Host(_, found) => Some(found[number]),
            Judge::Cuda(_) => None,
        }
    }

    /// The same, waiting for it.
    pub fn found(&self, number: usize, health: &Health) -> Result<LossOut> {
        match self {
            Judge::Host(_, found) => Ok(found[number]),
            Judge::Cuda(on) => on.found(number, health),
        }
    }
}

impl OnGpu {
    /// What `judge`, given a place for the sums, leaves there, is copied to the host.
    fn compute(&self, number: usize, judge: impl FnOnce(SliceMut<'_>) -> Result<()>) -> Result<()> {
        let (range, compute) = (range_of(number), self.gpu.compute());
        // SAFETY: this memory is used in the order of the compute stream; the host reads the copy behind its event.
        unsafe {
            judge(self.sums.slice_mut(range.clone()))?;
            compute.copy(self.sums.slice(range.clone()), self.copy.slice_mut(range))
        }
    }

    fn found(&self, number: usize, health: &Health) -> Result<LossOut> {
        health.wait_for_gpu("computing the loss", || self.copied[number].is_done())?;
        // SAFETY: the copy is over.
        let sums: Slice<'_> = unsafe { self.copy.slice(range_of(number)) };
        let [loss_sum, correct] = *sums.f32() else { unreachable!("two sums a pass") };
        Ok(LossOut { loss_sum, correct: correct as usize })
    }
}

/// Bytes of the sums of a pass.
fn range_of(number: usize) -> Range<usize> {
    let bytes = 2 * size_of::<f32>();
    number * bytes..(number + 1) * bytes
}
