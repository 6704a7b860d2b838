//! Which GPU each rank computes on. Every rank tells all others which GPUs it sees; of those it takes the one of its number
//! among the ranks of its machine. That serves where all see all GPUs (`trainer -n`, mpirun), where each is shown its own
//! (Slurm's `--gpus-per-task`, CUDA_VISIBLE_DEVICES), and all between. Since every rank knows what all others take, two that
//! would share a GPU are found before either begins to work on it.

use super::Rank;
use super::agreement::{gather_bytes, of_all, together};
use super::memory::Need;
use crate::comm::Communicator;
use crate::config::raw::{Config, FactorExchange, Parallel};
use crate::device::cuda::probe::{self, Device};
use crate::device::cuda::{Gpu, Memory, libraries, mib};
use crate::device::{self, Choice, Place};
use crate::error::{Context, Error, Kind, Result};
use crate::launch::numa;
use crate::launch::rendezvous::{host, machine};
use crate::report::log::SAID_ONCE;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The configuration with what "auto" means for `[run] device`: GPUs, if every rank has one to itself and the libraries that it needs;
/// else the CPU, with a warning where there is a GPU. Collective, of ranks with the same configuration.
pub fn settle(config: &Config, rank: &Rank, comm: &mut dyn Communicator) -> Result<Config> {
    if config.run.device != Choice::Auto {
        return Ok(config.clone());
    }
    let sees_one = Sight::of_this_process().is_ok();
    let mine = usable().map_err(|error| error.to_string());
    let (all, see_one): (Vec<_>, Vec<bool>) = gather(comm, &(mine, sees_one))?.into_iter().unzip();
    let why = match config.parallel.factor_exchange {
        FactorExchange::On => Some("parallel.factor_exchange = \"on\" is for ranks that compute there".to_owned()),
        _ => obstacle(&all, config.parallel.allow_shared_gpu),
    };
    match &why {
        Some(why) if rank.world.rank == 0 && see_one.contains(&true) => {
            tracing::warn!(
                "computing on the CPU, though there is a GPU: {why}. run.device = \"cpu\" says that it is meant"
            );
        }
        Some(why) => tracing::debug!("computing on the CPU: {why}"),
        None => {}
    }
    Ok(settled(config, if why.is_none() { Choice::Cuda } else { Choice::Cpu }))
}

/// The same for one process, as if each rank had what this one has.
pub fn settle_here(config: &Config) -> Config {
    match config.run.device {
        Choice::Auto => settled(config, if usable().is_ok() { Choice::Cuda } else { Choice::Cpu }),
        _ => config.clone(),
    }
}

fn settled(config: &Config, device: Choice) -> Config {
    let mut config = config.clone();
    config.run.device = device;
    config
}

/// What this process sees, if it can compute on it.
fn usable() -> Result<Sight> {
    let sight = Sight::of_this_process()?;
    libraries::cudnn()?;
    libraries::cublas_lt()?;
    libraries::nvrtc()?;
    Ok(sight)
}

/// Why not every rank can compute on a GPU of its own.
fn obstacle(ranks: &[Result<Sight, String>], may_share: bool) -> Option<String> {
    let alike = |why: &String| ranks.iter().all(|other| other.as_ref().err() == Some(why));
    if let Some((rank, why)) = ranks.iter().enumerate().find_map(|(rank, of)| Some((rank, of.as_ref().err()?))) {
        return Some(if alike(why) { why.clone() } else { format!("rank {rank} has none: {why}") });
    }
    let sights: Vec<Sight> = ranks.iter().flatten().cloned().collect();
    shared(&sights, &assign(&sights)).filter(|_| !may_share)
}

/// Takes this rank's GPU, where it is to compute on one. Where a rank has none, shares one that it may not share, or lacks memory
/// for its `need`, all ranks have the same error. Collective.
pub fn take(config: &Config, need: &Need<'_>, rank: &Rank, comm: &mut dyn Communicator) -> Result<()> {
    if device::choose(config.run.device) == Place::Host {
        return Ok(());
    }
    let (sights, taken) = choose(&config.parallel, rank, comm)?;
    if config.run.numa_binding {
        go_near(&sights, &taken, rank);
    }
    let gpu = open(&taken, rank, comm)?;

    // Nobody takes memory before all have looked.
    let room = together(gpu.memory(), rank, comm)?;
    let rooms = gather(comm, &room)?;
    let shares = shares(&sights, &taken, &rooms);
    gpu.set_plan(format!("{}. {}", need.describe(), need.advice(shares[rank.world.rank], room.total)));
    match lacking(need, &sights, &taken, &rooms, &shares) {
        Some(text) => Err(of_all(Error::lacking(text), rank, comm)),
        None => Ok(()),
    }
}

/// As `take`, where all ranks compute on one and need next to nothing of its memory.
pub fn take_one(parallel: &Parallel, rank: &Rank, comm: &mut dyn Communicator) -> Result<()> {
    let (sights, taken) = choose(parallel, rank, comm)?;
    go_near(&sights, &taken, rank);
    open(&taken, rank, comm).map(drop)
}

