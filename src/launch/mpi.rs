//! The cluster's MPI, in a build with `--features mpi`: started before all else, compared with what the launcher's
//! variables say, and ended last. The ranks meet through it, so nobody has to give an address.
//!
//! One thread at a time calls MPI (MPI_THREAD_SERIALIZED): the main thread until the ranks have met, then whoever holds the
//! communicator, at last the main thread again. Nothing but starting, duplicating a communicator and ending waits inside
//! MPI, where a dead peer would hold it for ever: all else is started without blocking and then asked for.
//!
//! After a failure MPI is left alone and not ended: MPI_Finalize waits for all ranks. The process just exits, with its own
//! code, and mpirun, which sees a rank go that way, ends what is left.

use super::rendezvous::Control;
use super::watch::Health;
use super::world::{Launcher, World};
use crate::error::{Context, Error, Kind, Result};
use ::mpi::Threading;
use ::mpi::environment::{self, Universe};
use ::mpi::ffi;
use serde::{Deserialize, Serialize};
use std::ffi::{c_char, c_int};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// From `initialize` to `finalize`.
static UNIVERSE: Mutex<Option<Universe>> = Mutex::new(None);

/// Starts MPI for a rank of `world`. Errors (kind Usage): MPI sees another world than the launcher, or cannot be called by
/// one thread after the other.
pub(super) fn initialize(world: &World) -> Result<()> {
    reachable(world, |name| std::env::var_os(name).is_some())?;
    let started = ::mpi::initialize_with_threading(Threading::Serialized);
    let (universe, provided) = started.ok_or_else(|| Error::internal("MPI was started already"))?;
    *UNIVERSE.lock().unwrap_or_else(PoisonError::into_inner) = Some(universe);
    // SAFETY: MPI has started, and the handles are its own constants.
    check(unsafe { ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN) }, "starting MPI")?;
    sufficient(provided)?;
    let (mut rank, mut size) = (0, 0);
    // SAFETY: as above; both results are written.
    check(unsafe { ffi::MPI_Comm_rank(ffi::RSMPI_COMM_WORLD, &mut rank) }, "asking MPI for this rank")?;
    check(unsafe { ffi::MPI_Comm_size(ffi::RSMPI_COMM_WORLD, &mut size) }, "asking MPI for the number of ranks")?;
    same_world(world, rank as usize, size as usize)
}

/// Whether the ranks of this process's world can send each other messages through MPI.
pub fn is_running() -> bool {
    UNIVERSE.lock().unwrap_or_else(PoisonError::into_inner).is_some()
}

/// The MPI that this binary is linked with: `Open MPI v4.1.4`. May be asked at any time.
pub fn library() -> String {
    let text = environment::library_version().unwrap_or_default();
    // Open MPI goes on behind a comma (package, date), MPICH in the next line.
    let first = text.lines().next().unwrap_or_default();
    first.split(',').next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The two stars of `World::connect`. Collective.
pub(super) fn meet(world: &World, timeout: Duration) -> Result<(Control, Control)> {
    let World { rank, size, local_size, .. } = *world;
    let place = Place::of_rank_0(rank, timeout)?;
    let star = || match local_size == size {
        true => Control::abstract_unix(rank, size, &format!("lockstep-{:016x}", place.token), timeout),
        false => Control::tcp(rank, size, &place.host, place.port, timeout),
    };
    Ok((star()?, star()?))
}

/// Ends MPI after a run that ended with `result`. Where that is in order, on all ranks, none goes before all have come so
/// far: a launcher takes the first that goes with another code than 0 for a failure, such as that of a run which was asked
/// to stop, and ends the rest.
pub fn leave(health: &Health, result: Result<()>) -> Result<()> {
    let in_order = result.as_ref().map_or_else(|error| error.kind() == Kind::Stopped, |()| true);
    if !in_order || !is_running() {
        return result;
    }
    let mut request = null();
    // SAFETY: MPI runs, and the request lives until it is complete.
    check(unsafe { ffi::MPI_Ibarrier(ffi::RSMPI_COMM_WORLD, &mut request) }, "leaving MPI")?;
    health.wait("waiting for the other ranks to end", |limit| {
        std::thread::sleep(limit.min(POLL));
        is_complete(&mut request)
    })?;
    drop(UNIVERSE.lock().unwrap_or_else(PoisonError::into_inner).take());
    result
}

/// MPI's communicator of all ranks once more, for messages that cannot be mistaken for others. Collective. It lives as long
/// as MPI runs.
pub fn duplicate_world() -> Result<ffi::MPI_Comm> {
    // SAFETY: constants of MPI's; the results are written before they are used. The duplicate has the errhandler of the
    // original (MPI 4.0, 7.4.2).
    unsafe {
        let mut comm = ffi::RSMPI_COMM_NULL;
        check(ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, &mut comm), "making a communicator")?;
        Ok(comm)
    }
}

