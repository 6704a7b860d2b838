//! Sums by NCCL, where the gradients lie; nothing of them goes through the host.
//!
//! ```text
//! compute    backward of bucket 0 | of bucket 1 |
//! sums                              [ sum of 0 ]  [ sum of 1 ]
//! updates                                         [ update 0 ] [ update 1 ]
//! ```
//!
//! To sum in bf16, the stream of sums rounds a bucket into memory of its own, sums there, and widens the result to where the
//! gradients were: 12 bytes a parameter through the GPU's memory, for half the bytes between the GPUs.

use super::Reduction;
use crate::comm::Communicator;
use crate::comm::bucket::Waited;
use crate::comm::nccl::{self, Nccl};
use crate::config::raw::{Parallel, ReduceDtype, TransportChoice};
use crate::device::Arena;
use crate::device::cuda::kernels::Element;
use crate::device::cuda::nccl::DataType;
use crate::device::cuda::{Elementwise, Event, Gpu, Stream, libraries};
use crate::error::{Context, Error, Kind, Result};
use crate::launch::rendezvous::host;
use crate::train::Rank;
use crate::train::agreement::{gather_bytes, of_all};
use crate::train::update::bytes;
use std::ops::Range;
use std::sync::Arc;

/// NCCL among the ranks, if it is to sum their gradients: because `[parallel] transport` says so, or because each rank has a GPU
/// of its own and all have the same NCCL. Collective; all ranks come to the same answer.
pub fn connect(parallel: &Parallel, rank: &Rank, comm: &mut dyn Communicator) -> Result<Option<Nccl>> {
    let by_itself = match parallel.transport {
        _ if comm.size() == 1 => return Ok(None),
        TransportChoice::Nccl => false,
        TransportChoice::Auto if !parallel.allow_shared_gpu => true,
        _ => return Ok(None),
    };
    match obstacle(&found_by_all(comm)?) {
        None => {}
        Some(why) if by_itself => {
            if rank.world.rank == 0 {
                tracing::warn!("gradients go through host memory, since {why}");
            }
            return Ok(None);
        }
        Some(why) => return Err(of_all(Error::device(why), rank, comm)),
    }
    if parallel.allow_shared_gpu {
        nccl::share_gpus(comm.rank())?;
    }
    let of = match parallel.reduce_dtype {
        ReduceDtype::F32 => DataType::Float32,
        ReduceDtype::Bf16 => DataType::Bfloat16,
    };
    let joined = Nccl::connect(&Gpu::of_this_rank()?, of, comm, &rank.health);
    joined.map(Some).map_err(|error| match error.kind() {
        Kind::Device => Error::device(format!("{error}. parallel.transport = \"shm\" or \"tcp\" does without it")),
        _ => error,
    })
}

/// A rank's host, and the version of NCCL that it has found, or why none.
type Found = (String, Result<String, String>);

/// By rank. Collective.
fn found_by_all(comm: &mut dyn Communicator) -> Result<Vec<Found>> {
    let found = libraries::nccl().map(|nccl| nccl.version.to_string()).map_err(|error| error.to_string());
    let mine: Found = (host().to_string(), found);
    let all = gather_bytes(comm, &serde_json::to_vec(&mine).expect("plain data"))?;
    let all: Result<Vec<Found>, _> = all.iter().map(|bytes| serde_json::from_slice(bytes)).collect();
    all.or_kind(Kind::Internal, "which NCCL the other ranks have")
}

/// Why NCCL cannot be used: a rank has none, or another than the first.
fn obstacle(found: &[Found]) -> Option<String> {
    if let Some((rank, (host, Err(why)))) = found.iter().enumerate().find(|(_, (_, found))| found.is_err()) {
        let alike = found.iter().all(|(_, other)| other.as_ref() == Err(why));
        return Some(if alike { why.clone() } else { format!("rank {rank} on {host} has no NCCL: {why}") });
    }
    let (rank, (host, other)) = found.iter().enumerate().find(|(_, (_, version))| *version != found[0].1)?;
    let [first, other] = [&found[0].1, other].map(|version| version.as_deref().unwrap_or_default());
    Some(format!(
        "rank {rank} on {host} has NCCL {other}, and rank 0 on {} has {first}: give all ranks one version (trainer info \
         shows where each was found)",
        found[0].0
    ))
}

