//! How the gradients of a bucket become their sums over all ranks, in the same place on the GPU; and, where ranks share the update,
//! how each gets the parameters that others have updated.

use crate::comm::Communicator;
use crate::comm::bucket::Waited;
use crate::device::Arena;
use crate::device::cuda::{Event, Gpu, Registered, Stream};
use crate::error::Result;
use crate::launch::watch::Health;
use crate::train::update::bytes;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

pub trait Reduction: Send + Sync {
    /// The last gradient of this bucket was put into the compute stream. Called by the training thread, which goes on with
    /// backward: puts work into streams and waits for nothing.
    fn written(&self, bucket: usize) -> Result<()>;

    /// What is put into `updates` from now on finds the sums, and finds backward of the bucket's layers to be over. Called
    /// once after each `written`, for the buckets in order, by whichever thread works them off; collective.
    fn sum(&self, bucket: usize, updates: &Stream, comm: &mut dyn Communicator) -> Result<Waited>;

    /// This rank's share of the bucket is updated by what is in `updates` now.
    fn updated(&self, _bucket: usize, _updates: &Stream) -> Result<()> {
        Ok(())
    }

    /// All buckets are. What is put into `updates` from now on finds the parameters of all ranks. Collective.
    fn finish(&self, _updates: &Stream) -> Result<()> {
        Ok(())
    }

    /// A tensor of the optimizer's state, with the shares of all ranks. It may lie where the gradients do. Between
    /// steps, when the compute stream has nothing left to do; collective.
    fn collect<'a>(&'a self, state: &'a Arena) -> Result<&'a Arena> {
        Ok(state)
    }
}

/// A rank without others: its gradients are the sums.
pub struct Alone {
    gpu: Gpu,
    /// By bucket: the place in the compute stream behind its gradients.
    written: Vec<Event>,
}

impl Alone {
    pub fn new(gpu: &Gpu, buckets: usize) -> Result<Alone> {
        Ok(Alone { gpu: gpu.clone(), written: (0..buckets).map(|_| gpu.event()).collect::<Result<_>>()? })
    }
}

impl Reduction for Alone {
    fn written(&self, bucket: usize) -> Result<()> {
        self.gpu.compute().record(&self.written[bucket])
    }

    fn sum(&self, bucket: usize, updates: &Stream, _: &mut dyn Communicator) -> Result<Waited> {
        updates.wait_for(&self.written[bucket])?;
        Ok(Waited::default())
    }
}

/// Through host memory, in which the transport sums. A stream of its own takes the gradients there while the rank's threads
/// are at other buckets; the sums go back at the head of the updates.
///
/// The host's copy of a bucket is written again when the gradients of the next step are, so behind the last update of this
/// one, for which the compute stream waits, and so behind the copy of the sums.
pub struct Staged {
    gpu: Gpu,
    health: Arc<Health>,
    downloads: Stream,
    buckets: Vec<Bucket>,
    grads: Arc<Arena>,
    host: Arc<Arena>,
    /// None where the driver would not have it.
    registered: Option<Registered>,
}

struct Bucket {
    bytes: Range<usize>,
    /// In the compute stream: its gradients are there.
    written: Event,
    /// In the stream of downloads: they are in host memory.
    landed: Event,
}

impl Staged {
    /// For the gradients in `grads`, cut into buckets of these elements. Collective.
    pub fn new(
        gpu: &Gpu,
        health: &Arc<Health>,
        grads: &Arc<Arena>,
        buckets: &[Range<usize>],
        comm: &mut dyn Communicator,
    ) -> Result<Staged> {
        let host = Arc::new(comm.allocate(grads.bytes())?);
        let registered = gpu.register(&host).inspect_err(|error| {
            let hosts = comm.hosts();
            // What is true of one rank of a host is true of all.
            if hosts.members(hosts.of(comm.rank())).first() == Some(&comm.rank()) {
                tracing::warn!(
                    "gradients go to the transport on a slower way, through memory of the driver: {error}. If a limit on \
                     locked memory is the reason (ulimit -l), raise it with ulimit -l unlimited, or \
                     docker run --ulimit memlock=-1"
                );
            }
        });
        let bucket = |elements| Ok(Bucket { bytes: bytes(elements), written: gpu.event()?, landed: gpu.event()? });
        Ok(Staged {
            gpu: gpu.clone(),
            health: health.clone(),
            downloads: gpu.stream()?,
            buckets: buckets.iter().map(bucket).collect::<Result<_>>()?,
            grads: grads.clone(),
            host,
            registered: registered.ok(),
        })
    }

    fn download(&self, bucket: &Bucket) -> Result<()> {
        let range = || bucket.bytes.clone();
        self.downloads.wait_for(&bucket.written)?;
        // SAFETY: both live until `drop` has waited. This rank leaves these gradients alone until their update, which waits
        // for `landed`, and their copy as the type says.
        unsafe { self.downloads.copy(self.grads.slice(range()), self.host.slice_mut(range())) }?;
        self.downloads.record(&bucket.landed)
    }
}

impl Reduction for Staged {
    fn written(&self, bucket: usize) -> Result<()> {
        let bucket = &self.buckets[bucket];
        self.gpu.compute().record(&bucket.written)?;
        match self.registered {
            Some(_) => self.download(bucket),
            // A copy to other memory keeps its caller until it is done.
            None => Ok(()),
        }
    }

    fn sum(&self, bucket: usize, updates: &Stream, comm: &mut dyn Communicator) -> Result<Waited> {
        let bucket = &self.buckets[bucket];
        let start = Instant::now();
        self.health.wait_for_gpu("computing gradients", || bucket.written.is_done())?;
        let for_gpu = start.elapsed();
        if self.registered.is_none() {
            self.download(bucket)?;
        }
        self.health.wait_for_gpu("copying gradients to host memory", || bucket.landed.is_done())?;
        // SAFETY: the gradients have landed, and this copy is the transport's until it returns, then the stream's.
        unsafe {
            let for_peers = comm.all_reduce(self.host.slice_mut(bucket.bytes.clone()))?;
            updates.copy(self.host.slice(bucket.bytes.clone()), self.grads.slice_mut(bucket.bytes.clone()))?;
            Ok(Waited { for_gpu, for_peers })
        }
    }
}

impl Drop for Staged {
    /// The GPU should have done with memory that is about to go; else giving that back waits for it. What fails here has failed
    /// before, and was said there.
    fn drop(&mut self) {
        self.downloads.is_soon_done();
    }
}