/// An error return of MPI's as an error of kind `PeerLost`: what a call with good arguments fails of is the other end.
pub fn check(code: c_int, what: &str) -> Result<()> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut length = 0;
    // SAFETY: the buffer is as long as MPI asks for.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &mut length) };
    let text = String::from_utf8_lossy(&text[..(length as usize).min(text.len())]).into_owned();
    Err(Error::peer_lost(format!("{what}: MPI says: {}", text.trim())))
}

/// The request that is none.
pub fn null() -> ffi::MPI_Request {
    // SAFETY: a constant of MPI's.
    unsafe { ffi::RSMPI_REQUEST_NULL }
}

/// Whether the operation is done; then `request` is null.
pub fn is_complete(request: &mut ffi::MPI_Request) -> Result<bool> {
    let mut done = 0;
    // SAFETY: a request that is under way, or null.
    check(
        unsafe { ffi::MPI_Test(request, &mut done, ffi::RSMPI_STATUS_IGNORE) },
        "asking for the end of an operation",
    )?;
    Ok(done != 0)
}

const POLL: Duration = Duration::from_millis(1);

/// Where the ranks meet; rank 0 knows it and tells the others.
#[derive(Debug, Serialize, Deserialize)]
struct Place {
    /// Names the socket where all ranks share a host.
    token: u64,
    host: String,
    port: u16,
}

impl Place {
    /// Rank 0's. Collective.
    fn of_rank_0(rank: usize, timeout: Duration) -> Result<Place> {
        // Long enough for any name of a host.
        let mut message = [0u8; 512];
        if rank == 0 {
            let text = serde_json::to_vec(&Place::choose()?).or_kind(Kind::Internal, "the place to meet")?;
            message[..text.len()].copy_from_slice(&text);
        }
        broadcast(&mut message, Instant::now() + timeout)?;
        let text = message.split(|byte| *byte == 0).next().unwrap_or_default();
        serde_json::from_slice(text).or_kind(Kind::Internal, "the place to meet, from rank 0")
    }

    fn choose() -> Result<Place> {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let port = std::net::TcpListener::bind("0.0.0.0:0")
            .and_then(|listener| listener.local_addr())
            .or_kind(Kind::Internal, "looking for a free port")?
            .port();
        Ok(Place { token: RandomState::new().hash_one(std::process::id()), host, port })
    }
}