/// NCCL's sums of gradients, on a stream of their own.
pub struct ByNccl {
    /// First to go: after that the GPU uses nothing of the others.
    nccl: Nccl,
    gpu: Gpu,
    sums: Stream,
    buckets: Vec<Bucket>,
    grads: Arc<Arena>,
    /// To sum in bf16.
    rounded: Option<Rounded>,
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

impl ByNccl {
    /// For the gradients in `grads`, cut into buckets of these elements.
    pub fn new(nccl: Nccl, gpu: &Gpu, grads: &Arc<Arena>, buckets: &[Range<usize>]) -> Result<ByNccl> {
        let rounded = match nccl.sums_in() {
            DataType::Float32 => None,
            DataType::Bfloat16 => {
                let longest = buckets.iter().map(Range::len).max().unwrap_or(0);
                let kernels = Elementwise::new(gpu, Element::Bf16)?;
                Some(Rounded { kernels, memory: gpu.allocate(longest * Element::Bf16.bytes())? })
            }
        };
        let bucket = |elements: &Range<usize>| {
            Ok(Bucket { elements: elements.clone(), written: gpu.event()?, summed: gpu.event()? })
        };
        Ok(ByNccl {
            nccl,
            gpu: gpu.clone(),
            sums: gpu.stream()?,
            buckets: buckets.iter().map(bucket).collect::<Result<_>>()?,
            grads: grads.clone(),
            rounded,
        })
    }
}

impl Reduction for ByNccl {
    fn written(&self, bucket: usize) -> Result<()> {
        self.gpu.compute().record(&self.buckets[bucket].written)
    }

    /// What is waited for, the GPU waits for.
    fn sum(&self, bucket: usize, updates: &Stream, _: &mut dyn Communicator) -> Result<Waited> {
        let (Bucket { elements, written, summed }, sums) = (&self.buckets[bucket], &self.sums);
        sums.wait_for(written)?;
        // SAFETY: all live until `nccl` is gone. This rank leaves these gradients alone until their update, which waits for
        // `summed`; the other memory belongs to this stream.
        unsafe {
            let grads = || self.grads.slice_mut(bytes(elements));
            match &self.rounded {
                None => self.nccl.sum(grads(), sums)?,
                Some(Rounded { kernels, memory }) => {
                    let rounded = || memory.slice_mut(0..elements.len() * Element::Bf16.bytes());
                    kernels.narrow_in(sums, grads().into_shared(), rounded())?;
                    self.nccl.sum(rounded(), sums)?;
                    kernels.widen_in(sums, rounded().into_shared(), grads())?;
                }
            }
        }
        sums.record(summed)?;
        updates.wait_for(summed)?;
        Ok(Waited::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_rank_that_stands_in_the_way_is_named() {
        let found = |versions: &[Result<&str, &str>]| {
            let on = |(rank, version): (usize, &Result<&str, &str>)| {
                (format!("n{rank}"), version.map(str::to_owned).map_err(str::to_owned))
            };
            versions.iter().enumerate().map(on).collect::<Vec<_>>()
        };
        let (new, old, none) = (Ok("2.29.2"), Ok("2.27.5"), Err("not found"));
        assert_eq!(obstacle(&found(&[new, new])), None);
        assert_eq!(obstacle(&found(&[none, none])).unwrap(), "not found");
        assert_eq!(obstacle(&found(&[old, new, none])).unwrap(), "rank 2 on n2 has no NCCL: not found");
        let unlike = obstacle(&found(&[new, new, old])).unwrap();
        assert!(unlike.starts_with("rank 2 on n2 has NCCL 2.27.5, and rank 0 on n0 has 2.29.2: give"), "{unlike}");
    }
}
