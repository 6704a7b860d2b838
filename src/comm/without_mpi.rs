//! What stands for `mpi` in a build without that feature.

use super::Communicator;
use crate::config::raw::Algorithm;
use crate::error::{Error, Result};
use crate::launch::watch::Health;
use std::sync::Arc;

pub fn is_running() -> bool {
    false
}

pub fn library() -> Option<String> {
    None
}

pub fn connect(_: Algorithm, _: usize, _: usize, _: Arc<Health>) -> Result<Box<dyn Communicator>> {
    Err(Error::usage(
        "transport = \"mpi\", but this trainer was built without MPI; build it with `cargo build --release --features mpi` \
         (which needs the cluster's mpicc and libclang), or leave transport out: mpirun and srun can start this one too",
    ))
}
