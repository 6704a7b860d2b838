//! The update where the net is on a GPU. Every rank has all parameters and all state on its GPU, and takes the whole step by
//! itself; only gradients travel. No stream waits for another longer than it must, and the host waits for none:
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

pub use reduction::Reduction;

use super::{Content, Part, Update, canonical, trainable};
use crate::comm::Communicator;
use crate::comm::bucket::{Waited, Work};
use crate::comm::nccl::Nccl;
use crate::config::raw;
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
use nccl::ByNccl;
use reduction::{Alone, Staged};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

pub struct GpuUpdater {
    gpu: Gpu,
    table: ParamTable,
    buckets: Vec<Range<usize>>,
    weights: Arc<Weights>,
    grads: Arc<Arena>,
    /// In host memory.
    tail: Arc<Arena>,
    rule: optim::cuda::Update,
    /// For each of these names a value for every element.
    names: &'static [&'static str],
    state: Vec<Arena>,
    /// The update of any parameter waits for all gradients.
    waits: bool,
    reduction: Arc<dyn Reduction>,
    updates: Stream,
    /// In that stream: the last update of a step is done.
    updated: Event,
}

impl GpuUpdater {
    /// For the parameters in `weights`. Makes the arenas of the gradients, which NCCL sums if it is there. Collective.
    pub fn new(
        config: &raw::Optimizer,
        table: &ParamTable,
        bucket_bytes: usize,
        weights: Arc<Weights>,
        (health, nccl): (&Arc<Health>, Option<Nccl>),
        comm: &mut dyn Communicator,
    ) -> Result<GpuUpdater> {
        let gpu = Gpu::of_this_rank()?;
        let allocate = |what: &str| gpu.allocate(table.len() * size_of::<f32>()).map_err(|error| error.context(what));
        let buckets = table.buckets(bucket_bytes, |_| false);
        let names = optim::new(config).state();
        let grads = Arc::new(allocate("gradients")?);
        let reduction: Arc<dyn Reduction> = match nccl {
            Some(nccl) => Arc::new(ByNccl::new(nccl, &gpu, &grads, &buckets)?),
            None if comm.size() == 1 => Arc::new(Alone::new(&gpu, buckets.len())?),
            None => Arc::new(Staged::new(&gpu, health, &grads, &buckets, comm)?),
        };
        let rule = optim::cuda::Update::new(config, table, weights.precision)?;
        Ok(GpuUpdater {
            table: table.clone(),
            tail: Arc::new(comm.allocate(TAIL * size_of::<f32>())?),
            waits: super::needs_norms(config) || rule.scales_loss(),
            rule,
            names,
            state: names.iter().map(|_| allocate("optimizer state")).collect::<Result<_>>()?,
            updates: gpu.stream()?,
            updated: gpu.event()?,
            buckets,
            weights,
            grads,
            reduction,
            gpu,
        })
    }

    /// Behind what is in the stream of updates.
    fn update(&self, elements: &Range<usize>) -> Result<()> {
        let whole = |arena: &Arena| {
            // SAFETY: these elements are left alone by all other streams until they have waited for this one; the host looks
            // only when the compute stream, which waits too, is empty.
            unsafe { arena.slice_mut(0..arena.bytes()) }
        };
        let buffers = optim::cuda::Buffers {
            params: whole(&self.weights.f32),
            grads: whole(&self.grads).into_shared(),
            state: &self.state,
            rounded: if self.weights.rounded.bytes() > 0 { whole(&self.weights.rounded) } else { SliceMut::empty() },
        };
        // SAFETY: as above.
        unsafe { self.rule.update(&self.updates, elements.clone(), buffers) }
    }
}

impl Work for GpuUpdater {
    fn run(&mut self, part: usize, comm: &mut dyn Communicator) -> Result<Waited> {
        let Some(bucket) = self.buckets.get(part) else {
            // SAFETY: this rank has written its tail, and leaves it alone until this is done.
            let tail = unsafe { self.tail.slice_mut(0..self.tail.bytes()) };
            return comm.all_reduce(tail).map(Waited::for_peers);
        };
        let waited = self.reduction.sum(part, &self.updates, comm)?;
        if !self.waits {
            self.update(bucket)?;
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
        let bucket = |elements: &Range<usize>| Part { elements: elements.clone(), content: Content::Gradients };
        let tail = Part { elements: self.table.tail.clone(), content: Content::Tail };
        self.buckets.iter().map(bucket).chain([tail]).collect()
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
            self.update(&(0..self.table.len()))?;
        }
        self.updates.record(&self.updated)?;
        self.gpu.compute().wait_for(&self.updated)?;
        Ok(Duration::ZERO)
    }

    fn fits(&self, state: &State) -> Result<()> {
        super::fits(&self.table, self.names, state)
    }

    /// Rank 0 has all of it.
    fn export(&mut self, net: &Net, comm: &mut dyn Communicator) -> Result<Vec<Tensor>> {
        if comm.rank() > 0 {
            return Ok(Vec::new());
        }
        let mut tensors = super::export_params(net)?;
        let mut values = vec![0.0; self.table.len()];
        for (name, arena) in self.names.iter().zip(&self.state) {
            // SAFETY: between steps, and the compute stream is waited for.
            let held = unsafe { arena.slice(0..arena.bytes()) };
            self.gpu.compute().copy_and_wait(held, SliceMut::from(&mut values[..]))?;
            let tensor = |param: &Param| canonical(state_name(name, &param.name), param, &values[param.range.clone()]);
            tensors.extend(trainable(&self.table).map(tensor));
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
            // SAFETY: between steps, and the compute stream is waited for.
            let held = unsafe { arena.slice_mut(0..arena.bytes()) };
            self.gpu.compute().copy_and_wait(Slice::from(&values[..]), held)?;
        }
        Ok(())
    }
}

impl Drop for GpuUpdater {
    /// The GPU must have done with memory that is about to go. What fails here has failed before, and was said there.
    fn drop(&mut self) {
        let _ = self.updates.wait();
    }
}
