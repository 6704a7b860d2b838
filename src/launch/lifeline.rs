//! The socket between `trainer -n` and each of its ranks. It is the rank's standard input, so no number of a descriptor
//! has to be passed on and no other child inherits it. Down comes the rank's end of two stars; up goes, at most once,
//! why the rank failed: the launcher prints what N ranks say alike once.

use super::link::Link;
use super::rendezvous::Control;
use crate::error::{Context, Error, Kind, Result};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Names the launcher's process to its ranks.
pub const LAUNCHER: &str = "LOCKSTEP_LAUNCHER";
/// What either side has to wait for is a matter of milliseconds.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A rank's end.
static LIFELINE: OnceLock<Link> = OnceLock::new();

/// From here on this rank dies with its launcher, even if that is killed.
pub fn tie_to_launcher() -> Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL)).or_kind(Kind::Internal, "tying this rank to its launcher")?;
    let launcher = std::env::var(LAUNCHER).unwrap_or_default();
    let parent = getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    if launcher != parent.to_string() {
        return Err(Error::peer_lost(format!(
            "this is a rank of `trainer -n` by its LOCKSTEP_ variables, but its launcher (process {launcher}) is gone or \
             is not its parent (process {parent}); if they are left over in the shell, unset them"
        )));
    }
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().or_kind(Kind::Internal, "the socket to the launcher")?;
    LIFELINE.get_or_init(|| Link::new(0, stdin));
    Ok(())
}

/// The launcher's side: hands over a rank's ends of the stars.
pub fn send_stars(lifeline: &Link, stars: [Vec<OwnedFd>; 2]) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    stars.iter().flatten().try_for_each(|fd| lifeline.send_fd(fd.as_fd(), deadline))
}

/// The rank's side of `send_stars`; once.
pub fn receive_stars(rank: usize, size: usize) -> Result<(Control, Control)> {
    let lifeline = LIFELINE.get().ok_or_else(|| Error::internal("World::detect ties a rank to its launcher first"))?;
    let deadline = Instant::now() + TIMEOUT;
    let star = || -> Result<Control> {
        let links = if rank == 0 { size - 1 } else { 1 };
        let fds = (0..links).map(|_| lifeline.receive_fd(deadline)).collect::<Result<_>>();
        Control::from_fds(rank, size, fds.map_err(|error| error.context("meeting the other ranks"))?)
    };
    Ok((star()?, star()?))
}

/// The launcher's side of `report`: the last word of a rank that has ended, if it had one.
pub fn last_word_of(lifeline: &Link) -> Option<Error> {
    serde_json::from_slice(&lifeline.receive(Instant::now()).ok()?).ok()
}

/// A process's last word: to the launcher if there is one, else to standard error, unless rank 0 says it. Only the first
/// call counts, so that the main thread and the watch do not both speak.
pub fn report(error: &Error) {
    static SPOKEN: AtomicBool = AtomicBool::new(false);
    if SPOKEN.swap(true, Relaxed) {
        return;
    }
    let word = serde_json::to_vec(error).expect("plain data");
    let heard = LIFELINE.get().is_some_and(|lifeline| lifeline.send(&word, Instant::now()).is_ok());
    if !heard && !error.is_said_by_rank_0() {
        eprintln!("{}", last_word(error.kind() as i32, &error.to_string()));
    }
}

/// How a reason reads on the terminal, given the exit code: being stopped is not an error.
pub fn last_word(code: i32, text: &str) -> String {
    if code == Kind::Stopped as i32 { text.to_string() } else { format!("error: {text}") }
}
