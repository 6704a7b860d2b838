//! What a pass over the net needs around it, on the net's device: a batch goes in, and the outputs are judged by the loss.

use crate::data::Batch;
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::Element;
use crate::device::{Arena, Place, Slice, SliceMut};
use crate::error::Result;
use crate::model::Pass;
use crate::model::loss::{self, Loss, LossOut};
use crate::model::net::Net;
use crate::optim::cuda::Control;
use std::sync::Arc;

/// One for each rank.
pub enum Feed {
    Host(Loss),
    Cuda(Box<OnGpu>),
}

/// Copies of a batch on the GPU, and the loss there.
pub struct OnGpu {
    gpu: Gpu,
    loss: loss::cuda::Loss,
    /// Of the steps in which the net is taught.
    control: Option<Arc<Control>>,
    images: Arena,
    labels: Arena,
    /// Of the loss, and of the samples that are right.
    sums: Arena,
}

impl Feed {
    /// For a net on `place` whose batches are at most `batch` samples, of `values` each. To teach a net on a GPU it takes the
    /// `control` of its updates.
    pub fn new(place: Place, loss: Loss, batch: usize, values: usize, control: Option<Arc<Control>>) -> Result<Feed> {
        if place == Place::Host {
            return Ok(Feed::Host(loss));
        }
        let gpu = Gpu::of_this_rank()?;
        Ok(Feed::Cuda(Box::new(OnGpu {
            loss: loss::cuda::Loss::new(&loss, batch, Element::F32)?,
            control,
            images: gpu.allocate(batch * values * size_of::<f32>()).map_err(|e| e.context("images of a batch"))?,
            labels: gpu.allocate(batch * size_of::<u32>())?,
            sums: gpu.allocate(2 * size_of::<f32>())?,
            gpu,
        })))
    }

    /// The batch's images where the net reads them, until the next call.
    pub fn images<'a>(&'a self, batch: &'a Batch) -> Result<Slice<'a>> {
        let host = Slice::from(&batch.images[..]);
        match self {
            Feed::Host(_) => Ok(host),
            Feed::Cuda(on) => {
                // SAFETY: whoever reads the batch before is in the stream before it.
                let to = unsafe { on.images.slice_mut(0..host.bytes()) };
                on.gpu.compute().copy_and_wait(host, to)?;
                // SAFETY: written by this function alone.
                Ok(unsafe { on.images.slice(0..host.bytes()) })
            }
        }
    }

    /// The loss of the net's outputs, and `scale` times its gradient by them, which the net is given.
    pub fn judge_and_teach(&self, net: &mut Net, pass: &Pass, labels: &[u32], scale: f32) -> Result<LossOut> {
        let (outputs, gradient) = net.output_and_gradient(pass);
        match self {
            Feed::Host(loss) => Ok(loss.forward_backward(outputs, labels, scale, gradient)),
            Feed::Cuda(on) => on.judge(labels, |labels, sums| {
                let control = on.control.as_ref().expect("a net is taught with updates");
                // SAFETY: the net's and this feed's memory, in the order of the stream; the data set has checked the labels.
                unsafe { on.loss.forward_backward(outputs, labels, scale, gradient, sums, control) }
            }),
        }
    }

    /// The loss alone.
    pub fn judge(&self, net: &Net, pass: &Pass, labels: &[u32]) -> Result<LossOut> {
        let outputs = net.output(pass);
        match self {
            Feed::Host(loss) => Ok(loss.evaluate(outputs, labels)),
            // SAFETY: as above.
            Feed::Cuda(on) => on.judge(labels, |labels, sums| unsafe { on.loss.evaluate(outputs, labels, sums) }),
        }
    }
}

impl OnGpu {
    /// What `judge`, given labels and a place for the sums on the GPU, leaves there. Waits for it.
    fn judge(&self, labels: &[u32], judge: impl FnOnce(Slice<'_>, SliceMut<'_>) -> Result<()>) -> Result<LossOut> {
        let labels = Slice::from(bytemuck::cast_slice::<u32, f32>(labels));
        // SAFETY: this memory is used by the compute stream alone, in its order.
        let (on_gpu, sums) =
            unsafe { (self.labels.slice_mut(0..labels.bytes()), self.sums.slice_mut(0..self.sums.bytes())) };
        let stream = self.gpu.compute();
        stream.copy_and_wait(labels, on_gpu)?;
        // SAFETY: as above.
        judge(unsafe { self.labels.slice(0..labels.bytes()) }, sums)?;
        let mut out = [0.0f32; 2];
        // SAFETY: as above.
        stream.copy_and_wait(unsafe { self.sums.slice(0..self.sums.bytes()) }, SliceMut::from(&mut out[..]))?;
        Ok(LossOut { loss_sum: out[0], correct: out[1] as usize })
    }
}
