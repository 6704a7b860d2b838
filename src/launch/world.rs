//! Who am I: rank and size from the variables that launchers set, and where this world's ranks meet.
//!
//! `World::from_env` is a pure function of the variables. Each launcher that speaks is a claim; all claims must agree,
//! because two that differ mean that one launcher was started inside another and the ranks would not be what anybody
//! meant. Slurm is the exception: `mpirun` in a job starts its daemons, one a node, as a Slurm step, and the ranks
//! inherit the daemon's SLURM_PROCID; so Slurm counts only where nobody else speaks, or says the same.

use super::lifeline;
#[cfg(feature = "mpi")]
use super::mpi;
use super::rendezvous::Control;
use crate::error::{Context, Error, Kind, Result};
use std::fmt;
use std::time::Duration;

/// How long the ranks of a world may take to find each other: launchers start nodes one after another.
const MEETING_TIMEOUT: Duration = Duration::from_secs(120);

/// This process among the ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    pub rank: usize,
    pub size: usize,
    /// Rank among the ranks of this node.
    pub local_rank: usize,
    /// Ranks on this node; an estimate under launchers that do not say and place ranks unevenly.
    pub local_size: usize,
    pub launcher: Launcher,
    pub meeting: Meeting,
}

/// Who started this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// Nobody: one process.
    None,
    /// `trainer -n N`.
    Lockstep,
    Torchrun,
    OpenMpi,
    Mvapich,
    Pals,
    Flux,
    Hydra,
    Slurm,
}

/// Where the ranks find each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// One rank: nowhere.
    Alone,
    /// Sockets handed over by `trainer -n`.
    Inherited,
    /// All ranks on one node: an abstract Unix socket named after this job, or, without a job id, after the parent.
    Node { job: Option<String> },
    /// Rank 0 listens at MASTER_ADDR:MASTER_PORT.
    Tcp { host: String, port: u16 },
    /// Wherever MPI's rank 0 says.
    #[cfg(feature = "mpi")]
    Mpi,
}

impl World {
    /// This process's world. A rank of `trainer -n` ties its life to the launcher's here, one of mpirun starts MPI, so call
    /// it first.
    pub fn detect() -> Result<World> {
        let world = World::from_env(|name| std::env::var(name).ok())?;
        if world.launcher == Launcher::Lockstep {
            lifeline::tie_to_launcher()?;
        }
        #[cfg(feature = "mpi")]
        if world.meeting == Meeting::Mpi {
            mpi::initialize(&world)?;
        }
        Ok(world)
    }

    /// The world that the variables describe. Errors (kind Usage): numbers that are none or out of range, launchers that
    /// disagree, several nodes without a place to meet.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Result<World> {
        let lookup = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let claims = claims(&lookup)?;
        let Some(first) = claims.first() else {
            return Ok(World::alone());
        };
        let (rank, size) = (first.rank.value, first.size.value);
        let local_rank = claims.iter().find_map(|claim| claim.local_rank.as_ref()).map_or(0, |var| var.value);
        let local_size = claims.iter().find_map(|claim| claim.local_size.as_ref()).map_or(1, |var| var.value);
        // A job's nodes only bound the ranks on each: five on one of two nodes with six ranks are more than six halves.
        let nodes = claims.iter().find_map(|claim| claim.nodes.as_ref());
        let local_size = nodes.map_or(local_size, |nodes| size.div_ceil(nodes.value.max(1)).max(local_rank + 1));
        if local_rank >= local_size || local_size > size {
            return Err(Error::usage(format!(
                "{} describes a world that cannot be: local rank {local_rank} of {local_size} on this node, of {size} \
                 ranks in all; expected local rank < local size <= size",
                first.launcher
            )));
        }
        let meeting = meeting(first, local_size == size, &lookup)?;
        Ok(World { rank, size, local_rank, local_size, launcher: first.launcher, meeting })
    }

    /// Meets the other ranks. Two stars: one to set up collectives, one for the watch.
    pub fn connect(&self) -> Result<(Control, Control)> {
        let World { rank, size, .. } = *self;
        let star: Box<dyn Fn() -> Result<Control>> = match &self.meeting {
            #[cfg(feature = "mpi")]
            Meeting::Mpi => return mpi::meet(self, MEETING_TIMEOUT),
            Meeting::Inherited => return lifeline::receive_stars(rank, size),
            Meeting::Alone => Box::new(|| Control::from_fds(0, 1, Vec::new())),
            Meeting::Node { job } => {
                let name = socket_name(job.as_deref())?;
                Box::new(move || Control::abstract_unix(rank, size, &name, MEETING_TIMEOUT))
            }
            Meeting::Tcp { host, port } => Box::new(move || Control::tcp(rank, size, host, *port, MEETING_TIMEOUT)),
        };
        Ok((star()?, star()?))
    }

    /// One process on its own.
    pub fn alone() -> World {
        World { rank: 0, size: 1, local_rank: 0, local_size: 1, launcher: Launcher::None, meeting: Meeting::Alone }
    }
}

