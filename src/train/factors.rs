//! Linear layers whose ranks exchange the factors of the gradient, activations and deltas, instead of the gradient.
//!
//! Reducing P values of gradient over M hosts costs each host's link 2 (M - 1) / M * 4 P bytes; all hosts' factors cost it
//! (M - 1) / M * 4 (inputs + units) * B bytes for a global batch of B samples. In return every host makes the whole gradient
//! itself, 2 P B operations shared out over its ranks, of which it would have made 1 / M anyway. `estimate` puts both into
//! seconds.
//!
//! A step's leaves, the micro-batches of all ranks, are gathered into one buffer a host. The gradient is then made tile by tile:
//! each leaf's tile, added up in the tree in which `gradient` and the reduction would have added them, and handed to the
//! optimizer while it is in the cache. So the bits are those of the all-reduce, and no gradient is written to memory.

use crate::comm::hosts::Hosts;
use crate::comm::{Communicator, split};
use crate::config::plan::Plan;
use crate::config::raw::{FactorExchange, Parallel, ReduceDtype};
use crate::device::{self, Arena, SliceMut};
use crate::error::Result;
use crate::model::layers::{FromFactors, TILE_UNITS};
use crate::model::params::{Param, ParamTable};
use crate::model::spec::NetSpec;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Values of a cache line; each leaf begins with one that holds its number of samples.
const LINE: usize = 16;

/// What a thread is taken to reach in the products, operations a second; for the estimate alone.
const OPERATIONS: f64 = 50e9;

/// What a layer's gradient costs a step, in seconds, either way.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    pub node: usize,
    pub gradient_bytes: usize,
    pub factor_bytes: usize,
    pub gradient_s: f64,
    pub factors_s: f64,
    /// Whether factors are exchanged.
    pub chosen: bool,
}

/// For every layer that has factors, by what a host sends in a step. `whole`: the update needs whole gradients, which nobody
/// has here: for their norms, or on a GPU.
pub fn estimate(config: &Parallel, net: &NetSpec, plan: &Plan, hosts: usize, whole: bool) -> Vec<Estimate> {
    let others = (hosts - 1) as f64 / hosts as f64;
    let link = config.network_gbit_s * 1e9 / 8.0;
    // Then as many parameters go round, in f32.
    let sum_bytes = match config.reduce_dtype {
        ReduceDtype::F32 => 4,
        ReduceDtype::Bf16 => 2,
    };
    let threads = plan.threads as f64 * plan.ranks as f64 / hosts as f64;
    let layers = net.nodes.iter().enumerate().filter_map(|(node, layer)| Some((node, layer.inferred.factors?)));
    layers
        .map(|(node, factors)| {
            let values = factors.inputs * factors.units + factors.units;
            let gradient_bytes = (others * ((sum_bytes + 4) * values) as f64) as usize;
            let factor_bytes = (others * (4 * factors.values() * plan.global_batch) as f64) as usize;
            let products = others * 2.0 * (values * plan.global_batch) as f64 / (OPERATIONS * threads);
            let (gradient_s, factors_s) = (gradient_bytes as f64 / link, factor_bytes as f64 / link + products);
            let chosen = hosts > 1
                && !whole
                && match config.factor_exchange {
                    FactorExchange::Auto => factors_s < gradient_s,
                    FactorExchange::On => true,
                    FactorExchange::Off => false,
                };
            Estimate { node, gradient_bytes, factor_bytes, gradient_s, factors_s, chosen }
        })
        .collect()
}

/// One layer's exchange. The memory for the factors is shared with those that write them.
pub struct Exchange {
    pub node: usize,
    product: FromFactors,
    leaves: Leaves,
    /// By leaf: samples of this step.
    counts: Vec<usize>,
    /// By leaf, what `FromFactors::prepare` has made.
    prepared: Vec<f32>,
    /// By thread: tiles of a path through the tree.
    tiles: Vec<f32>,
    /// Tiles of such a path.
    depth: usize,
    /// Units whose gradient this rank makes for its host.
    units: Range<usize>,
    /// Elements of the arenas: the weight's and the bias's.
    weight: Range<usize>,
    bias: Range<usize>,
}

/// Where the ranks leave a layer's factors, one copy a host.
#[derive(Clone)]
pub struct Leaves {
    memory: Arc<Arena>,
    rank: usize,
    /// Micro-batches of a rank.
    micros: usize,
    /// Values of one.
    len: usize,
}

