//! Who am I: rank and size from the variables that launchers set, and where this world's ranks meet.
//!
//! `World::from_env` is a pure function of the variables: `variables` reads who is who, `meeting` chooses where they meet.

pub(super) mod lists;
mod meeting;
mod variables;

pub use meeting::Meeting;
pub use variables::foreign_variables;

use super::job::TORCHRUN_ID;
use super::lifeline;
#[cfg(feature = "mpi")]
use super::mpi;
use super::rendezvous::ways::{self, Interface};
use super::rendezvous::{Control, Party};
use crate::config::raw::Parallel;
use crate::error::{Error, Result};
use meeting::socket_name;
use std::fmt;
use std::time::Duration;
use variables::Var;

/// How long the ranks of a world may take to find each other, unless `[parallel] timeout` is less: launchers start nodes one
/// after another.
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
    /// Whether what any rank says is seen beside what rank 0 says. With torchrun's variables ranks are started by hand too,
    /// each in a terminal of its own.
    pub joins_output: bool,
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

impl World {
    /// This process's world. A rank of `trainer -n` ties its life to the launcher's here, and one of mpirun starts MPI, so
    /// call it first.
    pub fn detect() -> Result<World> {
        let world = World::from_env(|name| std::env::var(name).ok())?;
        if world.launcher == Launcher::Lockstep {
            lifeline::tie_to_launcher()?;
        }
        #[cfg(feature = "mpi")]
        if world.size > 1 && world.launcher.starts_mpi() {
            mpi::initialize(&world)?;
        }
        Ok(world)
    }

    /// The world that the variables describe. Errors (kind Usage): numbers that are none or out of range, launchers that
    /// disagree, several nodes without a place to meet.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Result<World> {
        let lookup = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let claims = variables::claims(&lookup)?;
        let Some(first) = claims.first() else {
            return Ok(World::alone());
        };
        let (rank, size) = (first.rank.value, first.size.value);
        let local_rank = claims.iter().find_map(|claim| claim.local_rank).map_or(0, |var| var.value);
        // A job's nodes only bound the ranks on each: five on one of two nodes with six ranks are more than six halves.
        let bound = |nodes: Var| size.div_ceil(nodes.value.max(1)).max(local_rank + 1);
        let local_size = claims.iter().find_map(|claim| claim.local_size).map(|var| var.value);
        let local_size = local_size.or_else(|| claims.iter().find_map(|claim| claim.nodes).map(bound)).unwrap_or(1);
        if local_rank >= local_size || local_size > size {
            return Err(Error::usage(format!(
                "{} describes a world that cannot be: local rank {local_rank} of {local_size} on this node, of {size} \
                 ranks in all; expected local rank < local size <= size",
                first.launcher
            )));
        }
        let meeting = Meeting::choose(&claims, local_size == size, &lookup)?;
        let joins_output = first.launcher != Launcher::Torchrun || lookup(TORCHRUN_ID).is_some();
        Ok(World { rank, size, local_rank, local_size, launcher: first.launcher, joins_output, meeting })
    }

    /// Holds the world as MPI sees it, with `library` as it names itself, against the launcher's variables. An MPI that was
    /// not started by its own launcher makes every process rank 0 of 1. Errors (kind Usage) name the flag that mends it.
    pub fn check_mpi(&self, rank: usize, size: usize, library: &str) -> Result<()> {
        if self.launcher == Launcher::None || (rank, size) == (self.rank, self.size) {
            return Ok(());
        }
        let remedy = match self.launcher {
            _ if size > 1 => "use one launcher, and start without the variables of the other",
            Launcher::Slurm => {
                "srun has to offer the interface that this MPI uses: `srun --mpi=pmix` for Open MPI, `srun --mpi=pmi2` for \
                 MPICH, MVAPICH and Intel MPI; `srun --mpi=list` shows what there is"
            }
            Launcher::Lockstep | Launcher::Torchrun => {
                "ranks that this launcher starts do not meet through MPI: set [parallel] transport to \"auto\", or start \
                 with the mpirun of that MPI"
            }
            _ => "use the mpirun of the MPI with which this binary was built (`ldd` on it shows which)",
        };
        let library = library.lines().next().unwrap_or_default();
        Err(Error::usage(format!(
            "{} started this process as rank {} of {}, but MPI ({library}) sees rank {rank} of {size}: {remedy}",
            self.launcher, self.rank, self.size
        )))
    }

    /// Meets the other ranks. Two stars: one to set up collectives, one for the watch. `parallel` chooses the interface and
    /// how long to wait.
    pub fn connect(&self, parallel: &Parallel) -> Result<(Control, Control)> {
        let World { rank, size, .. } = *self;
        if rank == 0 {
            tracing::debug!("{self}; they meet {}", self.meeting);
        }
        let interface = Interface::choose(parallel.interface.as_deref())?;
        let timeout = MEETING_TIMEOUT.min(Duration::from_secs_f64(parallel.timeout));
        let party = Party { rank, size, stars: 2, timeout };
        let stars = match &self.meeting {
            Meeting::Inherited => return lifeline::receive_stars(rank, size),
            Meeting::Alone => vec![Control::from_fds(0, 1, Vec::new())?, Control::from_fds(0, 1, Vec::new())?],
            Meeting::Node { job } => ways::at_socket(party, &socket_name(job.as_deref())?)?,
            Meeting::Tcp { host, ports, job } => ways::at_ports(party, host, ports, job, &interface)?,
            Meeting::Folder { folder, job } => ways::through_folder(party, folder, job, &interface)?,
            Meeting::Pmi { fd, one_node } => ways::through_pmi(party, *fd, *one_node, &interface)?,
            #[cfg(feature = "mpi")]
            Meeting::Mpi { one_node } => ways::through_broadcast(party, "MPI", *one_node, &interface, mpi::broadcast)?,
        };
        let [mut first, second] = <[Control; 2]>::try_from(stars).expect("two stars were asked for");
        first.choose_data_ip(interface.chosen_ip());
        Ok((first, second))
    }

    /// One process on its own.
    pub fn alone() -> World {
        let (launcher, meeting) = (Launcher::None, Meeting::Alone);
        World { rank: 0, size: 1, local_rank: 0, local_size: 1, launcher, joins_output: true, meeting }
    }
}

impl Launcher {
    /// Whether MPI finds the other ranks under it.
    #[cfg(feature = "mpi")]
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