/// A launcher's variables. Where a list of names stands, the first that is set counts.
struct Source {
    launcher: Launcher,
    rank: &'static str,
    size: &'static [&'static str],
    local_rank: &'static str,
    local_size: &'static str,
    /// For launchers that give the number of nodes instead of the local size.
    nodes: &'static str,
    /// Variables that together name the job.
    job: &'static [&'static str],
    /// Without this variable the others mean something else.
    only_with: Option<&'static str>,
}

/// The launchers, the more specific before the more general.
const SOURCES: [Source; 8] = [
    Source {
        rank: "LOCKSTEP_RANK",
        size: &["LOCKSTEP_SIZE"],
        local_rank: "LOCKSTEP_LOCAL_RANK",
        local_size: "LOCKSTEP_LOCAL_SIZE",
        ..Source::of(Launcher::Lockstep)
    },
    Source {
        rank: "RANK",
        size: &["WORLD_SIZE"],
        local_rank: "LOCAL_RANK",
        local_size: "LOCAL_WORLD_SIZE",
        ..Source::of(Launcher::Torchrun)
    },
    Source {
        rank: "OMPI_COMM_WORLD_RANK",
        size: &["OMPI_COMM_WORLD_SIZE"],
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_size: "OMPI_COMM_WORLD_LOCAL_SIZE",
        job: &["PMIX_NAMESPACE"],
        ..Source::of(Launcher::OpenMpi)
    },
    Source {
        rank: "MV2_COMM_WORLD_RANK",
        size: &["MV2_COMM_WORLD_SIZE"],
        local_rank: "MV2_COMM_WORLD_LOCAL_RANK",
        local_size: "MV2_COMM_WORLD_LOCAL_SIZE",
        ..Source::of(Launcher::Mvapich)
    },
    Source {
        rank: "PALS_RANKID",
        size: &["PMI_SIZE"],
        local_rank: "PALS_LOCAL_RANKID",
        local_size: "PALS_LOCAL_SIZE",
        job: &["PALS_APID"],
        ..Source::of(Launcher::Pals)
    },
    Source {
        rank: "FLUX_TASK_RANK",
        size: &["FLUX_JOB_SIZE"],
        local_rank: "FLUX_TASK_LOCAL_ID",
        nodes: "FLUX_JOB_NNODES",
        job: &["FLUX_JOB_ID"],
        ..Source::of(Launcher::Flux)
    },
    Source {
        rank: "PMI_RANK",
        size: &["PMI_SIZE"],
        local_rank: "MPI_LOCALRANKID",
        local_size: "MPI_LOCALNRANKS",
        ..Source::of(Launcher::Hydra)
    },
    // sbatch sets SLURM_PROCID for the batch script too; only a step has a node list. In a step of its own (salloc's
    // shell) SLURM_NTASKS is still the whole job's.
    Source {
        rank: "SLURM_PROCID",
        size: &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"],
        local_rank: "SLURM_LOCALID",
        nodes: "SLURM_STEP_NUM_NODES",
        job: &["SLURM_JOB_ID", "SLURM_STEP_ID"],
        only_with: Some("SLURM_STEP_NODELIST"),
        ..Source::of(Launcher::Slurm)
    },
];

