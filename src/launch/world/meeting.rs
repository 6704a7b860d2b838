//! Where the ranks of a world meet: what the user says comes first, then what the launcher offers.

use super::variables::Claim;
use super::{Launcher, lists};
use crate::error::{Context, Error, Kind, Result};
use std::fmt;
use std::path::PathBuf;

/// Names a folder that all hosts share: `file:/shared/folder`.
const RENDEZVOUS: &str = "LOCKSTEP_RENDEZVOUS";

/// Where the ranks find each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// One rank: nowhere.
    Alone,
    /// Sockets handed over by `trainer -n`.
    Inherited,
    /// All ranks on one node: an abstract Unix socket named after this job, or, without a job id, after the parent.
    Node { job: Option<String> },
    /// Rank 0 listens on `host`, at the first of these ports that is free; the others try each.
    Tcp { host: String, ports: Vec<u16>, job: String },
    /// Rank 0 leaves its address in a file of this folder.
    Folder { folder: PathBuf, job: String },
    /// Rank 0 tells its address, or on one node the name of a socket, to the process manager at the other end of this
    /// descriptor.
    Pmi { fd: i32, one_node: bool },
    /// The same, by a broadcast of MPI's.
    #[cfg(feature = "mpi")]
    Mpi { one_node: bool },
}

impl fmt::Display for Meeting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Meeting::Alone => f.write_str("nowhere"),
            Meeting::Inherited => f.write_str("at sockets from the launcher"),
            Meeting::Node { .. } => f.write_str("at a socket of this node"),
            Meeting::Tcp { host, ports, .. } => write!(f, "on {host}, at port {}", or(ports)),
            Meeting::Folder { folder, .. } => write!(f, "by a note in {}", folder.display()),
            Meeting::Pmi { .. } => f.write_str("by a note with the process manager (PMI)"),
            #[cfg(feature = "mpi")]
            Meeting::Mpi { .. } => f.write_str("by a broadcast of MPI's"),
        }
    }
}

fn or(ports: &[u16]) -> String {
    ports.iter().map(u16::to_string).collect::<Vec<_>>().join(" or ")
}

impl Meeting {
    /// For the world that `claims` describe, which agree; the first is the launcher. One node comes before MASTER_ADDR: only a
    /// Unix socket can carry the shared memory's descriptors.
    pub fn choose(claims: &[Claim], one_node: bool, lookup: &impl Fn(&str) -> Option<String>) -> Result<Meeting> {
        let first = &claims[0];
        let job = claims.iter().find_map(|claim| claim.job.clone());
        if first.launcher == Launcher::Lockstep {
            return Ok(Meeting::Inherited);
        }
        if first.size.value == 1 {
            return Ok(Meeting::Alone);
        }
        if let Some(place) = lookup(RENDEZVOUS) {
            return Ok(Meeting::Folder { folder: folder(&place)?, job: job.unwrap_or_default() });
        }
        #[cfg(feature = "mpi")]
        if first.launcher.starts_mpi() && (one_node || lookup("MASTER_ADDR").is_none()) {
            return Ok(Meeting::Mpi { one_node });
        }
        if one_node {
            // Ranks that were started one by one, with torchrun's variables, have no common parent.
            let master = || Some(format!("{}:{}", lookup("MASTER_ADDR")?, lookup("MASTER_PORT")?));
            let by_hand = (first.launcher == Launcher::Torchrun).then(master).flatten();
            return Ok(match (job.or(by_hand), pmi(claims, lookup)?) {
                // The parent may be a shell in between, one for each rank.
                (None, Some(fd)) => Meeting::Pmi { fd, one_node },
                (job, _) => Meeting::Node { job },
            });
        }
        let slurm = claims.iter().find(|claim| claim.launcher == Launcher::Slurm);
        let (host, port) = (lookup("MASTER_ADDR"), master_port(lookup)?);
        if let (Some(host), Some(port)) = (host.clone(), port) {
            return Ok(Meeting::Tcp { host, ports: vec![port], job: job.unwrap_or_default() });
        }
        if let (Some(_), Some(job)) = (slurm, job) {
            let host = host.map_or_else(|| first_host(lookup), Ok)?;
            return Ok(Meeting::Tcp { host, ports: port.map_or_else(|| ports(&job), |port| vec![port]), job });
        }
        match pmi(claims, lookup)? {
            Some(fd) => Ok(Meeting::Pmi { fd, one_node }),
            None => Err(nowhere(first)),
        }
    }
}

