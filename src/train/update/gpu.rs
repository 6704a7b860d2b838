//! The update where the net is on a GPU. Every rank has all parameters and, unless `nccl::Sharded` shares it, all state on its
//! GPU, and takes the whole step by itself; only gradients travel. No stream waits for another longer than it must, and the
//! host waits for none:
//!
//! ```text
//! compute         ... backward of bucket 0 | of bucket 1 | of bucket 2 |               waits | forward ...
//! downloads                                [ 0 to host ] [ 1 to host ]  [ 2 to host ]
//! communication                                          [all-reduce 0] [all-reduce 1] [all-reduce 2]
//! updates                                                               [ 0 to GPU, update ] [ 1 ] [ 2 ]
//! ```
//!
//! A bucket's update needs its sums and that backward of its layers is over. The compute stream waits for the last update before
//! the forward that follows, and before all else that reads parameters, which is put into the same stream. The host may be
//! ahead by then: it learns the sums of a step (`tail`) without the GPU's updates.
//!
//! The sums are the transport's, in its fixed order, and the rule has the CPU's bits, so all ranks keep equal parameters.
//! A bucket of P parameters costs the bus 4 P bytes in each direction, at the same time, since it carries both. With NCCL, which
//! sums where the gradients are (`nccl`), and on a rank that is alone nothing goes to the host.

pub mod nccl;
mod reduction;
pub mod shards;
mod stall;

pub use reduction::Reduction;

use super::{Content, Part, Update, bytes, canonical, trainable};
use crate::comm::Communicator;
use crate::comm::bucket::{Waited, Work};
use crate::comm::nccl::Nccl;
use crate::config::raw::{self, NcclUpdate};
use crate::device::cuda::{Event, Gpu, Stream};
use crate::device::{Arena, Slice, SliceMut};
use crate::error::Result;
use crate::launch::watch::Health;
use crate::model::net::Net;
use crate::model::params::{Param, ParamTable, TAIL};
use crate::model::weights::Weights;
use crate::optim::cuda::Control;
use crate::optim::loss_scale::LossScale;
use crate::optim::{self, At};
use crate::train::checkpoint::{State, Tensor, state_name};
use nccl::{NcclSums, Sharded};
use reduction::{Alone, Staged};
use shards::{Shard, Share};
use stall::Stall;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

pub struct GpuUpdater {
    gpu: Gpu,
    table: ParamTable,
    shards: Vec<Shard>,
    /// What this rank updates where all sums are there, and holds the state of.
    shares: Vec<Share>,
    weights: Arc<Weights>,
    grads: Arc<Arena>,
    /// In host memory.
    tail: Arc<Arena>,
    rule: optim::cuda::Update,
    /// For each of these names a value for every element of the shares.
    names: &'static [&'static str],
    state: Vec<Arena>,
    /// The update of any parameter waits for all gradients.
    waits: bool,
    reduction: Arc<dyn Reduction>,
    updates: Stream,
    /// In that stream: the last update of a step is done.
    updated: Event,
    /// Where the host does not see how long the GPU waits.
    stall: Option<Arc<Stall>>,
    stood_still: Duration,
}