impl Source {
    const fn of(launcher: Launcher) -> Source {
        Source { launcher, rank: "", size: &[], local_rank: "", local_size: "", nodes: "", job: &[], only_with: None }
    }
}

/// Variables by which other launchers than ours would speak: `trainer -n` clears them for its ranks.
pub fn foreign_variables() -> impl Iterator<Item = &'static str> {
    SOURCES
        .iter()
        .filter(|source| !matches!(source.launcher, Launcher::Lockstep | Launcher::Slurm))
        .flat_map(|source| {
            [source.rank, source.local_rank, source.local_size, source.nodes]
                .into_iter()
                .chain(source.size.iter().copied())
        })
        .filter(|name| !name.is_empty())
}

/// What one launcher says.
struct Claim {
    launcher: Launcher,
    rank: Var,
    size: Var,
    local_rank: Option<Var>,
    local_size: Option<Var>,
    nodes: Option<Var>,
    job: Option<String>,
}

#[derive(Clone, Copy)]
struct Var {
    name: &'static str,
    value: usize,
}

/// What every launcher says that counts; they agree.
fn claims(lookup: &impl Fn(&str) -> Option<String>) -> Result<Vec<Claim>> {
    let mut claims: Vec<Claim> = Vec::new();
    for source in &SOURCES {
        let Some(claim) = Claim::read(source, lookup)? else { continue };
        match claims.first().map(|first| (first, first.conflict(&claim))) {
            Some((_, Some(_))) if claim.launcher == Launcher::Slurm => continue,
            Some((first, Some((here, there)))) => return Err(disagreement(first, here, &claim, there)),
            _ => claims.push(claim),
        }
    }
    Ok(claims)
}

impl Claim {
    fn read(source: &Source, lookup: &impl Fn(&str) -> Option<String>) -> Result<Option<Claim>> {
        if source.only_with.is_some_and(|name| lookup(name).is_none()) {
            return Ok(None);
        }
        let Some(rank) = number(source.rank, lookup)? else { return Ok(None) };
        let size = source.size.iter().find_map(|name| number(name, lookup).transpose()).transpose()?;
        let size = size.ok_or_else(|| {
            Error::usage(format!(
                "{} = {} is set but {} is not: {} sets both. Start with the launcher, or unset {}",
                rank.name,
                rank.value,
                source.size.join(" or "),
                source.launcher,
                rank.name
            ))
        })?;
        if rank.value >= size.value {
            return Err(Error::usage(format!(
                "{} = {} is not below {} = {}: ranks count from 0",
                rank.name, rank.value, size.name, size.value
            )));
        }
        let job: Option<Vec<String>> = source.job.iter().map(|name| lookup(name)).collect();
        Ok(Some(Claim {
            launcher: source.launcher,
            rank,
            size,
            local_rank: number(source.local_rank, lookup)?,
            local_size: number(source.local_size, lookup)?,
            nodes: number(source.nodes, lookup)?,
            job: job.filter(|parts| !parts.is_empty()).map(|parts| parts.join(".")),
        }))
    }

    /// The first two variables that differ, mine and the other's.
    fn conflict(&self, other: &Claim) -> Option<(Var, Var)> {
        let both = |mine: Option<Var>, theirs: Option<Var>| mine.zip(theirs);
        [
            Some((self.rank, other.rank)),
            Some((self.size, other.size)),
            both(self.local_rank, other.local_rank),
            both(self.local_size, other.local_size),
        ]
        .into_iter()
        .flatten()
        .find(|(mine, theirs)| mine.value != theirs.value)
    }
}

