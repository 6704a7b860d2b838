//! What stands for `mpi` in a build without that feature.

use super::Communicator;
use super::ring::Mesh;
use crate::config::raw::ReduceDtype;
use crate::error::{Error, Result};
use crate::launch::watch::Health;
use std::sync::Arc;

pub fn is_running() -> bool {
    false
}

pub fn library() -> Option<String> {
    None
}

pub fn mesh(_: usize, _: &[usize], _: Arc<Health>) -> Result<Box<dyn Mesh>> {
    Err(not_built_in())
}

pub fn native(_: usize, _: usize, _: ReduceDtype, _: Arc<Health>) -> Result<Box<dyn Communicator>> {
    Err(not_built_in())
}

fn not_built_in() -> Error {
    Error::usage(
        "transport = \"mpi\", but this trainer was built without MPI; build it with `cargo build --release --features mpi`, \
         which needs the cluster's mpicc and libclang, or leave transport out: mpirun and srun can start this one too",
    )
}
