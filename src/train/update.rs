//! From gradients to new parameters, a bucket at a time, each rank its share.
//!
//! Rank r sums chunk r of a bucket over all ranks and at once, while the sums are in the cache, updates chunk r of the
//! parameters; the optimizer's state for chunk r is nowhere else (sharded as in ZeRO stage 1, Rajbhandari et al. 2020).
//! Where the ranks of a host share one copy of the parameters, that is all: no sum is written, no parameter is sent.
//!
//! In memory an element costs its N gradients, and the parameter and S values of state in and out: 4 (N + 2 + 2 S) bytes, for
//! 1/N of the elements a rank. SGD with momentum on 2 ranks: 12 bytes a parameter and rank. An all-reduce, 16 bytes read and
//! written, and then the optimizer on every rank, 20 more, would cost three times that. Over a network a rank sends what it
//! would for an all-reduce, but half of it are parameters instead of sums.
//!
//! Every element-wise rule gives the bits of an all-reduce followed by the rule over whole tensors. What needs norms of
//! whole tensors (clipping by norm, LARS) waits for all sums: then the buckets are only reduced, and `finish` measures
//! (`Norms`) and updates.

use super::checkpoint::{State, Tensor, state_name};
use super::factors::{Exchange, Leaves};
use super::norms::{Norms, intersection, shift};
use crate::comm::bucket::{Waited, Work};
use crate::comm::{Communicator, chunk};
use crate::config::raw;
use crate::device::Arena;
use crate::error::Result;
use crate::model::net::Net;
use crate::model::params::{Param, ParamTable, Role};
use crate::model::weights::Weights;
use crate::optim::cuda::Control;
use crate::optim::loss_scale::LossScale;
use crate::optim::{self, At, Optimizer, clip};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

mod gpu;

pub use gpu::{GpuUpdater, Reduction, nccl, shards};

/// The optimizer on one rank, and the way of its gradients to new parameters on all ranks.
pub trait Update: Work {
    /// What backward writes, on the net's device.
    fn grads(&self) -> &Arc<Arena>;
    /// Host memory for what a step sums beside the gradient, and its elements there.
    fn tail(&self) -> (&Arc<Arena>, Range<usize>);
    /// What is reduced on its own, in this order: the buckets, and the tail.
    fn parts(&self) -> Vec<Part>;
    /// By layer: where its factors are left, if it has an exchange.
    fn leaves(&self) -> Vec<Option<Leaves>> {
        Vec::new()
    }
    /// On a GPU how gradients become sums; it is told of every bucket that backward has enqueued.
    fn reduction(&self) -> Option<Arc<dyn Reduction>> {
        None
    }
    /// On a GPU what halts a step and scales its loss.
    fn control(&self) -> Option<Arc<Control>> {
        None
    }
    /// Between steps, where the loss is scaled. Waits for the GPU.
    fn loss_scale(&self) -> Result<Option<LossScale>> {
        Ok(None)
    }
    /// For each parameter.
    fn state_tensors(&self) -> usize;
    /// A step begins.
    fn begin(&mut self, at: At) -> Result<()>;
    /// In the last step of which that is known, how long this rank's GPU stood still for its parameters, where it waits for other
    /// ranks by itself. None where the host does.
    fn stood_still(&self) -> Option<Duration> {
        None
    }
    /// All buckets are done: what is left to do where the update needs norms. Collective; gives the time waited.
    fn finish(&mut self, comm: &mut dyn Communicator) -> Result<Duration>;
    /// Whether all tensors of a checkpoint are of this net and optimizer; else what differs.
    fn fits(&self, state: &State) -> Result<()>;
    /// All parameters and all optimizer state, canonical, on rank 0; nothing on the others, which send it theirs. Between
    /// steps; collective.
    fn export(&mut self, net: &Net, comm: &mut dyn Communicator) -> Result<Vec<Tensor>>;
    /// Sets the state of all ranks from a checkpoint that `fits`, which rank 0 has. Between steps; collective.
    fn import(&mut self, found: Option<&State>, comm: &mut dyn Communicator) -> Result<()>;
}

impl Work for Box<dyn Update> {
    fn run(&mut self, part: usize, comm: &mut dyn Communicator) -> Result<Waited> {
        (**self).run(part, comm)
    }
}

