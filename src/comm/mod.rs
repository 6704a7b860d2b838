//! Collectives. `Communicator` is what training sees; a transport is one file behind it.
//!
//! Sums run in one fixed order, the pairwise tree over ranks (`tree`), whatever the transport, the bucket, the chunk or
//! the timing. So every transport gives equal bits, every run gives equal bits, and all ranks hold equal bits.

pub mod bench;
pub mod bucket;
mod guard;
#[cfg_attr(not(feature = "mpi"), path = "without_mpi.rs")]
mod mpi;
mod ring;
mod shm;
mod solo;
mod sum;
mod tcp;

use crate::config::raw::{Parallel, TransportChoice};
use crate::device::{Arena, SliceMut};
use crate::error::Result;
use crate::launch::rendezvous::Control;
use crate::launch::watch::Health;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// The communicator that `parallel` asks for, among the ranks of `control`. Collective. `health` ends its waits.
pub fn connect(parallel: &Parallel, mut control: Control, health: Arc<Health>) -> Result<Box<dyn Communicator>> {
    let (rank, size) = (control.rank(), control.size());
    if size == 1 {
        return Ok(Box::new(solo::Solo));
    }
    let transport = match parallel.transport {
        TransportChoice::Auto if control.one_host()? => TransportChoice::Shm,
        TransportChoice::Auto if mpi::is_running() => TransportChoice::Mpi,
        choice => choice,
    };
    let comm: Box<dyn Communicator> = match transport {
        TransportChoice::Shm => Box::new(shm::Shm::new(control, health.clone())?),
        TransportChoice::Tcp | TransportChoice::Auto => Box::new(tcp::Tcp::new(control, health.clone())?),
        TransportChoice::Mpi => mpi::connect(parallel.algorithm, rank, size, health.clone())?,
    };
    Ok(Box::new(guard::Guarded::new(comm, health)))
}

/// The MPI that this binary is linked with, such as `Open MPI v4.1.4`.
pub fn mpi_library() -> Option<String> {
    mpi::library()
}

/// N ranks that call the same operations, with the same lengths, in the same order. All data is f32.
///
/// Every operation returns the time it spent waiting for other ranks to arrive, as opposed to moving and adding bytes.
/// A lost or stalled peer ends the wait with an error of kind `PeerLost`; nothing waits for ever. After an error there is
/// no going on: of a communicator that `connect` gave, every later operation returns that error at once.
pub trait Communicator: Send {
    fn rank(&self) -> usize;
    fn size(&self) -> usize;
    /// `"shm"`, `"tcp"`, `"mpi"`.
    fn transport(&self) -> &'static str;

    /// Zeroed memory in which this transport reduces without a copy. Collective: all ranks ask for the same size. Other
    /// memory works everywhere too, through staging.
    fn allocate(&mut self, bytes: usize) -> Result<Arena>;

    /// Zeroed memory for what is the same on all ranks, such as weights. Ranks of one host get one copy, mapped by all: of
    /// that, a rank writes nothing but its chunk inside `reduce_update` and `all_gather`, and what it broadcasts.
    /// Collective; of the operations, only these three may be given such memory.
    fn allocate_replicated(&mut self, bytes: usize) -> Result<Arena>;

    /// Whether that is one copy for all ranks: what each writes of it in `reduce_update`, all have when it returns.
    fn replicas_are_shared(&self) -> bool {
        false
    }

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

/// How messages speak of an operation.
#[derive(Clone, Copy)]
struct Words {
    name: &'static str,
    /// Reads behind "rank 0 is".
    waiting: &'static str,
}

/// Puts the words together when the program is compiled, for a step allocates nothing.
macro_rules! words {
    ($name:literal) => {
        $crate::comm::Words { name: $name, waiting: concat!("waiting for the other ranks in ", $name) }
    };
}
use words;

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
