//! Collectives over MPI (`--features mpi`), by one of two algorithms.
//!
//! `ring` sends messages under the ring schedule, so its sums have the order of all transports and their bits. `native` calls
//! MPI's own collectives, which know the cluster's network, and may use it to add; the order of their sums is MPI's.

mod messages;
mod native;

use super::Communicator;
use super::ring::{Operation, Ring};
use crate::config::raw::Algorithm;
use crate::device::{Arena, SliceMut};
use crate::error::{Error, Result};
use crate::launch::mpi;
use crate::launch::watch::Health;
use messages::Messages;
use native::Native;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use mpi::is_running;

/// The MPI that this binary is linked with.
pub fn library() -> Option<String> {
    Some(mpi::library())
}

/// The communicator of all ranks of the world, which MPI has started. Collective.
pub fn connect(algorithm: Algorithm, rank: usize, size: usize, health: Arc<Health>) -> Result<Box<dyn Communicator>> {
    if !is_running() {
        return Err(Error::usage(
            "transport = \"mpi\", but these ranks were not started through MPI; start them with `mpirun -np N trainer ...` or \
             `srun --mpi=pmix trainer ...`, or leave transport out",
        ));
    }
    Ok(match algorithm {
        Algorithm::Ring => Box::new(Mpi { messages: Messages::new(rank, size, health)?, ring: Ring::new(size) }),
        Algorithm::Native => Box::new(Native::new(rank, size, health)?),
    })
}

/// The ring schedule over messages.
struct Mpi {
    messages: Messages,
    ring: Ring,
}

impl Mpi {
    fn run(&mut self, operation: Operation, mut data: SliceMut<'_>) -> Result<Duration> {
        self.ring.run(&mut self.messages, operation, data.f32())
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.messages.rank
    }
    fn size(&self) -> usize {
        self.messages.size
    }
    fn transport(&self) -> &'static str {
        "mpi"
    }
    fn allocate(&mut self, bytes: usize) -> Result<Arena> {
        Arena::host(bytes)
    }
    fn allocate_replicated(&mut self, bytes: usize) -> Result<Arena> {
        Arena::host(bytes)
    }
    fn all_reduce(&mut self, data: SliceMut<'_>) -> Result<Duration> {
        self.run(Operation::AllReduce, data)
    }
    fn reduce_scatter(&mut self, data: SliceMut<'_>) -> Result<Duration> {
        self.run(Operation::ReduceScatter, data)
    }
    fn all_gather(&mut self, data: SliceMut<'_>) -> Result<Duration> {
        self.run(Operation::AllGather, data)
    }
    fn broadcast(&mut self, data: SliceMut<'_>, root: usize) -> Result<Duration> {
        self.run(Operation::Broadcast { root }, data)
    }
    fn barrier(&mut self) -> Result<Duration> {
        self.run(Operation::Barrier, SliceMut::empty())
    }
}

/// What a wait does between two looks at MPI, which has nothing to sleep on: at first nothing much, since most answers
/// come at once; then it lets others have the core, and at last it sleeps.
struct Patience(Instant);

impl Patience {
    const SPIN: Duration = Duration::from_micros(20);
    const YIELD: Duration = Duration::from_millis(1);
    const SLEEP: Duration = Duration::from_micros(50);

    fn new() -> Patience {
        Patience(Instant::now())
    }

    fn rest(&self) {
        let waited = self.0.elapsed();
        if waited < Self::SPIN {
            std::hint::spin_loop();
        } else if waited < Self::YIELD {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Self::SLEEP);
        }
    }
}
