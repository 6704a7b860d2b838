//! Collectives. `Communicator` is what training sees; a transport is one file behind it.
//!
//! Sums run in one fixed order, the pairwise tree over ranks (`tree`), whatever the transport, the bucket, the chunk or
//! the timing. So every transport gives equal bits, every run gives equal bits, and all ranks hold equal bits.

pub mod bench;
pub mod bucket;
mod cluster;
mod guard;
pub mod hosts;
#[cfg_attr(not(feature = "mpi"), path = "without_mpi.rs")]
mod mpi;
pub mod nccl;
mod patience;
mod ring;
mod shm;
mod solo;
mod sum;
mod tcp;

use crate::config::raw::{Algorithm, Parallel, ReduceDtype, TransportChoice};
use crate::device::{Arena, SliceMut};
use crate::error::{Error, Result};
use crate::launch::rendezvous::Control;
use crate::launch::watch::Health;
use hosts::Hosts;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// The communicator that `parallel` asks for, among the ranks of `control`; beside NCCL, that of `auto`. Collective. `health`
/// ends its waits.
pub fn connect(parallel: &Parallel, mut control: Control, health: Arc<Health>) -> Result<Box<dyn Communicator>> {
    let size = control.size();
    if parallel.algorithm == Algorithm::Native && size > 1 {
        if parallel.transport != TransportChoice::Mpi {
            return Err(Error::usage("algorithm = \"native\" is MPI's own; it goes with transport = \"mpi\""));
        }
        let native = mpi::native(control.rank(), size, parallel.reduce_dtype, health.clone())?;
        return Ok(Box::new(guard::Guarded::new(native, health)));
    }
    if parallel.reduce_dtype != ReduceDtype::F32 && parallel.transport != TransportChoice::Nccl && size > 1 {
        return Err(Error::usage(
            "reduce_dtype = \"bf16\" goes with transport = \"nccl\", or with transport = \"mpi\" and algorithm = \"native\"; \
             all else sums in f32, in one order, which gives the same bits on every layout of ranks",
        ));
    }
    let (hosts, between) = match parallel.transport {
        TransportChoice::Auto | TransportChoice::Nccl if mpi::is_running() => {
            (Hosts::new(&control.hosts()?), Between::Mpi)
        }
        TransportChoice::Auto | TransportChoice::Nccl => (Hosts::new(&control.hosts()?), Between::Tcp),
        TransportChoice::Shm => (Hosts::new(&vec![(); size]), Between::Tcp),
        TransportChoice::Tcp => (Hosts::apart(size), Between::Tcp),
        TransportChoice::Mpi => (Hosts::apart(size), Between::Mpi),
    };
    join_hosts(hosts, between, control, health)
}

/// The communicator for ranks that share hosts like this: shared memory inside a host, tcp between hosts. Collective.
pub fn connect_hosts(hosts: Hosts, control: Control, health: Arc<Health>) -> Result<Box<dyn Communicator>> {
    join_hosts(hosts, Between::Tcp, control, health)
}

/// What hosts are connected by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Between {
    Tcp,
    Mpi,
}

fn join_hosts(
    hosts: Hosts,
    between: Between,
    mut control: Control,
    health: Arc<Health>,
) -> Result<Box<dyn Communicator>> {
    if hosts.size() == 1 {
        return Ok(Box::new(solo::Solo));
    }
    let comm: Box<dyn Communicator> = if hosts.count() == 1 {
        let ranks = hosts.members(0).to_vec();
        Box::new(shm::Shm::new(control, ranks, health.clone())?)
    } else {
        let rank = control.rank();
        let members = hosts.members(hosts.of(rank)).to_vec();
        let inside = match control.star_of(&members)? {
            Some(star) => Some(shm::Shm::new(star, members, health.clone())?),
            None => None,
        };
        let peers = hosts.peers(rank);
        let (mesh, names): (Box<dyn ring::Mesh>, _) = match between {
            Between::Tcp => (Box::new(tcp::Sockets::connect(control, &peers, health.clone())?), ["tcp", "shm+tcp"]),
            Between::Mpi => (mpi::mesh(hosts.size(), &peers, health.clone())?, ["mpi", "shm+mpi"]),
        };
        let transport = names[usize::from(hosts.count() < hosts.size())];
        Box::new(cluster::Cluster::new(rank, hosts, mesh, inside, transport))
    };
    Ok(Box::new(guard::Guarded::new(comm, health)))
}

/// The MPI that this binary is linked with, such as `Open MPI v4.1.4`.
pub fn mpi_library() -> Option<String> {
    mpi::library()
}

/// N ranks that call the same operations, with the same lengths, in the same order. All data is f32; so are all sums, except
/// those of `reduce_scatter` and `reduce_update` where `[parallel] reduce_dtype` says otherwise.
///
/// Every operation returns the time it spent waiting for other ranks to arrive, as opposed to moving and adding bytes.
/// A lost or stalled peer ends the wait with an error of kind `PeerLost`; nothing waits for ever. After an error there is
/// no going on: of a communicator that `connect` gave, every later operation returns that error at once.
pub trait Communicator: Send {
    fn rank(&self) -> usize;
    fn size(&self) -> usize;
    /// Which ranks share memory.
    fn hosts(&self) -> Hosts;
    /// `"shm"`, `"tcp"`, `"shm+tcp"`, and with mpi for tcp.
    fn transport(&self) -> &'static str;

    /// Zeroed memory in which this transport reduces without a copy. Collective: all ranks ask for the same size. Other
    /// memory works everywhere too, through staging.
    fn allocate(&mut self, bytes: usize) -> Result<Arena>;

