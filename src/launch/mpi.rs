//! The cluster's MPI, in a build with `--features mpi`: started before all else, compared with what the launcher's
//! variables say, and ended last. Ranks of several hosts meet through it, so that nobody has to give an address.
//!
//! One thread at a time calls MPI (MPI_THREAD_SERIALIZED): the main thread until the ranks have met, then whoever holds the
//! communicator, at last the main thread again. Nothing but starting and ending waits inside MPI, where a dead peer would
//! hold it for ever: all else is started without blocking and then asked for.
//!
//! After a failure MPI is left alone and not ended: MPI_Finalize waits for all ranks. The process just exits, with its own
//! code, and mpirun, which sees a rank go that way, ends what is left.

use super::watch::Health;
use super::world::{Launcher, World};
use crate::error::{Error, Kind, Result};
use ::mpi::Threading;
use ::mpi::environment::{self, Universe};
use ::mpi::ffi;
use std::ffi::{c_char, c_int};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// From `initialize` to `finalize`.
static UNIVERSE: Mutex<Option<Universe>> = Mutex::new(None);

fn universe() -> MutexGuard<'static, Option<Universe>> {
    UNIVERSE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts MPI for a rank of `world`. Errors (kind Usage): MPI sees another world than the launcher, or cannot be called by
/// one thread after the other.
pub(super) fn initialize(world: &World) -> Result<()> {
    reachable(world, |name| std::env::var_os(name).is_some())?;
    let started = ::mpi::initialize_with_threading(Threading::Serialized);
    let (universe, provided) = started.ok_or_else(|| Error::internal("MPI was started already"))?;
    *self::universe() = Some(universe);
    // SAFETY: MPI has started, and the handles are its own constants.
    check(unsafe { ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN) }, "starting MPI")?;
    sufficient(provided)?;
    let (mut rank, mut size) = (0, 0);
    // SAFETY: as above; both results are written.
    check(unsafe { ffi::MPI_Comm_rank(ffi::RSMPI_COMM_WORLD, &mut rank) }, "asking MPI for this rank")?;
    check(unsafe { ffi::MPI_Comm_size(ffi::RSMPI_COMM_WORLD, &mut size) }, "asking MPI for the number of ranks")?;
    world.check_mpi(rank as usize, size as usize, &library())
}

/// Whether the ranks of this process's world can send each other messages through MPI.
pub fn is_running() -> bool {
    universe().is_some()
}

/// The MPI that this binary is linked with: `Open MPI v4.1.4`. May be asked at any time.
pub fn library() -> String {
    let text = environment::library_version().unwrap_or_default();
    // Open MPI goes on behind a comma (package, date), MPICH in the next line.
    let first = text.lines().next().unwrap_or_default();
    first.split(',').next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
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
    wait(health, "waiting for the other ranks to end", &mut request)?;
    drop(universe().take());
    result
}

/// MPI's communicator of all ranks once more, for messages that cannot be mistaken for others. Collective. It lives as long
/// as MPI runs.
pub fn duplicate_world(health: &Health) -> Result<ffi::MPI_Comm> {
    let mut request = null();
    // SAFETY: constants of MPI's. It writes the duplicate before the request is complete; after an error nobody calls it again.
    // The duplicate has the errhandler of the original (MPI 4.0, 7.4.2).
    unsafe {
        let mut comm = ffi::RSMPI_COMM_NULL;
        check(ffi::MPI_Comm_idup(ffi::RSMPI_COMM_WORLD, &mut comm, &mut request), "making a communicator")?;
        wait(health, "waiting for the other ranks to make a communicator of MPI's", &mut request)?;
        Ok(comm)
    }
}

/// For what happens once in a run.
fn wait(health: &Health, what: &str, request: &mut ffi::MPI_Request) -> Result<()> {
    let poll = |limit: Duration| match is_complete(request)? {
        true => Ok(true),
        false => {
            std::thread::sleep(limit.min(POLL));
            Ok(false)
        }
    };
    health.wait(what, poll).map(drop)
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

/// Rank 0's text on every rank, for `rendezvous::ways`. Collective.
pub(super) fn broadcast(text: &str, deadline: Instant) -> Result<String> {
    let mut bytes = [0u8; LONGEST_TEXT];
    if text.len() >= LONGEST_TEXT {
        return Err(Error::internal(format!("a text of {} bytes to broadcast: {text}", text.len())));
    }
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    let mut request = null();
    // SAFETY: the bytes are there until the request is complete; after an error the process ends without calling MPI again.
    let code = unsafe {
        let (address, count) = (bytes.as_mut_ptr().cast(), LONGEST_TEXT as c_int);
        ffi::MPI_Ibcast(address, count, ffi::RSMPI_UINT8_T, 0, ffi::RSMPI_COMM_WORLD, &mut request)
    };
    check(code, "meeting through MPI")?;
    while !is_complete(&mut request)? {
        if Instant::now() > deadline {
            return Err(Error::peer_lost("meeting through MPI: rank 0 has not said where in time; did it start?"));
        }
        std::thread::sleep(POLL);
    }
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(LONGEST_TEXT);
    Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
}

/// Bytes that `broadcast` sends, ended by a zero: more than a host has addresses.
const LONGEST_TEXT: usize = 4096;

/// srun without a PMI would start every rank as an MPI world of its own, or MPI would end it with words of its own.
fn reachable(world: &World, is_set: impl Fn(&str) -> bool) -> Result<()> {
    let offered = ["PMIX_RANK", "PMI_RANK", "PMI_FD", "PMI2_FD"].into_iter().any(is_set);
    if world.launcher == Launcher::Slurm && !offered { world.check_mpi(0, 1, &library()) } else { Ok(()) }
}

fn sufficient(provided: Threading) -> Result<()> {
    if provided >= Threading::Serialized {
        return Ok(());
    }
    Err(Error::usage(format!(
        "{} provides the thread level {provided:?}, but Serialized is needed, since the training and the communication \
         thread call it in turn; use an MPI that was built with threads, or a trainer without the feature mpi",
        library()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(launcher: Launcher) -> World {
        World { rank: 2, size: 4, local_rank: 2, local_size: 4, launcher, ..World::alone() }
    }

    #[test]
    fn srun_without_a_pmi_is_seen_before_mpi_starts() {
        let error = reachable(&world(Launcher::Slurm), |_| false).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        assert!(error.to_string().contains("srun --mpi=pmix") && error.to_string().contains(&library()), "{error}");
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
