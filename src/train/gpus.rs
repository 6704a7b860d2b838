//! Which GPU each rank computes on. Every rank tells all others which GPUs it sees; of those it takes the one of its number
//! among the ranks of its machine. That serves where all see all GPUs (`trainer -n`, mpirun), where each is shown its own
//! (Slurm's `--gpus-per-task`, CUDA_VISIBLE_DEVICES), and all between. Since every rank knows what all others take, two that
//! would share a GPU are found before either begins to work on it.

use super::Rank;
use super::agreement::{gather_bytes, together};
use crate::comm::Communicator;
use crate::config::raw::{Config, Parallel};
use crate::device::cuda::Gpu;
use crate::device::cuda::probe::{self, Device};
use crate::device::{self, Place};
use crate::error::{Context, Error, Kind, Result};
use crate::launch::rendezvous::{host, machine};
use crate::report::log::SAID_ONCE;
use serde::{Deserialize, Serialize};

/// Takes this rank's GPU, where it is to compute on one. Where a rank has none, or shares one that it may not share, all ranks
/// have the same error. Collective.
pub fn take(config: &Config, rank: &Rank, comm: &mut dyn Communicator) -> Result<()> {
    match device::choose(config.run.device) {
        Place::Host => Ok(()),
        Place::Cuda => take_one(&config.parallel, rank, comm),
    }
}

/// As `take`, where all ranks are to compute on one.
pub fn take_one(parallel: &Parallel, rank: &Rank, comm: &mut dyn Communicator) -> Result<()> {
    let mine = together(Sight::of_this_process(), rank, comm)?;
    let sights = gather_bytes(comm, &serde_json::to_vec(&mine).expect("plain data"))?;
    let sights: Result<Vec<Sight>, _> = sights.iter().map(|bytes| serde_json::from_slice(bytes)).collect();
    let sights = sights.or_kind(Kind::Internal, "the GPUs that the other ranks see")?;
    let taken = assign(&sights);
    let taken = match shared(&sights, &taken) {
        Some(text) if parallel.allow_shared_gpu => {
            tracing::info!(target: SAID_ONCE, "{text}");
            Ok(taken)
        }
        Some(text) => Err(Error::usage(format!("{text}. {}", remedies(&sights)))),
        None => Ok(taken),
    };
    let taken = together(taken, rank, comm)?;
    let gpu = together(Gpu::take(taken[rank.world.rank]), rank, comm)?;
    tracing::debug!("rank {} computes on {}", rank.world.rank, gpu.device());
    Ok(())
}

/// What a rank sees.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Sight {
    host: String,
    /// Tells machines apart that call themselves the same.
    machine: String,
    /// By number.
    gpus: Vec<Seen>,
    /// CUDA_VISIBLE_DEVICES
    visible: Option<String>,
}

/// A GPU, as any process of its machine knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    name: String,
    /// A MIG instance has one of its own.
    uuid: String,
    /// Virtual machines have been seen to give all their GPUs one UUID, but never one bus id.
    bus_id: String,
}

impl Sight {
    fn of_this_process() -> Result<Sight> {
        let found = probe::gpus()?;
        found.device(0)?;
        let seen = |device: &Device| Seen {
            name: device.name.clone(),
            uuid: device.uuid.clone(),
            bus_id: device.bus_id.clone(),
        };
        Ok(Sight {
            host: host().to_string(),
            machine: machine(),
            gpus: found.devices.iter().map(seen).collect(),
            visible: std::env::var("CUDA_VISIBLE_DEVICES").ok(),
        })
    }
}

/// The number of each rank's GPU among those that it sees.
fn assign(sights: &[Sight]) -> Vec<usize> {
    let number = |rank: usize| {
        let place = sights[..rank].iter().filter(|other| other.machine == sights[rank].machine).count();
        place % sights[rank].gpus.len()
    };
    (0..sights.len()).map(number).collect()
}

