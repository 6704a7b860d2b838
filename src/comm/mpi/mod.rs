//! MPI (`--features mpi`), by one of two algorithms.
//!
//! As `ring` it connects hosts, or single ranks, with messages under the ring schedule, so the sums have the order of all
//! transports and their bits. As `native` its own collectives do everything: they know the cluster's network, and may use
//! it to add; the order of their sums is MPI's, and gradients may be summed in bf16 (`rounded`).

mod messages;
mod native;
mod rounded;

use super::Communicator;
use super::ring::Mesh;
use crate::config::raw::ReduceDtype;
use crate::error::{Error, Result};
use crate::launch::mpi;
use crate::launch::watch::Health;
use messages::Messages;
use native::Native;
use std::sync::Arc;

pub use mpi::is_running;

/// The MPI that this binary is linked with.
pub fn library() -> Option<String> {
    Some(mpi::library())
}

/// Messages between this rank and its `peers`, of `size` ranks that MPI has started. Collective over all of these.
pub fn mesh(size: usize, peers: &[usize], health: Arc<Health>) -> Result<Box<dyn Mesh>> {
    must_run()?;
    Ok(Box::new(Messages::new(size, peers, health)?))
}

/// MPI's own collectives over all ranks that it has started, with sums of gradients in `dtype`. Collective.
pub fn native(rank: usize, size: usize, dtype: ReduceDtype, health: Arc<Health>) -> Result<Box<dyn Communicator>> {
    must_run()?;
    Ok(Box::new(Native::new(rank, size, dtype, health)?))
}

fn must_run() -> Result<()> {
    if is_running() {
        return Ok(());
    }
    Err(Error::usage(
        "transport = \"mpi\", but these ranks were not started through MPI; start them with `mpirun -np N trainer ...` or \
         `srun --mpi=pmix trainer ...`, or leave transport out",
    ))
}
