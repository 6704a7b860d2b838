//! Which cores each rank may use. Launchers bind ranks to cores, each in its own way: Open MPI binds two ranks to one core
//! each, whatever the machine has; without binding all ranks may use all cores. What a rank's share is, and whether cores
//! lie idle, shows only when the masks of all ranks of a host are seen together.

use super::rendezvous::Control;
use super::world::{Launcher, World, lists};
use crate::error::{Context, Kind, Result};
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs;

/// What a rank tells the others.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Seat {
    host: String,
    /// As `rendezvous::machine` says.
    machine: String,
    /// Numbers of the cores to which it is bound.
    cores: BTreeSet<usize>,
    /// How many cores' time it is allowed, which a container can limit to less.
    quota: usize,
    /// Cores of the host that could be given to its ranks.
    available: usize,
}

/// Where all ranks sit.
pub struct Seats {
    seats: Vec<Seat>,
}

impl Seats {
    /// Collective.
    pub fn gather(control: &mut Control, world: &World) -> Result<Seats> {
        let mine = serde_json::to_vec(&Seat::here(world.launcher)?).expect("plain data");
        let seats = control.all_gather(&mine)?;
        let seats: Result<Vec<Seat>, _> = seats.iter().map(|bytes| serde_json::from_slice(bytes)).collect();
        Ok(Seats { seats: seats.or_kind(Kind::Internal, "the cores of the other ranks")? })
    }

    /// Threads for a rank: of every core that it may use, the part that is left to it by the others who may.
    pub fn threads(&self, rank: usize) -> usize {
        let Seat { machine, cores, quota, .. } = &self.seats[rank];
        let neighbours: Vec<&Seat> = self.on(machine).map(|(_, seat)| seat).collect();
        let sharers = |core: &usize| neighbours.iter().filter(|seat| seat.cores.contains(core)).count();
        let share: f64 = cores.iter().map(|core| 1.0 / sharers(core) as f64).sum();
        // A third of a core three times is a whole one.
        let share = (share + 1e-6) as usize;
        let allowed = if *quota < cores.len() { quota / neighbours.len() } else { share };
        share.min(allowed).max(1)
    }

    /// What to tell the user where the launcher's binding leaves cores idle: of the first such host, with the option to use.
    pub fn warning(&self, launcher: Launcher) -> Option<String> {
        let option = |each: usize| {
            Some(match launcher {
                Launcher::OpenMpi => format!("`mpirun --bind-to none`, or `--map-by slot:PE={each}`"),
                Launcher::Mvapich => "MV2_ENABLE_AFFINITY=0".to_string(),
                Launcher::Pals => "`mpiexec --cpu-bind none`".to_string(),
                Launcher::Flux => format!("`flux run --cores-per-task={each}`"),
                Launcher::Hydra => "`mpiexec -bind-to none`".to_string(),
                Launcher::Slurm => format!("`srun --cpus-per-task={each}`"),
                // These do not bind: who limits their cores wants it so.
                Launcher::None | Launcher::Lockstep | Launcher::Torchrun => return None,
            })
        };
        self.seats.iter().find_map(|Seat { host, machine, available, .. }| {
            let ranks: Vec<usize> = self.on(machine).map(|(rank, _)| rank).collect();
            let used: BTreeSet<usize> = self.on(machine).flat_map(|(_, seat)| seat.cores.iter().copied()).collect();
            if used.len() >= *available {
                return None;
            }
            let cores: usize = self.on(machine).map(|(_, seat)| seat.cores.len()).sum();
            let shared = if cores > used.len() { ", which they share" } else { "" };
            Some(format!(
                "{launcher} lets ranks {ranks:?} on {host} use {} of {available} cores{shared}; start with {} to use all",
                used.len(),
                option((available / ranks.len()).max(1))?
            ))
        })
    }

    fn on<'a>(&'a self, machine: &'a str) -> impl Iterator<Item = (usize, &'a Seat)> + 'a {
        self.seats.iter().enumerate().filter(move |(_, seat)| seat.machine == machine)
    }
}

impl Seat {
    fn here(launcher: Launcher) -> Result<Seat> {
        let cores = of_this_process()?;
        let quota = std::thread::available_parallelism().map_or(1, usize::from);
        let job = std::env::var("SLURM_JOB_CPUS_PER_NODE").ok().filter(|_| launcher == Launcher::Slurm);
        // The least that the job has on any of its nodes: not too much on this one.
        let job = job.and_then(|counts| lists::counts(&counts).ok()?.into_iter().min());
        let host = super::rendezvous::host().to_string();
        Ok(Seat {
            machine: super::rendezvous::machine(),
            host,
            cores,
            quota,
            available: job.or_else(cores_of_cgroup).or_else(cores_of_host).unwrap_or(quota),
        })
    }
}

/// Numbers of those that this thread may use, and that whatever it starts may.
pub fn of_this_process() -> Result<BTreeSet<usize>> {
    let mask = sched_getaffinity(None).or_kind(Kind::Internal, "asking for the cores of this process")?;
    Ok((0..CpuSet::MAX_CPU).filter(|core| mask.is_set(*core)).collect())
}