/// Where the net is on the CPU: the optimizer and this rank's share of its state.
pub struct Updater {
    table: ParamTable,
    shards: Vec<Shard>,
    exchanges: Vec<Exchange>,
    weights: Arc<Weights>,
    grads: Arc<Arena>,
    rule: Box<dyn Optimizer>,
    /// For each name of `Optimizer::state` this rank's values, shard behind shard.
    state: Vec<Arena>,
    clip_value: Option<f32>,
    clip_norm: Option<f32>,
    /// Where the update needs them, with squares by tensor: of the gradients and of the parameters.
    norms: Option<(Norms, [Vec<f64>; 2])>,
    /// Of the step under way.
    at: At,
    /// Learning rates by tensor.
    rates: Vec<f32>,
}

/// This rank's share of a bucket.
struct Shard {
    /// Elements of the arenas.
    bucket: Range<usize>,
    mine: Range<usize>,
    /// Where the state of `mine` begins.
    state: usize,
    /// Its gradient is made from factors.
    exchange: Option<Exchanged>,
}

/// How a bucket whose state every host holds is worked off and saved.
struct Exchanged {
    /// Its number among the exchanges.
    number: usize,
    /// The ranks of rank 0's host, and the elements of which each holds the state.
    savers: Vec<(usize, Range<usize>)>,
}

/// What is reduced on its own.
pub struct Part {
    /// Elements of the arenas.
    pub elements: Range<usize>,
    pub content: Content,
}

/// What a part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Gradients,
    /// The ranks exchange factors; there is no gradient to be added up.
    Factors,
    Tail,
}

impl Updater {
    /// For the parameters in `weights`; those of `exchanges` are made from factors. Makes the arena of the gradients.
    /// Collective.
    pub fn new(
        config: &raw::Optimizer,
        table: &ParamTable,
        bucket_bytes: usize,
        weights: Arc<Weights>,
        exchanges: Vec<Exchange>,
        comm: &mut dyn Communicator,
    ) -> Result<Updater> {
        let grads = Arc::new(comm.allocate(table.len_with_tail() * size_of::<f32>())?);
        let rule = optim::new(config);
        let exchange_of = |node: usize| exchanges.iter().position(|exchange| exchange.node == node);
        let buckets = table.buckets(bucket_bytes, |node| exchange_of(node).is_some());
        let (mut shards, mut held, hosts) = (Vec::with_capacity(buckets.len()), 0, comm.hosts());
        for bucket in &buckets {
            let first = table.params.iter().find(|param| param.range.start == bucket.start);
            let exchange = first.and_then(|param| exchange_of(param.node));
            let of = |rank: usize| match exchange {
                Some(exchange) => exchanges[exchange].elements(&hosts, rank, bucket),
                None => shift(chunk(bucket.len(), comm.size(), rank), bucket.start),
            };
            let (mine, state) = (of(comm.rank()), held);
            held += mine.len();
            let savers = || hosts.members(hosts.of(0)).iter().map(|&rank| (rank, of(rank))).collect();
            let exchange = exchange.map(|number| Exchanged { number, savers: savers() });
            shards.push(Shard { bucket: bucket.clone(), mine, state, exchange });
        }
        let arena = |_| Arena::host(held * size_of::<f32>()).map_err(|e| e.context("optimizer state"));
        let state = rule.state().iter().map(arena).collect::<Result<_>>()?;
        let raw::OptimizerShared { clip_value, clip_norm, .. } = config.shared;
        let tensors = table.params.len();
        let norms = needs_norms(config)
            .then(|| (Norms::new(table, &buckets, comm.size()), [vec![0.0; tensors], vec![0.0; tensors]]));
        Ok(Updater {
            table: table.clone(),
            shards,
            exchanges,
            weights,
            grads,
            rule,
            state,
            clip_value,
            clip_norm,
            norms,
            at: At { lr: 0.0, step: 0 },
            rates: vec![0.0; tensors],
        })
    }

    /// Multiplies the trainable gradients so that their common norm is within its bound.
    fn clip_by_norm(&mut self, comm: &mut dyn Communicator) -> Result<Duration> {
        let (Some(limit), Some((norms, [squares, _]))) = (self.clip_norm, &mut self.norms) else {
            return Ok(Duration::ZERO);
        };
        // SAFETY: the buckets are reduced, and this rank's parts are its own.
        let waited = unsafe { norms.measure(&self.grads, squares, comm) }?;
        let factor = clip::norm_factor(squares.iter().sum(), limit);
        for part in norms.of(comm.rank()) {
            // SAFETY: as above.
            clip::scale(unsafe { self.grads.slice_mut(bytes(&part.range)) }.into_f32(), factor);
        }
        Ok(waited)
    }