    /// Zeroed memory for what is the same on all ranks, such as weights. Ranks of one host get one copy, mapped by all: of
    /// that, a rank writes nothing but its chunk inside `reduce_update` and `all_gather`, and what it broadcasts.
    /// Collective; of the operations, only these three may be given such memory.
    fn allocate_replicated(&mut self, bytes: usize) -> Result<Arena>;

    /// Calls `each` with the ranges of a buffer of `len` values that in `reduce_update` and `all_gather` of replicated memory
    /// come to this rank from elsewhere, for all ranks that share its copy.
    fn received(&self, len: usize, each: &mut dyn FnMut(Range<usize>));

    /// Every rank ends with the sum over ranks.
    fn all_reduce(&mut self, data: SliceMut<'_>) -> Result<Duration>;

    /// Rank r ends with the sum in `chunk(len, size, r)`; the rest of `data` is unspecified.
    fn reduce_scatter(&mut self, data: SliceMut<'_>) -> Result<Duration>;

    /// Rank r gives `chunk(len, size, r)`; every rank ends with all of them.
    fn all_gather(&mut self, data: SliceMut<'_>) -> Result<Duration>;

    /// `reduce_scatter` of `terms`, `update`, `all_gather` of `values`, in one pass where the transport can: rank r makes
    /// new values of chunk r from the sums of chunk r, and every rank ends with all new values. `terms` are unspecified
    /// afterwards. `values` are of the same length and, on all ranks, from `allocate_replicated` or on none.
    fn reduce_update(&mut self, terms: SliceMut<'_>, values: SliceMut<'_>, update: &Update<'_>) -> Result<Duration> {
        reduce_then_update(self, terms, values, update)
    }

    /// Every rank ends with what `root` has.
    fn broadcast(&mut self, data: SliceMut<'_>, root: usize) -> Result<Duration>;

    /// Returns when all ranks have called it.
    fn barrier(&mut self) -> Result<Duration>;

    /// Where this transport can reach the data of all ranks, calls `work` on each with the addresses of all and its chunk,
    /// between two synchronisation points: for the plain loops with which `bench-comm` compares. False if it cannot.
    fn expose(&mut self, _data: SliceMut<'_>, _work: &mut dyn FnMut(&[usize], Range<usize>)) -> Result<bool> {
        Ok(false)
    }
}

/// `update(range, sums, values)`: changes `values`, which are those at `range` of the operation's data, by means of `sums`,
/// the sums over ranks there; these may be overwritten. Called for every part of a rank's chunk once, in no order, perhaps by
/// several threads at a time. Parts begin at multiples of a cache line.
pub type Update<'a> = dyn Fn(Range<usize>, &mut [f32], &mut [f32]) + Sync + 'a;

/// What `reduce_update` means.
fn reduce_then_update<C: Communicator + ?Sized>(
    comm: &mut C,
    mut terms: SliceMut<'_>,
    mut values: SliceMut<'_>,
    update: &Update<'_>,
) -> Result<Duration> {
    assert_eq!(terms.bytes(), values.bytes(), "a value for every sum");
    let mine = chunk(values.f32().len(), comm.size(), comm.rank());
    let waited = comm.reduce_scatter(terms.reborrow())?;
    update(mine.clone(), &mut terms.f32()[mine.clone()], &mut values.f32()[mine]);
    Ok(waited + comm.all_gather(values)?)
}

/// What ranks do together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Operation {
    AllReduce,
    ReduceScatter,
    AllGather,
    ReduceUpdate,
    Broadcast,
    Barrier,
}

/// How messages speak of an operation.
#[derive(Clone, Copy)]
struct Words {
    name: &'static str,
    /// Reads behind "rank 0 is".
    waiting: &'static str,
}

impl Operation {
    /// Put together when the program is compiled, for a step allocates nothing.
    fn words(self) -> Words {
        macro_rules! words {
            ($name:literal) => {
                Words { name: $name, waiting: concat!("waiting for the other ranks in ", $name) }
            };
        }
        match self {
            Operation::AllReduce => words!("all-reduce"),
            Operation::ReduceScatter => words!("reduce-scatter"),
            Operation::AllGather => words!("all-gather"),
            Operation::ReduceUpdate => words!("reduce-and-update"),
            Operation::Broadcast => words!("broadcast"),
            Operation::Barrier => words!("barrier"),
        }
    }

    fn from_number(number: u32) -> Option<Operation> {
        use Operation::*;
        let all = [AllReduce, ReduceScatter, AllGather, ReduceUpdate, Broadcast, Barrier];
        all.into_iter().find(|operation| *operation as u32 == number)
    }
}

/// Elements of a buffer of `len` that belong to `rank` in reduce_scatter and all_gather. Chunks start at multiples of 16
/// elements (a cache line), so no two ranks write one line.
pub fn chunk(len: usize, size: usize, rank: usize) -> Range<usize> {
    const LINE: usize = 16;
    let lines = len.div_ceil(LINE);
    let start = |rank: usize| (lines * rank / size * LINE).min(len);
    start(rank)..start(rank + 1)
}

/// Where the pairwise tree over `n` values splits: the first `split(n)` are summed, then the rest, then the two sums are
/// added. For n = 2^k * m it halves k times into blocks of m, so a rank that sums its block of micro-batches and then
/// joins the tree over ranks gives the bits of one rank that sums all of them.
pub fn split(n: usize) -> usize {
    n.div_ceil(2)
}
