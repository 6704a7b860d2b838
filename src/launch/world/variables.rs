//! The variables by which launchers say who is who. Each launcher that speaks is a claim; all claims must agree, because
//! two that differ mean that one launcher was started inside another and the ranks would not be what anybody meant.
//!
//! Slurm is the exception: `mpirun` in a job starts its daemons, one a node, as a Slurm step, and the ranks inherit the
//! daemon's SLURM_PROCID; so Slurm counts only where nobody else speaks, or says the same. One thing it is believed in any
//! case: where a step has several tasks and each is a world of one rank, every task would train alone.

use super::{Launcher, lists};
use crate::error::{Error, Result};

/// A launcher's variables. Where a list of names stands, the first that is set counts.
struct Source {
    launcher: Launcher,
    rank: &'static str,
    size: &'static [&'static str],
    local_rank: &'static str,
    local_size: &'static str,
    /// For launchers that give, instead of the local size, the number of nodes,
    nodes: &'static str,
    /// or the ranks on each of them and the number of this one.
    ranks_per_node: &'static [&'static str],
    node: &'static str,
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
        ranks_per_node: &["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"],
        node: "SLURM_NODEID",
        job: &["SLURM_JOB_ID", "SLURM_STEP_ID"],
        only_with: Some("SLURM_STEP_NODELIST"),
        ..Source::of(Launcher::Slurm)
    },
];

impl Source {
    const fn of(launcher: Launcher) -> Source {
        Source {
            launcher,
            rank: "",
            size: &[],
            local_rank: "",
            local_size: "",
            nodes: "",
            ranks_per_node: &[],
            node: "",
            job: &[],
            only_with: None,
        }
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
pub struct Claim {
    pub launcher: Launcher,
    pub rank: Var,
    pub size: Var,
    pub local_rank: Option<Var>,
    pub local_size: Option<Var>,
    pub nodes: Option<Var>,
    pub job: Option<String>,
}

#[derive(Clone, Copy)]
pub struct Var {
    pub name: &'static str,
    pub value: usize,
}

/// What every launcher says that counts; they agree.
pub fn claims(lookup: &impl Fn(&str) -> Option<String>) -> Result<Vec<Claim>> {
    let mut claims: Vec<Claim> = Vec::new();
    for source in &SOURCES {
        let Some(claim) = Claim::read(source, lookup)? else { continue };
        match claims.first().map(|first| (first, first.conflict(&claim))) {
            Some((first, Some(_))) if claim.launcher == Launcher::Slurm => match first.size.value {
                1 if claim.size.value > 1 => return Err(singletons(first, &claim)),
                _ => continue,
            },
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
            local_size: number(source.local_size, lookup)?.or(ranks_here(source, size.value, lookup)?),
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

/// Ranks on this node from the list of all nodes. A list that is not of this world, such as the job's where a step has
/// fewer tasks, says nothing.
fn ranks_here(source: &Source, size: usize, lookup: &impl Fn(&str) -> Option<String>) -> Result<Option<Var>> {
    let Some(node) = number(source.node, lookup)? else { return Ok(None) };
    for &name in source.ranks_per_node {
        let Some(text) = lookup(name) else { continue };
        let counts = lists::counts(&text).map_err(|error| error.context(format!("{name} = \"{text}\"")))?;
        if let Some(&value) = counts.get(node.value)
            && counts.iter().sum::<usize>() == size
        {
            return Ok(Some(Var { name, value }));
        }
    }
    Ok(None)
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
    let unset = |claim: &Claim| format!("`env -u {} -u {}`", claim.rank.name, claim.size.name);
    Error::usage(format!(
        "two launchers disagree about this process: {} = {} ({}), but {} = {} ({}). Usually one was started inside the \
         other, or the variable is left over in the shell: use one launcher, or start with {} or {} in front",
        here.name,
        here.value,
        first.launcher,
        there.name,
        there.value,
        second.launcher,
        unset(first),
        unset(second)
    ))
}

fn singletons(first: &Claim, slurm: &Claim) -> Error {
    Error::usage(format!(
        "every task of this Slurm step would train alone: {} = {} ({}), but {} = {}. Let srun start the trainer itself \
         (with `--mpi=pmix` or `--mpi=pmi2` for a build with MPI), or call {} outside of srun",
        first.size.name, first.size.value, first.launcher, slurm.size.name, slurm.size.value, first.launcher
    ))
}