/// Makes a tile from the samples of a leaf, how many they are and what was prepared of them.
type OfLeaf<'a> = dyn Fn(usize, &[f32], &mut [f32]) + 'a;

impl Leaves {
    /// This rank's memory for a micro-batch of `count` samples.
    pub fn next<'a>(&self, micro: usize, count: usize) -> SliceMut<'a> {
        let start = (self.rank * self.micros + micro) * self.len;
        // SAFETY: this rank's chunk, which it writes once a step, before the layer's part is started.
        let leaf = unsafe { self.memory.slice_mut(4 * start..4 * (start + self.len)) }.into_f32();
        let (line, factors) = leaf.split_at_mut(LINE);
        line[0] = count as f32;
        SliceMut::from(factors)
    }
}

impl Exchange {
    /// For layer `node`. Collective.
    pub fn new(
        node: usize,
        net: &NetSpec,
        table: &ParamTable,
        plan: &Plan,
        comm: &mut dyn Communicator,
    ) -> Result<Exchange> {
        let shape = net.nodes[node].inferred.factors.expect("only of layers with factors");
        let product = FromFactors::new(shape, plan.micro_batch);
        let (rank, size, micros) = (comm.rank(), comm.size(), plan.micros_per_rank);
        let len = LINE + (plan.micro_batch * shape.values()).next_multiple_of(LINE);
        let memory = comm.allocate_replicated(size_of::<f32>() * size * micros * len)?;
        let count = size * micros;
        let depth = levels(size) + levels(micros) + 1;
        let range = |param: Option<&Param>| param.map_or(0..0, |param| param.range.clone());
        let tensors = table.of_node(node);
        Ok(Exchange {
            node,
            leaves: Leaves { memory: Arc::new(memory), rank, micros, len },
            counts: vec![0; count],
            prepared: vec![0.0; count * product.prepared_len()],
            tiles: vec![0.0; rayon::current_num_threads() * depth * product.tile_len()],
            depth,
            units: share(&comm.hosts(), rank, shape.units),
            weight: range(tensors.first()),
            bias: range(tensors.get(1)),
            product,
        })
    }

    pub fn leaves(&self) -> Leaves {
        self.leaves.clone()
    }

    /// Elements of the arenas that `rank` updates for its host: its units' weights, and at the last rank all that is behind.
    pub fn elements(&self, hosts: &Hosts, rank: usize, bucket: &Range<usize>) -> Range<usize> {
        let shape = self.product.shape();
        let units = share(hosts, rank, shape.units);
        let at = |unit: usize| self.weight.start + unit * shape.inputs;
        let end = if units.end == shape.units { bucket.end } else { at(units.end) };
        at(units.start)..end
    }

    /// Gathers all factors and calls `update(elements, sums)` for all parts of this rank's share. Gives the time waited.
    pub fn run(
        &mut self,
        comm: &mut dyn Communicator,
        update: &(dyn Fn(Range<usize>, &mut [f32]) + Sync),
    ) -> Result<Duration> {
        // SAFETY: this rank's factors are written; the others' are theirs until they are here.
        let waited = comm.all_gather(unsafe { self.leaves.memory.slice_mut(0..self.leaves.memory.bytes()) })?;
        // On the communication thread there is no team, and the cores are busy with backward.
        let team = rayon::current_thread_index().is_some();
        self.prepare(team);
        let worker_len = self.depth * self.product.tile_len();
        let workers = if team { self.tiles.len() / worker_len } else { 1 };
        let mut tiles = std::mem::take(&mut self.tiles);
        let this = &*self;
        let work = |(worker, tiles): (usize, &mut [f32])| {
            let blocks = this.units.clone().step_by(TILE_UNITS).skip(worker).step_by(workers);
            blocks.for_each(|start| this.block(start..(start + TILE_UNITS).min(this.units.end), tiles, update));
        };
        match workers {
            1 => work((0, &mut tiles[..worker_len])),
            _ => tiles.par_chunks_mut(worker_len).enumerate().for_each(work),
        }
        if this.units.end == this.product.shape().units {
            this.bias(&mut tiles[..worker_len], update);
        }
        self.tiles = tiles;
        Ok(waited)
    }