impl GpuUpdater {
    /// For the parameters in `weights`. Makes the arenas of the gradients, which NCCL sums if it is there, as `parallel` says.
    /// Collective.
    pub fn new(
        config: &raw::Optimizer,
        parallel: &raw::Parallel,
        table: &ParamTable,
        bucket_bytes: usize,
        weights: Arc<Weights>,
        (health, nccl): (&Arc<Health>, Option<Nccl>),
        comm: &mut dyn Communicator,
    ) -> Result<GpuUpdater> {
        let gpu = Gpu::of_this_rank()?;
        let allocate = |elements: usize, what: &str| {
            gpu.allocate(elements * size_of::<f32>()).map_err(|error| error.context(what))
        };
        let buckets = table.buckets(bucket_bytes, |_| false);
        let shards = match &nccl {
            Some(_) if parallel.nccl_update == NcclUpdate::Sharded => {
                shards::sharded(&buckets, comm.size(), comm.rank())
            }
            _ => shards::replicated(&buckets),
        };
        let grads = Arc::new(allocate(table.len(), "gradients")?);
        let rule = optim::cuda::Update::new(config, table, weights.precision)?;
        let waits = super::needs_norms(config) || rule.scales_loss();
        let stall = match nccl.is_some() && !shards.is_empty() {
            true => Some(Arc::new(Stall::new(&gpu)?)),
            false => None,
        };
        let reduction: Arc<dyn Reduction> = match nccl {
            None if comm.size() == 1 => Arc::new(Alone::new(&gpu, shards.len())?),
            None => Arc::new(Staged::new(&gpu, health, &grads, &buckets, comm)?),
            Some(nccl) => {
                let sums = NcclSums::new((nccl, parallel.reduce_dtype), &gpu, &grads, &shards, stall.as_ref())?;
                match parallel.nccl_update {
                    NcclUpdate::Replicated => Arc::new(sums),
                    NcclUpdate::Sharded => {
                        Arc::new(Sharded::new(sums, (&gpu, health), &shards, &weights, rule.control(), waits)?)
                    }
                }
            }
        };
        let names = optim::new(config).state();
        let state = |_| allocate(shards::held(&shards), "optimizer state");
        Ok(GpuUpdater {
            table: table.clone(),
            tail: Arc::new(comm.allocate(TAIL * size_of::<f32>())?),
            state: names.iter().map(state).collect::<Result<_>>()?,
            shares: shards::joined(&shards),
            updates: gpu.stream()?,
            updated: gpu.event()?,
            names,
            waits,
            rule,
            shards,
            weights,
            grads,
            reduction,
            stall,
            stood_still: Duration::ZERO,
            gpu,
        })
    }

    /// Behind what is in the stream of updates.
    fn update(&self, Share { elements, state }: &Share) -> Result<()> {
        let whole = |arena: &Arena| {
            // SAFETY: these elements are left alone by all other streams until they have waited for this one; the host looks
            // only when the compute stream, which waits too, is empty.
            unsafe { arena.slice_mut(0..arena.bytes()) }
        };
        let buffers = optim::cuda::Buffers {
            params: whole(&self.weights.f32),
            grads: whole(&self.grads).into_shared(),
            state: &self.state,
            first_state: *state,
            rounded: if self.weights.rounded.bytes() > 0 { whole(&self.weights.rounded) } else { SliceMut::empty() },
        };
        // SAFETY: as above.
        unsafe { self.rule.update(&self.updates, elements.clone(), buffers) }
    }
}

impl Work for GpuUpdater {
    fn run(&mut self, part: usize, comm: &mut dyn Communicator) -> Result<Waited> {
        let Some(shard) = self.shards.get(part) else {
            // SAFETY: this rank has written its tail, and leaves it alone until this is done.
            let tail = unsafe { self.tail.slice_mut(0..self.tail.bytes()) };
            return comm.all_reduce(tail).map(Waited::for_peers);
        };
        let waited = self.reduction.sum(part, &self.updates, comm)?;
        if !self.waits {
            self.update(&shard.mine)?;
            self.reduction.updated(part, &self.updates)?;
        }
        Ok(waited)
    }
}

impl Update for GpuUpdater {
    fn grads(&self) -> &Arc<Arena> {
        &self.grads
    }

    fn tail(&self) -> (&Arc<Arena>, Range<usize>) {
        (&self.tail, 0..TAIL)
    }

    fn parts(&self) -> Vec<Part> {
        let bucket = |shard: &Shard| Part { elements: shard.bucket.clone(), content: Content::Gradients };
        let tail = Part { elements: self.table.tail.clone(), content: Content::Tail };
        self.shards.iter().map(bucket).chain([tail]).collect()
    }

    fn reduction(&self) -> Option<Arc<dyn Reduction>> {
        Some(self.reduction.clone())
    }

    fn control(&self) -> Option<Arc<Control>> {
        Some(self.rule.control().clone())
    }

    fn loss_scale(&self) -> Result<Option<LossScale>> {
        self.rule.scales_loss().then(|| self.rule.control().loss_scale()).transpose()
    }

    fn stood_still(&self) -> Option<Duration> {
        self.stall.as_ref().map(|_| self.stood_still)
    }