/// Has all threads of this process, and those that they will start, run on these cores alone.
pub fn bind(cores: &BTreeSet<usize>) -> Result<()> {
    let mut mask = CpuSet::new();
    cores.iter().for_each(|core| mask.set(*core));
    // A thread may start another before its own turn comes: until a look finds none that is new.
    let mut bound = BTreeSet::new();
    loop {
        let new: Vec<i32> = threads()?.into_iter().filter(|thread| bound.insert(*thread)).collect();
        if new.is_empty() {
            return Ok(());
        }
        for thread in new {
            match sched_setaffinity(Pid::from_raw(thread), &mask) {
                // It has ended.
                Err(Errno::SRCH) => {}
                done => done.or_kind(Kind::Internal, "binding a thread to cores")?,
            }
        }
    }
}

/// The numbers of this process's threads.
fn threads() -> Result<Vec<i32>> {
    let entries = fs::read_dir("/proc/self/task").or_kind(Kind::Internal, "listing the threads of this process")?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
}

/// Cores that the control group of this process leaves to it (cgroups(7), cpuset): a container's or a batch job's.
fn cores_of_cgroup() -> Option<usize> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let files = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        match (parts.next()?, parts.next()?) {
            ("", path) => Some(format!("/sys/fs/cgroup{path}/cpuset.cpus.effective")),
            (kinds, path) if kinds.split(',').any(|kind| kind == "cpuset") => {
                Some(format!("/sys/fs/cgroup/cpuset{path}/cpuset.effective_cpus"))
            }
            _ => None,
        }
    });
    files.filter_map(|file| fs::read_to_string(file).ok()).find_map(|list| parse(&list)).map(|cores| cores.len())
}

fn cores_of_host() -> Option<usize> {
    parse(&fs::read_to_string("/sys/devices/system/cpu/online").ok()?).map(|cores| cores.len())
}

/// The numbers of a list such as `0-3,8`, in which Linux writes cores.
pub fn parse(list: &str) -> Option<BTreeSet<usize>> {
    let mut cores = BTreeSet::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first)?;
        cores.extend(first..=last);
    }
    Some(cores)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seats(available: usize, ranks: &[(&str, &[usize])]) -> Seats {
        let seat = |&(host, cores): &(&str, &[usize])| Seat {
            host: host.to_string(),
            machine: host.to_string(),
            cores: cores.iter().copied().collect(),
            quota: available,
            available,
        };
        Seats { seats: ranks.iter().map(seat).collect() }
    }

    #[test]
    fn a_core_that_several_ranks_may_use_counts_for_each_in_part() {
        let all: Vec<usize> = (0..8).collect();
        let unbound = seats(8, &[("a", &all), ("a", &all), ("a", &all), ("b", &all)]);
        assert_eq!([0, 1, 2, 3].map(|rank| unbound.threads(rank)), [2, 2, 2, 8]);
        let bound = seats(8, &[("a", &all[..4]), ("a", &all[4..])]);
        assert_eq!([0, 1].map(|rank| bound.threads(rank)), [4, 4], "what is one's own is not divided again");
        let thirds = seats(3, &[("a", &[0, 1, 2]), ("a", &[0, 1, 2]), ("a", &[0, 1, 2])]);
        assert_eq!(thirds.threads(2), 1);
        let crowded = seats(1, &[("a", &[0]), ("a", &[0])]);
        assert_eq!(crowded.threads(1), 1);
        let mut limited = seats(8, &[("a", &all), ("a", &all)]);
        limited.seats.iter_mut().for_each(|seat| seat.quota = 2);
        assert_eq!(limited.threads(0), 1, "two cores' time for two ranks");
    }

    #[test]
    fn a_binding_that_leaves_cores_idle_is_told_with_the_option_to_use() {
        let one_each = seats(16, &[("a", &[0]), ("a", &[1]), ("b", &[0]), ("b", &[1])]);
        let text = one_each.warning(Launcher::OpenMpi).unwrap();
        assert!(
            text.starts_with("Open MPI lets ranks [0, 1] on a use 2 of 16 cores; start with `mpirun --bind-to none`")
        );
        assert!(text.contains("slot:PE=8"), "{text}");
        assert!(one_each.warning(Launcher::Slurm).unwrap().contains("srun --cpus-per-task=8"));
        assert_eq!(one_each.warning(Launcher::Torchrun), None, "taskset was somebody's wish");

        let same = seats(4, &[("a", &[0]), ("a", &[0])]).warning(Launcher::Hydra).unwrap();
        assert!(same.contains("use 1 of 4 cores, which they share; start with `mpiexec -bind-to none`"), "{same}");
        assert_eq!(seats(2, &[("a", &[0]), ("a", &[1])]).warning(Launcher::OpenMpi), None, "all are used");
        assert_eq!(seats(2, &[("a", &[0, 1]), ("a", &[0, 1])]).warning(Launcher::Slurm), None);
    }

    #[test]
    fn this_process_has_a_seat() {
        let seat = Seat::here(Launcher::None).unwrap();
        assert!(!seat.cores.is_empty() && seat.available >= seat.cores.len(), "{seat:?}");
        let count = |list| parse(list).map(|cores| cores.len());
        assert_eq!((count("0-3,8\n"), count("5"), count("3-1"), count("")), (Some(5), Some(1), None, None));
    }
}
