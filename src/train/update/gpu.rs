//! The update where the net is on a GPU. Every rank has all parameters and all state on its GPU, and takes the whole step by
//! itself; only gradients travel, through host memory:
//!
//! ```text
//! compute stream   backward --event-->                                    --event--> update of the bucket
//! copy stream                          gradients to host        sums to GPU
//! this thread                                           all-reduce
//! ```
//!
//! The sums are the transport's, in its fixed order, and the rule has the CPU's bits, so all ranks keep equal parameters.
//! A bucket of P parameters costs the bus 8 P bytes. A rank that is alone copies nothing.

use super::{Part, Update, bytes, canonical, trainable};
use crate::comm::Communicator;
use crate::comm::bucket::Work;
use crate::config::raw;
use crate::device::cuda::{Event, Gpu};
use crate::device::{Arena, Slice, SliceMut};
use crate::error::Result;
use crate::model::net::Net;
use crate::model::params::{Param, ParamTable};
use crate::model::weights::Weights;
use crate::optim::cuda::Control;
use crate::optim::loss_scale::LossScale;
use crate::optim::{self, At};
use crate::train::checkpoint::{State, Tensor, state_name};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

pub struct GpuUpdater {
    gpu: Gpu,
    table: ParamTable,
    buckets: Vec<Range<usize>>,
    weights: Arc<Weights>,
    grads: Arc<Arena>,
    /// The gradients in host memory, and behind them the tail, which is nowhere else.
    host: Arc<Arena>,
    rule: optim::cuda::Update,
    /// For each of these names a value for every element.
    names: &'static [&'static str],
    state: Vec<Arena>,
    /// The update of any parameter waits for all gradients.
    waits: bool,
    marks: Arc<Marks>,
    /// The sums of a bucket have come.
    arrived: Event,
    alone: bool,
}

/// By bucket: the place in the compute stream where its gradients are written.
pub struct Marks {
    gpu: Gpu,
    written: Vec<Event>,
}

impl Marks {
    /// Of the tail there is nothing to mark.
    pub fn mark(&self, part: usize) -> Result<()> {
        self.written.get(part).map_or(Ok(()), |event| self.gpu.compute().record(event))
    }
}

impl GpuUpdater {
    /// For the parameters in `weights`. Makes the arenas of the gradients. Collective.
    pub fn new(
        config: &raw::Optimizer,
        table: &ParamTable,
        bucket_bytes: usize,
        weights: Arc<Weights>,
        comm: &mut dyn Communicator,
    ) -> Result<GpuUpdater> {
        let gpu = Gpu::of_this_rank()?;
        let allocate = |what: &str| gpu.allocate(table.len() * size_of::<f32>()).map_err(|error| error.context(what));
        let buckets = table.buckets(bucket_bytes, |_| false);
        let written = buckets.iter().map(|_| gpu.event()).collect::<Result<_>>()?;
        let names = optim::new(config).state();
        let rule = optim::cuda::Update::new(config, table, weights.precision)?;
        Ok(GpuUpdater {
            table: table.clone(),
            grads: Arc::new(allocate("gradients")?),
            host: Arc::new(comm.allocate(table.len_with_tail() * size_of::<f32>())?),
            waits: super::needs_norms(config) || rule.scales_loss(),
            rule,
            names,
            state: names.iter().map(|_| allocate("optimizer state")).collect::<Result<_>>()?,
            marks: Arc::new(Marks { gpu: gpu.clone(), written }),
            arrived: gpu.event()?,
            alone: comm.size() == 1,
            buckets,
            weights,
            gpu,
        })
    }

    /// Gradients to host memory, their sums over all ranks, and these to where the gradients were.
    fn reduce(&self, bucket: usize, comm: &mut dyn Communicator) -> Result<Duration> {
        let (range, copies) = (bytes(&self.buckets[bucket]), self.gpu.copies());
        // SAFETY: this rank leaves the bucket alone until this is done; the copies are waited for, here or by the update.
        unsafe {
            copies.wait_for(&self.marks.written[bucket])?;
            copies.copy_and_wait(self.grads.slice(range.clone()), self.host.slice_mut(range.clone()))?;
            let waited = comm.all_reduce(self.host.slice_mut(range.clone()))?;
            copies.copy_and_wait(self.host.slice(range.clone()), self.grads.slice_mut(range))?;
            copies.record(&self.arrived)?;
            self.gpu.compute().wait_for(&self.arrived)?;
            Ok(waited)
        }
    }

    fn update(&self, elements: &Range<usize>) -> Result<()> {
        let whole = |arena: &Arena| {
            // SAFETY: used by the compute stream, in its order; the host looks only when that is empty.
            unsafe { arena.slice_mut(0..arena.bytes()) }
        };
        let buffers = optim::cuda::Buffers {
            params: whole(&self.weights.f32),
            grads: whole(&self.grads).into_shared(),
            state: &self.state,
            rounded: if self.weights.rounded.bytes() > 0 { whole(&self.weights.rounded) } else { SliceMut::empty() },
        };
        // SAFETY: as above.
        unsafe { self.rule.update(elements.clone(), buffers) }
    }
}

impl Work for GpuUpdater {
    fn run(&mut self, part: usize, comm: &mut dyn Communicator) -> Result<Duration> {
        if part == self.buckets.len() {
            // SAFETY: this rank has written its tail, and leaves it alone until this is done.
            return comm.all_reduce(unsafe { self.host.slice_mut(bytes(&self.table.tail)) });
        }
        let waited = if self.alone { Duration::ZERO } else { self.reduce(part, comm)? };
        if !self.waits {
            self.update(&self.buckets[part])?;
        }
        Ok(waited)
    }
}

impl Update for GpuUpdater {
    fn grads(&self) -> &Arc<Arena> {
        &self.grads
    }

    fn tail(&self) -> (&Arc<Arena>, Range<usize>) {
        (&self.host, self.table.tail.clone())
    }

    fn parts(&self) -> Vec<Part> {
        let of = |elements: &Range<usize>| Part { elements: elements.clone(), factors: false };
        self.buckets.iter().chain([&self.table.tail]).map(of).collect()
    }

    fn marks(&self) -> Option<Arc<Marks>> {
        Some(self.marks.clone())
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
            // SAFETY: in the order of the compute stream.
            unsafe {
                let [grads, params] = [&self.grads, &self.weights.f32].map(|arena| arena.slice(0..arena.bytes()));
                self.rule.measure(grads, params)?;
            }
            self.update(&(0..self.table.len()))?;
        }
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
            // One that was saved in another precision has none.
            let found = found.and_then(|state| state.loss_scale).unwrap_or(now);
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