    fn state_tensors(&self) -> usize {
        self.state.len()
    }

    fn begin(&mut self, at: At) -> Result<()> {
        self.rule.begin(at)
    }

    fn finish(&mut self, _: &mut dyn Communicator) -> Result<Duration> {
        if self.waits {
            // SAFETY: in the order of the stream, which has waited for all gradients.
            unsafe {
                let [grads, params] = [&self.grads, &self.weights.f32].map(|arena| arena.slice(0..arena.bytes()));
                self.rule.measure(&self.updates, grads, params)?;
            }
            self.shares.iter().try_for_each(|share| self.update(share))?;
            (0..self.shards.len()).try_for_each(|bucket| self.reduction.updated(bucket, &self.updates))?;
        }
        self.reduction.finish(&self.updates)?;
        self.updates.record(&self.updated)?;
        self.gpu.compute().wait_for(&self.updated)?;
        if let Some(stall) = &self.stall {
            self.stood_still = stall.ends(self.gpu.compute())?;
        }
        Ok(Duration::ZERO)
    }

    fn fits(&self, state: &State) -> Result<()> {
        super::fits(&self.table, self.names, state)
    }

    fn export(&mut self, net: &Net, comm: &mut dyn Communicator) -> Result<Vec<Tensor>> {
        let first = comm.rank() == 0;
        let mut tensors = if first { super::export_params(net)? } else { Vec::new() };
        for (name, arena) in self.names.iter().zip(&self.state) {
            let whole = self.reduction.collect(arena)?;
            if first {
                let mut values = vec![0.0; self.table.len()];
                // SAFETY: between steps, and the compute stream is waited for.
                let whole = unsafe { whole.slice(0..whole.bytes()) };
                self.gpu.compute().copy_and_wait(whole, SliceMut::from(&mut values[..]))?;
                let tensor =
                    |param: &Param| canonical(state_name(name, &param.name), param, &values[param.range.clone()]);
                tensors.extend(trainable(&self.table).map(tensor));
            }
        }
        Ok(tensors)
    }

    fn import(&mut self, found: Option<&State>, comm: &mut dyn Communicator) -> Result<()> {
        if let Some(now) = self.loss_scale()? {
            // One that was saved in another precision has none; one that does not change is the configuration's.
            let found = match found.and_then(|state| state.loss_scale) {
                Some(found) if self.rule.loss_scale_is_fixed() && found.scale != now.scale => {
                    LossScale { scale: now.scale, skipped_in_a_row: 0, ..found }
                }
                found => found.unwrap_or(now),
            };
            let LossScale { scale, good_steps, skipped, skipped_in_a_row } = found;
            // Each f32 is 32 bits of an integer, never a number.
            let mut words = [scale.to_bits(), good_steps, skipped, skipped_in_a_row].map(f32::from_bits);
            comm.broadcast(SliceMut::from(&mut words[..]), 0)?;
            let [scale, good_steps, skipped, skipped_in_a_row] = words.map(f32::to_bits);
            let scale = f32::from_bits(scale);
            self.rule.control().set_loss_scale(LossScale { scale, good_steps, skipped, skipped_in_a_row })?;
        }
        for (name, arena) in self.names.iter().zip(&self.state) {
            let mut values = vec![0.0; self.table.len()];
            if let Some(found) = found {
                for param in trainable(&self.table) {
                    let tensor = found.tensor(&state_name(name, &param.name), &param.spec.shape)?;
                    param.spec.to_arena(&tensor.values, &mut values[param.range.clone()]);
                }
            }
            comm.broadcast(SliceMut::from(&mut values[..]), 0)?;
            for share in &self.shares {
                // SAFETY: between steps, and the compute stream is waited for.
                let held = unsafe { arena.slice_mut(bytes(&share.held())) };
                self.gpu.compute().copy_and_wait(Slice::from(&values[share.elements.clone()]), held)?;
            }
        }
        Ok(())
    }
}

impl Drop for GpuUpdater {
    /// The GPU should have done with memory that is about to go; else giving that back waits for it. Where ranks are lost, NCCL is
    /// being aborted meanwhile. What fails here has failed before, and was said there.
    fn drop(&mut self) {
        self.updates.is_soon_done();
    }
}