/// Rank 0's bytes on every rank.
fn broadcast(bytes: &mut [u8], deadline: Instant) -> Result<()> {
    let mut request = null();
    // SAFETY: the bytes are borrowed until the request is complete; after an error the process ends without asking MPI again.
    let code = unsafe {
        let (address, count) = (bytes.as_mut_ptr().cast(), bytes.len() as c_int);
        ffi::MPI_Ibcast(address, count, ffi::RSMPI_UINT8_T, 0, ffi::RSMPI_COMM_WORLD, &mut request)
    };
    check(code, "meeting through MPI")?;
    while !is_complete(&mut request)? {
        if Instant::now() > deadline {
            return Err(Error::peer_lost("meeting through MPI: rank 0 has not said where; did it start?"));
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// srun without a PMI would start every rank as an MPI world of its own, or MPI end the process with its own words.
fn reachable(world: &World, is_set: impl Fn(&str) -> bool) -> Result<()> {
    let variables = ["PMIX_RANK", "PMI_RANK", "PMI_FD", "PMI2_FD"];
    if world.launcher == Launcher::Slurm && !variables.into_iter().any(is_set) {
        return Err(Error::usage(format!(
            "srun started {} tasks but offers no PMI, through which MPI would find them (none of {} is set). {}",
            world.size,
            variables.join(", "),
            remedy(world.launcher)
        )));
    }
    Ok(())
}

fn sufficient(provided: Threading) -> Result<()> {
    if provided >= Threading::Serialized {
        return Ok(());
    }
    Err(Error::usage(format!(
        "{} provides the thread level {provided:?}, but Serialized is needed, since the training and the communication \
         thread call it in turn; use an MPI that was built with threads, or leave it out: transport = \"tcp\" and a \
         trainer without the feature mpi",
        library()
    )))
}

/// MPI and the launcher must speak of one world.
fn same_world(world: &World, rank: usize, size: usize) -> Result<()> {
    if (rank, size) == (world.rank, world.size) {
        return Ok(());
    }
    Err(Error::usage(format!(
        "{} says that this is rank {} of {}, but MPI says rank {rank} of {size}: {} does not know this launcher. {}",
        world.launcher,
        world.rank,
        world.size,
        library(),
        remedy(world.launcher)
    )))
}

fn remedy(launcher: Launcher) -> String {
    let library = library();
    match launcher {
        Launcher::Slurm => {
            format!("Use `srun --mpi=pmix` (`srun --mpi=list` shows what there is) or the mpirun of {library}")
        }
        _ => format!(
            "Use the mpirun of the MPI that this trainer was built with, {library}, or build it with the launcher's"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(launcher: Launcher) -> World {
        World { rank: 2, size: 4, local_rank: 2, local_size: 4, launcher, ..World::alone() }
    }

    #[test]
    fn singletons_are_told_what_mends_it() {
        same_world(&world(Launcher::OpenMpi), 2, 4).unwrap();
        let error = same_world(&world(Launcher::Hydra), 0, 1).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        let text = error.to_string();
        assert!(text.contains("rank 2 of 4, but MPI says rank 0 of 1"), "{text}");
        assert!(
            text.contains(&format!("the mpirun of the MPI that this trainer was built with, {}", library())),
            "{text}"
        );
        let text = same_world(&world(Launcher::Slurm), 0, 1).unwrap_err().to_string();
        assert!(text.contains("srun --mpi=pmix"), "{text}");
    }

    #[test]
    fn srun_without_a_pmi_is_seen_before_mpi_starts() {
        let text = reachable(&world(Launcher::Slurm), |_| false).unwrap_err().to_string();
        assert!(text.contains("4 tasks") && text.contains("srun --mpi=pmix"), "{text}");
        reachable(&world(Launcher::Slurm), |name| name == "PMIX_RANK").unwrap();
        reachable(&world(Launcher::OpenMpi), |_| false).unwrap();
    }

    #[test]
    fn a_thread_level_that_is_too_low_is_refused() {
        sufficient(Threading::Serialized).unwrap();
        sufficient(Threading::Multiple).unwrap();
        let text = sufficient(Threading::Funneled).unwrap_err().to_string();
        assert!(text.contains("Funneled") && text.contains("Serialized is needed"), "{text}");
    }

    #[test]
    fn the_library_has_a_name_and_a_version() {
        let library = library();
        assert!(library.chars().any(|c| c.is_ascii_digit()) && library.len() < 60, "{library}");
    }
}
