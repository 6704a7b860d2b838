//! The update shared among the ranks, each with its chunk of every bucket and the optimizer's state of that alone (ZeRO stage 1,
//! Rajbhandari et al. 2020), as on the CPU. NCCL scatters the sums of gradients and gathers the new parameters:
//!
//! ```text
//! compute   backward of bucket 0 | of bucket 1 | of bucket 2 |                                          waits | forward ...
//! sums                             [ scatter 0 ] [ scatter 1 ] [ gather 0 ] [ scatter 2 ] [ gather 1 ] [ gather 2 ]
//! updates                                        [ update 0 ]  [ update 1 ]               [ update 2 ]
//! ```
//!
//! A bucket is gathered behind the scatter of the next one, so that the link is busy while it is updated. Between the GPUs go
//! as many bytes as for an all-reduce, which is both of it: 8 (N - 1) / N a parameter and rank. An update reads and writes 1/N of
//! what it does where each rank updates all. What comes in 16 bits too, a kernel rounds behind the gather: 6 bytes a parameter.
//!
//! Where an update waits for all sums (`GpuUpdater`), whole gradients are summed, so that each rank measures them as it would
//! without sharing; then all chunks are updated, and gathered.
//!
//! A step that is halted must be so on all ranks: what one of them updates reaches all. A loss that is not finite is known to one
//! rank alone; so the ranks add up their words for a halt before the first update.

use super::sums::NcclSums;
use crate::comm::Communicator;
use crate::comm::bucket::Waited;
use crate::device::Arena;
use crate::device::cuda::nccl::DataType;
use crate::device::cuda::{Elementwise, Event, Gpu, Stream};
use crate::error::Result;
use crate::launch::watch::Health;
use crate::model::precision::Precision;
use crate::model::weights::Weights;
use crate::optim::cuda::Control;
use crate::train::update::bytes;
use crate::train::update::gpu::reduction::Reduction;
use crate::train::update::gpu::shards::Shard;
use std::ops::Range;
use std::sync::Arc;

pub struct Sharded {
    /// First to go, see there.
    sums: NcclSums,
    health: Arc<Health>,
    shards: Vec<Shard>,
    weights: Arc<Weights>,
    /// Where layers read 16 bits.
    rounding: Option<Elementwise>,
    control: Arc<Control>,
    /// The update of any parameter waits for all gradients.
    waits: bool,
    /// By bucket, in the stream of updates: this rank's share is updated.
    updated: Vec<Event>,
    /// In the stream of sums: all parameters are there.
    gathered: Event,
}

impl Sharded {
    pub fn new(
        sums: NcclSums,
        (gpu, health): (&Gpu, &Arc<Health>),
        shards: &[Shard],
        weights: &Arc<Weights>,
        control: &Arc<Control>,
        waits: bool,
    ) -> Result<Sharded> {
        let rounding = match weights.precision {
            Precision::F32 => None,
            precision => Some(Elementwise::new(gpu, precision.element())?),
        };
        Ok(Sharded {
            sums,
            health: health.clone(),
            shards: shards.to_vec(),
            weights: weights.clone(),
            rounding,
            control: control.clone(),
            waits,
            updated: shards.iter().map(|_| gpu.event()).collect::<Result<_>>()?,
            gathered: gpu.event()?,
        })
    }

    /// No rank updates anything if one of them does not. All have judged their losses before they come here.
    fn halt_together(&self) -> Result<()> {
        // SAFETY: between the last loss and the updates, which wait for this, nobody else touches the word.
        unsafe { self.sums.nccl.all_reduce(self.control.halt(), DataType::Uint32, &self.sums.stream) }
    }

    /// The parameters of a bucket, from all ranks, behind this rank's update of its share.
    fn gather(&self, bucket: usize) -> Result<()> {
        let shard = &self.shards[bucket];
        if !shard.is_shared() {
            return Ok(());
        }
        self.sums.stream.wait_for(&self.updated[bucket])?;
        // SAFETY: this rank leaves these parameters alone until all is gathered, for which the compute stream waits.
        unsafe {
            self.sums.nccl.all_gather(self.weights.f32.slice_mut(bytes(&shard.bucket)), &self.sums.stream)?;
        }
        let Shard { bucket: whole, mine } = shard;
        self.round(whole.start..mine.elements.start)?;
        self.round(mine.elements.end..whole.end)
    }

    /// What has come, as the layers read it; the update has rounded the rest.
    fn round(&self, received: Range<usize>) -> Result<()> {
        let Some(kernels) = self.rounding.as_ref().filter(|_| !received.is_empty()) else { return Ok(()) };
        let Weights { f32, rounded, precision, .. } = &*self.weights;
        // SAFETY: as above.
        unsafe {
            let rounded = rounded.slice_mut(precision.bytes_of(&received));
            kernels.narrow_in(&self.sums.stream, f32.slice(bytes(&received)), rounded)
        }
    }
}

impl Reduction for Sharded {
    fn written(&self, bucket: usize) -> Result<()> {
        self.sums.written(bucket)
    }

    /// What is waited for, the GPU waits for.
    fn sum(&self, bucket: usize, updates: &Stream, _: &mut dyn Communicator) -> Result<Waited> {
        let shard = &self.shards[bucket];
        self.sums.wait_for_gradients(bucket)?;
        if bucket == 0 {
            self.halt_together()?;
        }
        match shard.is_shared() && !self.waits {
            true => self.sums.reduce_scatter(bucket, &shard.mine.elements)?,
            false => self.sums.all_reduce(bucket)?,
        }
        self.sums.hand_over(bucket, updates)?;
        if bucket > 0 && !self.waits {
            self.gather(bucket - 1)?;
        }
        Ok(Waited::default())
    }

    fn updated(&self, bucket: usize, updates: &Stream) -> Result<()> {
        updates.record(&self.updated[bucket])
    }

    fn finish(&self, updates: &Stream) -> Result<()> {
        let left = if self.waits { 0 } else { self.shards.len().saturating_sub(1) };
        (left..self.shards.len()).try_for_each(|bucket| self.gather(bucket))?;
        self.sums.stream.record(&self.gathered)?;
        updates.wait_for(&self.gathered)
    }

    fn collect<'a>(&'a self, state: &'a Arena) -> Result<&'a Arena> {
        let (stream, whole) = (&self.sums.stream, &*self.sums.grads);
        for shard in &self.shards {
            let Shard { bucket, mine } = shard;
            // SAFETY: between steps gradients and state are idle; both stay until the wait below is over.
            unsafe {
                stream.copy(state.slice(bytes(&mine.held())), whole.slice_mut(bytes(&mine.elements)))?;
                if shard.is_shared() {
                    self.sums.nccl.all_gather(whole.slice_mut(bytes(bucket)), stream)?;
                }
            }
        }
        self.health.wait_for_gpu("collecting the optimizer's state", || stream.is_done())?;
        Ok(whole)
    }
}