    fn prepare(&mut self, team: bool) {
        let Exchange { product, leaves: Leaves { memory, len, .. }, counts, prepared, .. } = self;
        // SAFETY: gathered, and written again only in the next step.
        let all = unsafe { memory.slice(0..memory.bytes()) }.f32();
        let prepare = |((leaf, prepared), count): ((&[f32], &mut [f32]), &mut usize)| {
            *count = leaf[0] as usize;
            product.prepare(*count, &leaf[LINE..], prepared);
        };
        let prepared_len = product.prepared_len();
        match team {
            true => {
                let leaves = all.par_chunks_exact(*len).zip(prepared.par_chunks_exact_mut(prepared_len));
                leaves.zip(counts).for_each(prepare);
            }
            false => all.chunks_exact(*len).zip(prepared.chunks_exact_mut(prepared_len)).zip(counts).for_each(prepare),
        }
    }

    /// All tiles of some units' weights.
    fn block(&self, units: Range<usize>, tiles: &mut [f32], update: &(dyn Fn(Range<usize>, &mut [f32]) + Sync)) {
        let (inputs, width) = (self.product.shape().inputs, self.product.tile_inputs());
        for first in (0..inputs).step_by(width) {
            self.sum(tiles, units.len() * width, &|count, prepared, tile| {
                self.product.weight(count, prepared, units.clone(), first, tile);
            });
            let columns = width.min(inputs - first);
            for (unit, sums) in units.clone().zip(tiles.chunks_exact_mut(width)) {
                let start = self.weight.start + unit * inputs + first;
                update(start..start + columns, &mut sums[..columns]);
            }
        }
    }

    /// The bias of all units: little work, done by the rank that holds it.
    fn bias(&self, tiles: &mut [f32], update: &(dyn Fn(Range<usize>, &mut [f32]) + Sync)) {
        let most = self.product.tile_len();
        for start in (0..self.bias.len()).step_by(most) {
            let units = start..(start + most).min(self.bias.len());
            self.sum(tiles, units.len(), &|count, prepared, sums| {
                self.product.bias(count, prepared, units.clone(), sums);
            });
            update(self.bias.start + start..self.bias.start + units.end, &mut tiles[..units.len()]);
        }
    }

    /// Leaves in the first tile the sum of `leaf(samples, prepared, tile)` over all leaves: over the micro-batches of a rank,
    /// and then over ranks.
    fn sum(&self, tiles: &mut [f32], len: usize, leaf: &OfLeaf<'_>) {
        let (micros, prepared_len, tile_len) =
            (self.leaves.micros, self.product.prepared_len(), self.product.tile_len());
        let micro = |number: usize, tiles: &mut [f32]| match self.counts[number] {
            0 => tiles[..len].fill(0.0),
            count => leaf(count, &self.prepared[number * prepared_len..][..prepared_len], tiles),
        };
        let of_rank = |rank: usize, tiles: &mut [f32]| tree(rank * micros, micros, tiles, (tile_len, len), &micro);
        tree(0, self.counts.len() / micros, tiles, (tile_len, len), &of_rank);
    }
}

/// The pairwise tree over `leaf(first..first + n)`, into the first of `tiles`; each level has one.
fn tree(first: usize, n: usize, tiles: &mut [f32], (tile_len, len): (usize, usize), leaf: &dyn Fn(usize, &mut [f32])) {
    if n == 1 {
        return leaf(first, tiles);
    }
    let left = split(n);
    tree(first, left, tiles, (tile_len, len), leaf);
    let (sum, rest) = tiles.split_at_mut(tile_len);
    tree(first + left, n - left, rest, (tile_len, len), leaf);
    device::add(SliceMut::from(&mut sum[..len]), (&rest[..len]).into());
}

/// Levels of the tree over n leaves, beside the first.
fn levels(n: usize) -> usize {
    n.next_power_of_two().ilog2() as usize
}

/// The units that a rank takes on for its host, in whole blocks.
fn share(hosts: &Hosts, rank: usize, units: usize) -> Range<usize> {
    let (position, ranks) = (hosts.position(rank), hosts.members(hosts.of(rank)).len());
    let blocks = units.div_ceil(TILE_UNITS);
    let start = |position: usize| (blocks * position / ranks * TILE_UNITS).min(units);
    start(position)..start(position + 1)
}

#[cfg(test)]
mod tests;