/// Says of the first two ranks that have one GPU which they are, and which it is.
fn shared(sights: &[Sight], taken: &[usize]) -> Option<String> {
    let gpu = |rank: usize| &sights[rank].gpus[taken[rank]];
    let both = |a: usize, b: usize| sights[a].machine == sights[b].machine && gpu(a) == gpu(b);
    let (first, second) = (0..sights.len()).find_map(|b| (0..b).find(|&a| both(a, b)).map(|a| (a, b)))?;
    let Seen { name, uuid, .. } = gpu(first);
    let sight = |rank: usize| {
        let (Sight { gpus, visible, .. }, number) = (&sights[rank], taken[rank]);
        let visible = visible.as_ref().map_or(String::new(), |list| format!(", by CUDA_VISIBLE_DEVICES={list}"));
        format!("number {number} of the {} that rank {rank} sees{visible}", gpus.len())
    };
    Some(format!(
        "ranks {first} and {second} on {} share a GPU, {name} ({uuid}): it is {}, and {}",
        sights[first].host,
        sight(first),
        sight(second)
    ))
}

fn remedies(sights: &[Sight]) -> &'static str {
    match sights.iter().flat_map(|sight| &sight.gpus).any(|gpu| gpu.uuid.starts_with("MIG-")) {
        true => {
            "Of a GPU in MIG mode CUDA shows a process one instance: start each rank with the UUID of its own in \
             CUDA_VISIBLE_DEVICES (nvidia-smi -L)"
        }
        false => {
            "Start no more ranks on a host than it has GPUs (trainer -n gpus; srun --gpus-per-task=1), or show each rank \
             its own or all of them (CUDA_VISIBLE_DEVICES); for a test parallel.allow_shared_gpu = true lets ranks share one"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sight(machine: &str, gpus: &[&str]) -> Sight {
        let seen = |uuid: &&str| Seen { name: "G".into(), uuid: uuid.to_string(), bus_id: uuid.to_string() };
        Sight { host: machine.into(), machine: machine.into(), gpus: gpus.iter().map(seen).collect(), visible: None }
    }

    #[test]
    fn each_rank_takes_the_gpu_of_its_place_on_its_machine_or_the_one_that_it_is_shown() {
        let all = ["a", "b"];
        let two_machines = [sight("m", &all), sight("n", &["c", "d"]), sight("m", &all), sight("n", &["c", "d"])];
        assert_eq!(assign(&two_machines), [0, 0, 1, 1]);
        assert_eq!(shared(&two_machines, &assign(&two_machines)), None);
        let one_each = [sight("m", &["a"]), sight("m", &["b"]), sight("n", &["a"])];
        assert_eq!(assign(&one_each), [0, 0, 0]);
        assert_eq!(shared(&one_each, &assign(&one_each)), None, "virtual machines may have equal UUIDs");
        let two_each = [sight("m", &["a", "b"]), sight("m", &["c", "d"])];
        assert_eq!(shared(&two_each, &assign(&two_each)), None);
    }

    #[test]
    fn ranks_that_share_a_gpu_are_named_with_it_wherever_they_see_it() {
        let mut one = sight("m", &["a"]);
        one.visible = Some("3".into());
        let sights = [sight("n", &["a"]), sight("m", &["b", "a"]), one.clone(), one];
        let taken = [0, 1, 0, 0];
        assert_eq!(
            shared(&sights, &taken).unwrap(),
            "ranks 1 and 2 on m share a GPU, G (a): it is number 1 of the 2 that rank 1 sees, and number 0 of the 1 that \
             rank 2 sees, by CUDA_VISIBLE_DEVICES=3"
        );
    }

    #[test]
    fn gpus_with_one_uuid_are_told_apart_by_their_bus() {
        let mut twins = sight("m", &["a", "a"]);
        twins.gpus[1].bus_id = "b".into();
        let sights = [twins.clone(), twins];
        assert_eq!(shared(&sights, &assign(&sights)), None);
        assert!(remedies(&[sight("m", &["MIG-1"])]).contains("MIG mode"));
    }
}