/// For people: what is in use of the memory of this rank's GPU, if it has one, when the run has all that it takes; `net` bytes of
/// it are the net's.
pub fn tell_use(net: usize) -> Result<()> {
    let Ok(gpu) = Gpu::of_this_rank() else { return Ok(()) };
    let Memory { free, total } = gpu.memory()?;
    let (device, given) = (gpu.device(), gpu.allocated());
    tracing::debug!(
        "{device} has given this run {given} bytes, {net} of them for activations and scratch; {} of its {} are in use by all",
        mib(total - free),
        mib(total)
    );
    Ok(())
}

/// Takes all threads of this process near its GPU, before CUDA starts some and has memory for it. That it cannot go there is no
/// reason not to train.
fn go_near(sights: &[Sight], taken: &[usize], rank: &Rank) {
    let rank = rank.world.rank;
    match numa::bind_near(&sights[rank].gpus[taken[rank]].bus_id) {
        Ok(said) => tracing::debug!("rank {rank} {said}"),
        Err(error) => tracing::warn!("rank {rank} keeps its cores, which may not be near its GPU: {error}"),
    }
}

fn open(taken: &[usize], rank: &Rank, comm: &mut dyn Communicator) -> Result<Gpu> {
    let gpu = together(Gpu::take(taken[rank.world.rank]), rank, comm)?;
    tracing::debug!("rank {} computes on {}", rank.world.rank, gpu.device());
    Ok(gpu)
}

/// What all ranks see, and the number of each one's GPU.
fn choose(parallel: &Parallel, rank: &Rank, comm: &mut dyn Communicator) -> Result<(Vec<Sight>, Vec<usize>)> {
    let mine = together(Sight::of_this_process(), rank, comm)?;
    let sights = gather(comm, &mine)?;
    let taken = assign(&sights);
    match shared(&sights, &taken) {
        Some(text) if !parallel.allow_shared_gpu => {
            return Err(of_all(Error::usage(format!("{text}. {}", remedies(&sights))), rank, comm));
        }
        Some(text) => tracing::info!(target: SAID_ONCE, "{text}"),
        None => {}
    }
    Ok((sights, taken))
}

/// What every rank has, on every rank.
fn gather<T: Serialize + DeserializeOwned>(comm: &mut dyn Communicator, mine: &T) -> Result<Vec<T>> {
    let all = gather_bytes(comm, &serde_json::to_vec(mine).expect("plain data"))?;
    let all: Result<Vec<T>, _> = all.iter().map(|bytes| serde_json::from_slice(bytes)).collect();
    all.or_kind(Kind::Internal, "the GPUs of the other ranks")
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

fn is_shared(sights: &[Sight], taken: &[usize], a: usize, b: usize) -> bool {
    sights[a].machine == sights[b].machine && sights[a].gpus[taken[a]] == sights[b].gpus[taken[b]]
}

/// Says of the first two ranks that have one GPU which they are, and which it is.
fn shared(sights: &[Sight], taken: &[usize]) -> Option<String> {
    let both = |b: usize| (0..b).find(|&a| is_shared(sights, taken, a, b)).map(|a| (a, b));
    let (first, second) = (0..sights.len()).find_map(both)?;
    let Seen { name, uuid, .. } = &sights[first].gpus[taken[first]];
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

/// The free bytes that each rank may count on: ranks of one GPU divide them.
fn shares(sights: &[Sight], taken: &[usize], rooms: &[Memory]) -> Vec<usize> {
    let share = |rank: usize| {
        let on_it: Vec<usize> = (0..rooms.len()).filter(|&other| is_shared(sights, taken, rank, other)).collect();
        on_it.iter().map(|&other| rooms[other].free).min().unwrap_or(0) / on_it.len()
    };
    (0..rooms.len()).map(share).collect()
}

/// Says of the first rank whose GPU has too little memory free what it needs, what there is, and what would fit.
fn lacking(need: &Need<'_>, sights: &[Sight], taken: &[usize], rooms: &[Memory], shares: &[usize]) -> Option<String> {
    let planned = need.bill().total();
    let rank = shares.iter().position(|&share| share < planned)?;
    let (Sight { host, gpus, .. }, Memory { free, total }) = (&sights[rank], rooms[rank]);
    let Seen { name, uuid, .. } = &gpus[taken[rank]];
    let others = (0..rooms.len()).filter(|&other| other != rank && is_shared(sights, taken, rank, other)).count();
    let among = if others > 0 { format!(", for {} ranks", others + 1) } else { String::new() };
    Some(format!(
        "rank {rank} on {host} lacks memory on {name} ({uuid}): {}. Free are {} of {}{among}; {} are taken, by CUDA itself or \
         by what else runs there (nvidia-smi). {}",
        need.describe(),
        mib(free),
        mib(total),
        mib(total - free),
        need.advice(shares[rank], total)
    ))
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