    /// Sets the learning rate of every tensor where the rule makes it from norms.
    fn set_rates(&mut self, comm: &mut dyn Communicator) -> Result<Duration> {
        let Some((norms, [gradients, weights])) = self.norms.as_mut().filter(|_| self.rule.needs_norms()) else {
            return Ok(Duration::ZERO);
        };
        for part in norms.of(comm.rank()) {
            // SAFETY: the buckets are reduced, and this rank's parts are its own.
            clip_values(self.clip_value, unsafe { self.grads.slice_mut(bytes(&part.range)) }.into_f32());
        }
        // SAFETY: as above, and nobody changes parameters before all ranks have measured them.
        let waited =
            unsafe { norms.measure(&self.grads, gradients, comm)? + norms.measure(&self.weights.f32, weights, comm)? };
        for (tensor, rate) in self.rates.iter_mut().enumerate() {
            let norms = optim::Norms { weight: weights[tensor].sqrt(), gradient: gradients[tensor].sqrt() };
            *rate = self.rule.rate(self.at.lr, norms);
        }
        Ok(waited)
    }

    /// Updates the parameters at `elements`, all of them in this shard, from the sums of their gradients.
    fn update(&self, shard: &Shard, elements: Range<usize>, grads: &mut [f32], params: &mut [f32]) {
        let first = self.table.params.partition_point(|param| param.range.end <= elements.start);
        for (tensor, param) in self.table.params.iter().enumerate().skip(first) {
            if param.range.start >= elements.end {
                break;
            }
            let part = intersection(&param.range, &elements);
            let inside = part.start - elements.start..part.end - elements.start;
            let (grads, params) = (&mut grads[inside.clone()], &mut params[inside]);
            match param.spec.role {
                Role::Running { momentum } => {
                    let mix = |(value, mean): (&mut f32, &f32)| *value += momentum * (mean - *value);
                    params.iter_mut().zip(&*grads).for_each(mix);
                }
                Role::Trainable => {
                    clip_values(self.clip_value, grads);
                    let at = At { lr: self.rates[tensor], ..self.at };
                    let start = shard.state + part.start - shard.mine.start;
                    self.apply(at, params, grads, start..start + part.len());
                }
            }
        }
        // SAFETY: every element is updated once a step, by one thread of one rank.
        unsafe { self.weights.round(elements.start, params) };
    }

    /// Rounds to bf16 what of a bucket has come from elsewhere, for all who share these parameters.
    fn round_received(&self, shard: &Shard, comm: &dyn Communicator) -> Result<()> {
        let mut rounded = Ok(());
        comm.received(shard.bucket.len(), &mut |received| {
            // SAFETY: nobody else writes it, and no layer reads it before the step is over on all ranks of the host.
            let result = unsafe { self.weights.round_all(shift(received, shard.bucket.start)) };
            rounded = std::mem::replace(&mut rounded, Ok(())).and(result);
        });
        rounded
    }

    /// Makes a layer's gradient from all ranks' factors, and updates what of it this rank has to for its host.
    fn exchange(&mut self, exchange: usize, shard: usize, comm: &mut dyn Communicator) -> Result<Duration> {
        let mut exchanges = std::mem::take(&mut self.exchanges);
        let shard = &self.shards[shard];
        let waited = exchanges[exchange].run(comm, &|elements, sums| {
            // SAFETY: these parameters are this rank's to update, each once a step.
            let params = unsafe { self.weights.f32.slice_mut(bytes(&elements)) };
            self.update(shard, elements, sums, params.into_f32());
        });
        self.exchanges = exchanges;
        waited
    }

    /// The rule itself; `state` are elements of the state's arenas.
    fn apply(&self, at: At, params: &mut [f32], grads: &[f32], state: Range<usize>) {
        // SAFETY: every element is updated once a step, by one thread, and every state tensor has an arena of its own.
        let of = |arena: &Arena| unsafe { arena.slice_mut(bytes(&state)) }.into_f32();
        match &self.state[..] {
            [] => self.rule.update(at, params, grads, &mut []),
            [a] => self.rule.update(at, params, grads, &mut [of(a)]),
            [a, b] => self.rule.update(at, params, grads, &mut [of(a), of(b)]),
            more => unreachable!("an optimizer with {} state tensors", more.len()),
        }
    }
}

