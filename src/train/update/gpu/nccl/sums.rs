//! Sums of gradients by NCCL, on a stream of their own. Where every rank updates all, that is the whole way of a bucket.
//!
//! ```text
//! compute    backward of bucket 0 | of bucket 1 |
//! sums                              [ sum of 0 ]  [ sum of 1 ]
//! updates                                         [ update 0 ] [ update 1 ]
//! ```
//!
//! To sum in bf16, the stream of sums rounds a bucket into memory of its own, sums there, and widens the result to where the
//! gradients were: 12 bytes a parameter through the GPU's memory, for half the bytes between the GPUs.

use crate::comm::Communicator;
use crate::comm::bucket::Waited;
use crate::comm::nccl::Nccl;
use crate::config::raw::ReduceDtype;
use crate::device::cuda::kernels::Element;
use crate::device::cuda::nccl::DataType;
use crate::device::cuda::{Elementwise, Event, Gpu, Stream};
use crate::device::{Arena, Slice, SliceMut};
use crate::error::Result;
use crate::train::update::bytes;
use crate::train::update::gpu::reduction::Reduction;
use crate::train::update::gpu::shards::Shard;
use crate::train::update::gpu::stall::Stall;
use std::ops::Range;
use std::sync::Arc;

pub struct NcclSums {
    /// First to go: after that the GPU uses nothing of the others.
    pub nccl: Nccl,
    gpu: Gpu,
    /// What NCCL is asked for is in this stream alone.
    pub stream: Stream,
    buckets: Vec<Bucket>,
    pub grads: Arc<Arena>,
    /// To sum in bf16.
    rounded: Option<Rounded>,
    stall: Option<Arc<Stall>>,
}

struct Bucket {
    elements: Range<usize>,
    /// In the compute stream: its gradients are there.
    written: Event,
    /// In the stream of sums: so are their sums.
    summed: Event,
}

/// Memory for the longest bucket, used by one after the other in the order of the stream of sums.
struct Rounded {
    kernels: Elementwise,
    memory: Arena,
}

/// Bytes of device memory to sum these buckets in this type, beside the gradients.
pub fn bytes_to_sum_in(of: ReduceDtype, shards: &[Shard]) -> usize {
    match of {
        ReduceDtype::F32 => 0,
        ReduceDtype::Bf16 => shards.iter().map(|shard| shard.bucket.len()).max().unwrap_or(0) * Element::Bf16.bytes(),
    }
}

impl NcclSums {
    /// For the gradients in `grads`, cut like this.
    pub fn new(
        (nccl, of): (Nccl, ReduceDtype),
        gpu: &Gpu,
        grads: &Arc<Arena>,
        shards: &[Shard],
        stall: Option<&Arc<Stall>>,
    ) -> Result<NcclSums> {
        let rounded = match of {
            ReduceDtype::F32 => None,
            ReduceDtype::Bf16 => {
                let memory = gpu.allocate(bytes_to_sum_in(of, shards))?;
                Some(Rounded { kernels: Elementwise::new(gpu, Element::Bf16)?, memory })
            }
        };
        let bucket =
            |shard: &Shard| Ok(Bucket { elements: shard.bucket.clone(), written: gpu.event()?, summed: gpu.event()? });
        Ok(NcclSums {
            nccl,
            gpu: gpu.clone(),
            stream: gpu.stream()?,
            buckets: shards.iter().map(bucket).collect::<Result<_>>()?,
            grads: grads.clone(),
            rounded,
            stall: stall.cloned(),
        })
    }

    /// What is put into the stream of sums from now on finds the gradients of this bucket.
    pub fn wait_for_gradients(&self, bucket: usize) -> Result<()> {
        self.stream.wait_for(&self.buckets[bucket].written)
    }

    /// Every rank gets the sums of the whole bucket.
    pub fn all_reduce(&self, bucket: usize) -> Result<()> {
        let elements = &self.buckets[bucket].elements;
        self.in_their_type(elements, elements, |nccl, terms, of, stream| {
            // SAFETY: see `in_their_type`.
            unsafe { nccl.all_reduce(terms, of, stream) }
        })
    }

    /// This rank gets the sums of its chunk, which are `mine`.
    pub fn reduce_scatter(&self, bucket: usize, mine: &Range<usize>) -> Result<()> {
        let elements = &self.buckets[bucket].elements;
        self.in_their_type(elements, mine, |nccl, terms, of, stream| {
            // SAFETY: see `in_their_type`.
            unsafe { nccl.reduce_scatter(terms, of, stream) }
        })
    }

    /// Lets NCCL sum these gradients; the sums of `mine` are in their place afterwards.
    fn in_their_type(
        &self,
        elements: &Range<usize>,
        mine: &Range<usize>,
        sum: impl FnOnce(&Nccl, SliceMut<'_>, DataType, &Stream) -> Result<()>,
    ) -> Result<()> {
        // SAFETY: all live until `nccl` is gone. This rank leaves these gradients alone until their update, which waits for
        // the sums; the other memory belongs to this stream.
        unsafe {
            let Some(Rounded { kernels, memory }) = &self.rounded else {
                return sum(&self.nccl, self.grads.slice_mut(bytes(elements)), DataType::Float32, &self.stream);
            };
            let size = Element::Bf16.bytes();
            let rounded = || memory.slice_mut(0..elements.len() * size);
            let summed: Slice<'_> =
                memory.slice((mine.start - elements.start) * size..(mine.end - elements.start) * size);
            kernels.narrow_in(&self.stream, self.grads.slice(bytes(elements)), rounded())?;
            sum(&self.nccl, rounded(), DataType::Bfloat16, &self.stream)?;
            kernels.widen_in(&self.stream, summed, self.grads.slice_mut(bytes(mine)))
        }
    }

    /// What is put into `updates` from now on finds the sums of this bucket.
    pub fn hand_over(&self, bucket: usize, updates: &Stream) -> Result<()> {
        let summed = &self.buckets[bucket].summed;
        self.stream.record(summed)?;
        updates.wait_for(summed)
    }
}

impl Reduction for NcclSums {
    fn written(&self, bucket: usize) -> Result<()> {
        let compute = self.gpu.compute();
        let last = bucket + 1 == self.buckets.len();
        if let Some(stall) = self.stall.as_ref().filter(|_| last) {
            stall.may_begin(compute)?;
        }
        compute.record(&self.buckets[bucket].written)
    }

    /// What is waited for, the GPU waits for.
    fn sum(&self, bucket: usize, updates: &Stream, _: &mut dyn Communicator) -> Result<Waited> {
        self.wait_for_gradients(bucket)?;
        self.all_reduce(bucket)?;
        self.hand_over(bucket, updates)?;
        Ok(Waited::default())
    }
}