fn number(name: &'static str, lookup: &impl Fn(&str) -> Option<String>) -> Result<Option<Var>> {
    let Some(text) = lookup(name) else { return Ok(None) };
    let value = text.trim().parse().map_err(|_| {
        Error::usage(format!(
            "{name} = \"{text}\" is not a number from 0 up; the launcher sets it, so unset or correct it"
        ))
    })?;
    Ok(Some(Var { name, value }))
}

fn disagreement(first: &Claim, here: Var, second: &Claim, there: Var) -> Error {
    Error::usage(format!(
        "two launchers disagree about this process: {} = {} ({}), but {} = {} ({}). Usually one was started inside the \
         other, or the variable is left over in the shell: use one launcher, or unset the variables of the other",
        here.name, here.value, first.launcher, there.name, there.value, second.launcher
    ))
}

/// Where a world meets. One node comes before MASTER_ADDR: only a Unix socket can carry the shared memory's descriptors.
fn meeting(claim: &Claim, one_node: bool, lookup: &impl Fn(&str) -> Option<String>) -> Result<Meeting> {
    if claim.launcher == Launcher::Lockstep {
        return Ok(Meeting::Inherited);
    }
    if claim.size.value == 1 {
        return Ok(Meeting::Alone);
    }
    #[cfg(feature = "mpi")]
    if claim.launcher.starts_mpi() {
        return Ok(Meeting::Mpi);
    }
    if one_node {
        return Ok(Meeting::Node { job: claim.job.clone() });
    }
    let (Some(host), Some(port)) = (lookup("MASTER_ADDR"), lookup("MASTER_PORT")) else {
        return Err(Error::usage(format!(
            "{} started {} ranks that are not all on this node, and MASTER_ADDR and MASTER_PORT do not say where to meet. \
             Set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there (for example 29500), and export \
             both to all ranks",
            claim.launcher, claim.size.value
        )));
    };
    let port: u16 = port.trim().parse().ok().filter(|port| *port > 0).ok_or_else(|| {
        Error::usage(format!("MASTER_PORT = \"{port}\" is not a port; expected a number from 1 to 65535"))
    })?;
    // torchrun's own agent listens at MASTER_PORT.
    let taken = lookup("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    Ok(Meeting::Tcp { host, port: if taken { port.checked_add(1).unwrap_or(port - 1) } else { port } })
}

/// Equal for the ranks of one job on one node, different for others: from the user and the job's id, or else the common
/// parent, which its start time tells from an earlier process of the same number.
fn socket_name(job: Option<&str>) -> Result<String> {
    let user = rustix::process::getuid().as_raw();
    let job = match job {
        Some(job) => job.to_string(),
        None => {
            let parent = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
            let stat = std::fs::read_to_string(format!("/proc/{parent}/stat"))
                .or_kind(Kind::Internal, "finding the launcher, by which the ranks of this node meet")?;
            // The second field is the name, in brackets, and may hold anything; the 22nd is the start time.
            let start = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(19)).unwrap_or("0");
            format!("parent {parent} {start}")
        }
    };
    Ok(format!("lockstep-{}", blake3::hash(format!("{user} {job}").as_bytes()).to_hex()))
}

#[cfg(feature = "mpi")]
impl Launcher {
    /// Whether MPI_Init finds the other ranks under it.
    fn starts_mpi(self) -> bool {
        !matches!(self, Launcher::None | Launcher::Lockstep | Launcher::Torchrun)
    }
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Launcher::None => "no launcher",
            Launcher::Lockstep => "trainer -n",
            Launcher::Torchrun => "torchrun",
            Launcher::OpenMpi => "Open MPI",
            Launcher::Mvapich => "MVAPICH",
            Launcher::Pals => "PALS",
            Launcher::Flux => "Flux",
            Launcher::Hydra => "MPICH, Hydra or Intel MPI",
            Launcher::Slurm => "a Slurm step",
        })
    }
}

impl fmt::Display for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let World { rank, size, local_rank, local_size, launcher, .. } = self;
        write!(f, "rank {rank} of {size} (on this node {local_rank} of {local_size}), started by {launcher}")
    }
}

#[cfg(test)]
mod tests;