impl Shard {
    /// Elements of the state's arenas.
    fn held(&self) -> Range<usize> {
        self.state..self.state + self.mine.len()
    }
}

impl Work for Updater {
    fn run(&mut self, part: usize, comm: &mut dyn Communicator) -> Result<Waited> {
        self.reduce_and_update(part, comm).map(Waited::for_peers)
    }
}

impl Updater {
    /// Gives the time waited.
    fn reduce_and_update(&mut self, part: usize, comm: &mut dyn Communicator) -> Result<Duration> {
        let of = |arena: &Arena, elements| {
            // SAFETY: this rank has written these gradients, and leaves them and their parameters alone until this is done.
            unsafe { arena.slice_mut(bytes(elements)) }
        };
        let Some(shard) = self.shards.get(part) else {
            return comm.all_reduce(of(&self.grads, &self.table.tail));
        };
        if let Some(Exchanged { number, .. }) = shard.exchange {
            return self.exchange(number, part, comm);
        }
        let grads = of(&self.grads, &shard.bucket);
        if self.norms.is_some() {
            return comm.reduce_scatter(grads);
        }
        let params = of(&self.weights.f32, &shard.bucket);
        let waited = comm.reduce_update(grads, params, &|range, grads, params| {
            self.update(shard, shift(range, shard.bucket.start), grads, params);
        })?;
        self.round_received(shard, comm)?;
        Ok(waited)
    }
}

impl Update for Updater {
    fn state_tensors(&self) -> usize {
        self.state.len()
    }

    fn grads(&self) -> &Arc<Arena> {
        &self.grads
    }

    fn tail(&self) -> (&Arc<Arena>, Range<usize>) {
        (&self.grads, self.table.tail.clone())
    }

    fn parts(&self) -> Vec<Part> {
        let content = |shard: &Shard| if shard.exchange.is_some() { Content::Factors } else { Content::Gradients };
        let of = |shard: &Shard| Part { elements: shard.bucket.clone(), content: content(shard) };
        let tail = Part { elements: self.table.tail.clone(), content: Content::Tail };
        self.shards.iter().map(of).chain([tail]).collect()
    }

    fn leaves(&self) -> Vec<Option<Leaves>> {
        let nodes = self.table.params.iter().map(|param| param.node + 1).max().unwrap_or(0);
        let mut leaves = vec![None; nodes];
        self.exchanges.iter().for_each(|exchange| leaves[exchange.node] = Some(exchange.leaves()));
        leaves
    }

    fn begin(&mut self, at: At) -> Result<()> {
        self.at = at;
        self.rates.fill(at.lr);
        Ok(())
    }

    fn finish(&mut self, comm: &mut dyn Communicator) -> Result<Duration> {
        if self.norms.is_none() {
            return Ok(Duration::ZERO);
        }
        let waited = self.clip_by_norm(comm)? + self.set_rates(comm)?;
        let waited = self.shards.iter().try_fold(waited, |waited, shard| {
            // SAFETY: between the buckets and the next step this rank's share of all memory is its own.
            let [grads, params] =
                [&self.grads, &self.weights.f32].map(|arena| unsafe { arena.slice_mut(bytes(&shard.mine)) });
            self.update(shard, shard.mine.clone(), grads.into_f32(), params.into_f32());
            // SAFETY: as above; the others' share is theirs to send.
            let gathered = comm.all_gather(unsafe { self.weights.f32.slice_mut(bytes(&shard.bucket)) })?;
            self.round_received(shard, comm)?;
            Ok(waited + gathered)
        })?;
        // Until the others of this host have rounded what they received for all.
        Ok(waited + comm.barrier()?)
    }

    fn fits(&self, state: &State) -> Result<()> {
        fits(&self.table, self.rule.state(), state)
    }