/// The descriptor of the socket to a process manager that speaks PMI-1.
fn pmi(claims: &[Claim], lookup: &impl Fn(&str) -> Option<String>) -> Result<Option<i32>> {
    let fd = claims.iter().any(|claim| claim.launcher == Launcher::Hydra).then(|| lookup("PMI_FD")).flatten();
    fd.map(|fd| fd.trim().parse().or_kind(Kind::Usage, format!("PMI_FD = \"{fd}\" is not a descriptor"))).transpose()
}

fn folder(place: &str) -> Result<PathBuf> {
    let folder = place.strip_prefix("file:").map(PathBuf::from).filter(|folder| folder.is_absolute());
    folder.ok_or_else(|| {
        Error::usage(format!(
            "{RENDEZVOUS} = \"{place}\" names no place to meet; expected file: and the absolute path of a folder that all \
             hosts share, such as file:/home/me/run"
        ))
    })
}

fn master_port(lookup: &impl Fn(&str) -> Option<String>) -> Result<Option<u16>> {
    let Some(text) = lookup("MASTER_PORT") else { return Ok(None) };
    let port: u16 = text.trim().parse().ok().filter(|port| *port > 0).ok_or_else(|| {
        Error::usage(format!("MASTER_PORT = \"{text}\" is not a port; expected a number from 1 to 65535"))
    })?;
    // torchrun's own agent listens at MASTER_PORT.
    let taken = lookup("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    Ok(Some(if taken { port.checked_add(1).unwrap_or(port - 1) } else { port }))
}

/// Rank 0's host: Slurm deals out tasks from the first node of the step on.
fn first_host(lookup: &impl Fn(&str) -> Option<String>) -> Result<String> {
    const LIST: &str = "SLURM_STEP_NODELIST";
    let list = lookup(LIST).unwrap_or_default();
    let hosts = lists::hosts(&list).map_err(|error| error.context(format!("{LIST} = \"{list}\"")))?;
    Ok(hosts[0].clone())
}

/// A dozen ports that follow from the job, so that nobody has to agree on one. They lie below the range from which the
/// system takes ports for connections (ip_local_port_range, from 32768), so one is in use only where another service was
/// given it.
fn ports(job: &str) -> Vec<u16> {
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 10_000;
    let port = |index: u8| {
        let digest = blake3::hash(format!("{index} {job}").as_bytes());
        FIRST + u16::from_le_bytes([digest.as_bytes()[0], digest.as_bytes()[1]]) % COUNT
    };
    (0..12).map(port).collect()
}

fn nowhere(first: &Claim) -> Error {
    let (by_mpi, export) = match first.launcher {
        Launcher::OpenMpi => (", or use a build with `--features mpi`", "with `mpirun -x NAME`"),
        Launcher::Mvapich | Launcher::Pals | Launcher::Hydra => {
            (", or use a build with `--features mpi`", "with `mpiexec -genvall`")
        }
        _ => ("", "to all ranks"),
    };
    Error::usage(format!(
        "{} started {} ranks that are not all on this node, and nothing says where they meet. Set {RENDEZVOUS}=file:FOLDER to \
         a folder that all hosts share, or MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there (for \
         example 29500), exported {export}{by_mpi}",
        first.launcher, first.size.value
    ))
}

/// The name of the socket at which the ranks of one node meet. Equal for the ranks of one job, different for others: from
/// the user and the job's id, or else the common parent, which its start time tells from an earlier process of the same
/// number.
pub fn socket_name(job: Option<&str>) -> Result<String> {
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
