//! NCCL between the ranks' GPUs: whether it sums their gradients where they lie, so that nothing of them goes through the
//! host. `sums` does that, `sharded` the update shared among the ranks too.

mod sharded;
mod sums;

pub use sharded::Sharded;
pub use sums::{NcclSums, bytes_to_sum_in};

use crate::comm::Communicator;
use crate::comm::nccl::{self, Nccl};
use crate::config::raw::{Parallel, TransportChoice};
use crate::device::cuda::{Gpu, libraries};
use crate::error::{Context, Error, Kind, Result};
use crate::launch::rendezvous::host;
use crate::train::Rank;
use crate::train::agreement::{gather_bytes, of_all};
use serde::{Deserialize, Serialize};

/// NCCL among the ranks, if it is to sum their gradients: because `[parallel] transport` says so, or because each rank has a GPU
/// of its own and all have the same NCCL. Collective; all ranks come to the same answer.
pub fn connect(parallel: &Parallel, rank: &Rank, comm: &mut dyn Communicator) -> Result<Option<Nccl>> {
    let by_itself = match parallel.transport {
        _ if comm.size() == 1 => return Ok(None),
        TransportChoice::Nccl => false,
        TransportChoice::Auto if !parallel.allow_shared_gpu => true,
        _ => return Ok(None),
    };
    let found = found_by_all(comm)?;
    let shared = parts_of_one_gpu(&found);
    match obstacle(&found).or_else(|| shared.clone().filter(|_| by_itself)) {
        None => {}
        Some(why) if by_itself => {
            if rank.world.rank == 0 {
                tracing::warn!("gradients go through host memory, since {why}");
            }
            return Ok(None);
        }
        Some(why) => return Err(of_all(Error::lacking(why), rank, comm)),
    }
    if parallel.allow_shared_gpu || shared.is_some() {
        nccl::share_gpus(comm.rank())?;
    }
    let joined = Nccl::connect(&Gpu::of_this_rank()?, comm, &rank.health);
    joined.map(Some).map_err(|error| match error.kind() {
        Kind::Device => Error::device(format!("{error}. parallel.transport = \"shm\" or \"tcp\" does without it")),
        _ => error,
    })
}

/// What a rank tells of itself.
#[derive(Serialize, Deserialize)]
struct Found {
    host: String,
    /// The place of its GPU in the machine.
    bus_id: String,
    /// The version of NCCL that it has found, or why none.
    nccl: Result<String, String>,
}

/// By rank. Collective.
fn found_by_all(comm: &mut dyn Communicator) -> Result<Vec<Found>> {
    let nccl = libraries::nccl().map(|nccl| nccl.version.to_string()).map_err(|error| error.to_string());
    let bus_id = Gpu::of_this_rank()?.device().bus_id.clone();
    let mine = Found { host: host().to_string(), bus_id, nccl };
    let all = gather_bytes(comm, &serde_json::to_vec(&mine).expect("plain data"))?;
    let all: Result<Vec<Found>, _> = all.iter().map(|bytes| serde_json::from_slice(bytes)).collect();
    all.or_kind(Kind::Internal, "which NCCL the other ranks have")
}

/// Why NCCL cannot be used: a rank has none, or another than the first.
fn obstacle(found: &[Found]) -> Option<String> {
    if let Some((rank, Found { host, nccl: Err(why), .. })) = found.iter().enumerate().find(|(_, of)| of.nccl.is_err())
    {
        let alike = found.iter().all(|other| other.nccl.as_ref() == Err(why));
        return Some(if alike { why.clone() } else { format!("rank {rank} on {host} has no NCCL: {why}") });
    }
    let (rank, other) = found.iter().enumerate().find(|(_, other)| other.nccl != found[0].nccl)?;
    let [first, version] = [&found[0], other].map(|of| of.nccl.as_deref().unwrap_or_default());
    Some(format!(
        "rank {rank} on {} has NCCL {version}, and rank 0 on {} has {first}: give all ranks one version (trainer info shows \
         where each was found)",
        other.host, found[0].host
    ))
}

/// Ranks with MIG instances of one GPU, which NCCL takes for one unless it is told otherwise.
fn parts_of_one_gpu(found: &[Found]) -> Option<String> {
    let same = |a: &Found, b: &Found| (&a.host, &a.bus_id) == (&b.host, &b.bus_id);
    let mut pairs = (0..found.len()).flat_map(|rank| (0..rank).map(move |other| (other, rank)));
    let (first, second) = pairs.find(|&(first, second)| same(&found[first], &found[second]))?;
    Some(format!(
        "ranks {first} and {second} on {} have parts of one GPU, which NCCL sums over only if transport = \"nccl\" asks for it",
        found[first].host
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_rank_that_stands_in_the_way_is_named() {
        let found = |versions: &[Result<&str, &str>]| {
            let on = |(rank, version): (usize, &Result<&str, &str>)| Found {
                host: format!("n{rank}"),
                bus_id: "0000:01:00.0".to_owned(),
                nccl: version.map(str::to_owned).map_err(str::to_owned),
            };
            versions.iter().enumerate().map(on).collect::<Vec<_>>()
        };
        let (new, old, none) = (Ok("2.29.2"), Ok("2.27.5"), Err("not found"));
        assert_eq!(obstacle(&found(&[new, new])), None);
        assert_eq!(obstacle(&found(&[none, none])).unwrap(), "not found");
        assert_eq!(obstacle(&found(&[old, new, none])).unwrap(), "rank 2 on n2 has no NCCL: not found");
        let unlike = obstacle(&found(&[new, new, old])).unwrap();
        assert!(unlike.starts_with("rank 2 on n2 has NCCL 2.27.5, and rank 0 on n0 has 2.29.2: give"), "{unlike}");

        // The same place in two machines is two GPUs.
        let mut two = found(&[new, new, new]);
        assert_eq!(parts_of_one_gpu(&two), None);
        two[2].host = "n0".to_owned();
        assert!(parts_of_one_gpu(&two).unwrap().starts_with("ranks 0 and 2 on n0 have parts of one GPU"));
    }
}