    fn export(&mut self, net: &Net, comm: &mut dyn Communicator) -> Result<Vec<Tensor>> {
        let mut tensors = if comm.rank() == 0 { export_params(net)? } else { Vec::new() };
        for (name, state) in self.rule.state().iter().zip(&self.state) {
            for shard in &self.shards {
                // SAFETY: between steps the gradients' arena is idle, and nobody else uses the state.
                unsafe {
                    let held = state.slice(bytes(&shard.held()));
                    self.grads.slice_mut(bytes(&shard.mine)).f32().copy_from_slice(held.f32());
                    match &shard.exchange {
                        None => drop(comm.all_gather(self.grads.slice_mut(bytes(&shard.bucket)))?),
                        // Rank 0 lacks what the others of its host hold.
                        Some(exchanged) => exchanged.savers.iter().skip(1).try_for_each(|(saver, elements)| {
                            comm.broadcast(self.grads.slice_mut(bytes(elements)), *saver).map(drop)
                        })?,
                    }
                }
            }
            for param in trainable(&self.table).take_while(|_| comm.rank() == 0) {
                // SAFETY: as above; the others are done with this rank's arena.
                let values = unsafe { self.grads.slice(bytes(&param.range)) }.f32();
                tensors.push(canonical(state_name(name, &param.name), param, values));
            }
        }
        Ok(tensors)
    }

    fn import(&mut self, found: Option<&State>, comm: &mut dyn Communicator) -> Result<()> {
        for (name, state) in self.rule.state().iter().zip(&self.state) {
            // SAFETY: between steps the gradients' arena is idle, and nobody else uses the state.
            let mut whole = unsafe { self.grads.slice_mut(bytes(&(0..self.table.len()))) };
            whole.f32().fill(0.0);
            if let Some(found) = found {
                for param in trainable(&self.table) {
                    let tensor = found.tensor(&state_name(name, &param.name), &param.spec.shape)?;
                    param.spec.to_arena(&tensor.values, &mut whole.f32()[param.range.clone()]);
                }
            }
            comm.broadcast(whole.reborrow(), 0)?;
            for shard in &self.shards {
                // SAFETY: as above.
                let mut held = unsafe { state.slice_mut(bytes(&shard.held())) };
                held.f32().copy_from_slice(&whole.f32()[shard.mine.clone()]);
            }
        }
        Ok(())
    }
}

/// Whether all tensors of a checkpoint are of this net, and of an optimizer with this state; else what differs.
fn fits(table: &ParamTable, names: &[&str], state: &State) -> Result<()> {
    for param in &table.params {
        state.tensor(&param.name, &param.spec.shape)?;
    }
    for name in names {
        for param in trainable(table) {
            state.tensor(&state_name(name, &param.name), &param.spec.shape)?;
        }
    }
    Ok(())
}

fn trainable(table: &ParamTable) -> impl Iterator<Item = &Param> {
    table.params.iter().filter(|param| param.spec.role == Role::Trainable)
}

/// Whether an update waits for norms of whole gradients.
pub fn needs_norms(config: &raw::Optimizer) -> bool {
    config.shared.clip_norm.is_some() || optim::new(config).needs_norms()
}

/// All parameters in canonical layout.
pub fn export_params(net: &Net) -> Result<Vec<Tensor>> {
    let params = net.params()?;
    let export = |param: &Param| canonical(param.name.clone(), param, &params[param.range.clone()]);
    Ok(net.table().params.iter().map(export).collect())
}

/// Sets all parameters from a checkpoint; fails, naming the tensor, where it was made by another net.
pub fn import_params(net: &mut Net, state: &State) -> Result<()> {
    net.edit_params(|table, params| {
        for param in &table.params {
            let tensor = state.tensor(&param.name, &param.spec.shape)?;
            param.spec.to_arena(&tensor.values, &mut params[param.range.clone()]);
        }
        Ok(())
    })?
}

fn canonical(name: String, param: &Param, values: &[f32]) -> Tensor {
    let mut canonical = vec![0.0; param.spec.len()];
    param.spec.to_canonical(values, &mut canonical);
    Tensor { name, shape: param.spec.shape.clone(), values: canonical }
}

fn clip_values(limit: Option<f32>, grads: &mut [f32]) {
    if let Some(limit) = limit {
        clip::clip_value(grads, limit);
    }
}

pub fn bytes(elements: &Range<usize>) -> Range<usize> {
    elements.start * size_of::<f32>()..elements.end * size_of::<f32>()
}

#[cfg(test)]
mod tests;
