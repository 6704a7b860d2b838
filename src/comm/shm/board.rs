//! The notice board: how ranks that share memory learn that the others have come to a collective, and to which one.
//!
//! Every rank has a board of its own, which it alone writes: a counter of the synchronisation points it has reached, and
//! two notices in turn that say what it is about to do, with room for the data of a short operation. A rank arrives by
//! writing its notice and then its counter; it waits by reading the others' counters.
//!
//! Two notices are enough: a rank writes the notice of point e + 2 only after all have reached point e + 1, by when they
//! have done with the one of point e.

use super::memory::{Mapping, share};
use crate::comm::Operation;
use crate::error::{Error, Result};
use crate::launch::rendezvous::Control;
use crate::launch::watch::Health;
use rustix::thread::futex;
use rustix::time::Timespec;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::*};
use std::time::{Duration, Instant};

/// Values that fit into a notice: operations up to 4 KiB need one synchronisation point and no arena.
pub const SHORT: usize = 1024;

/// Looks at a counter before a wait goes to sleep: some tens of microseconds, about what sleeping would cost.
const SPINS: u32 = 2000;

/// What a rank is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Call {
    pub operation: Operation,
    pub root: u32,
    /// Values.
    pub len: u64,
    /// The arena in which the data is, counted from 1; 0 if it is elsewhere.
    pub arena: u64,
    /// Its address there.
    pub offset: u64,
}

impl Call {
    /// Whether two ranks call the same operation; where their data lies may differ.
    fn same(self, other: Call) -> bool {
        (self.operation, self.root, self.len) == (other.operation, other.root, other.len)
    }
}

#[repr(C, align(64))]
struct Notice {
    call: Call,
    values: [f32; SHORT],
}

/// A rank's board as it lies in shared memory, zeroed at first.
#[repr(C)]
struct Lines {
    state: State,
    notices: [Notice; 2],
}

#[repr(C, align(64))]
struct State {
    /// Synchronisation points reached; wraps.
    reached: AtomicU32,
    /// Ranks that sleep until `reached` changes.
    sleepers: AtomicU32,
    /// Not zero once this rank has left for good.
    gone: AtomicU32,
}

pub struct Board {
    rank: usize,
    /// Their ranks in the world, for messages.
    names: Vec<usize>,
    boards: Vec<Arc<Mapping>>,
    reached: u32,
    /// Whether a wait may look a while before it sleeps: only with a core for every rank.
    spins: u32,
    health: Arc<Health>,
    /// What this rank is doing when it waits in the operation under way.
    waiting: &'static str,
}

impl Board {
    /// `names`: by rank among these, the rank in the world.
    pub fn new(control: &mut Control, names: Vec<usize>, health: Arc<Health>) -> Result<Board> {
        let size = control.size();
        let spins = spins(cores(control)?, size);
        let boards = share(control, "lockstep-board", size_of::<Lines>())?;
        Ok(Board { rank: control.rank(), names, boards, reached: 0, spins, health, waiting: "" })
    }

    pub fn size(&self) -> usize {
        self.boards.len()
    }

    /// Announces `call`, with the values that `write` puts into the notice, and waits until all ranks have announced
    /// theirs. An error if these differ.
    pub fn agree(&mut self, call: Call, write: impl FnOnce(&mut [f32])) -> Result<Duration> {
        self.waiting = call.operation.words().waiting;
        let point = self.reached.wrapping_add(1);
        // SAFETY: only this rank writes its board, and nobody reads this notice before `reached` says so.
        let notice = unsafe { &mut (*self.lines(self.rank)).notices[point as usize % 2] };
        notice.call = call;
        write(&mut notice.values);
        let waited = self.synchronise()?;
        for rank in 0..self.size() {
            let other = self.call(rank);
            if !call.same(other) {
                return Err(Error::internal(format!(
                    "the ranks are out of step: rank {} called {} of {} values (root {}), rank {} {} of {} values (root {})",
                    self.names[rank],
                    other.operation.words().name,
                    other.len,
                    other.root,
                    self.names[self.rank],
                    call.operation.words().name,
                    call.len,
                    call.root
                )));
            }
        }
        Ok(waited)
    }

    /// What `rank` announced at the last synchronisation point, which was an `agree`.
    pub fn call(&self, rank: usize) -> Call {
        self.notice(rank).call
    }
    /// The values that `rank` put into its notice there.
    pub fn values(&self, rank: usize) -> &[f32; SHORT] {
        &self.notice(rank).values
    }

    /// Returns when all ranks have reached this point; gives the time waited.
    pub fn synchronise(&mut self) -> Result<Duration> {
        self.reached = self.reached.wrapping_add(1);
        let mine = self.state(self.rank);
        // Before this, all that was written; after it, the look at the sleepers (who count themselves first).
        mine.reached.store(self.reached, SeqCst);
        if mine.sleepers.load(SeqCst) > 0 {
            wake(mine);
        }
        let mut others = (1..self.size()).map(|distance| (self.rank + distance) % self.size());
        let Some(first) = others.find(|&rank| !self.has_come(rank)) else { return Ok(Duration::ZERO) };
        let start = Instant::now();
        let mut spins = self.spins;
        for rank in std::iter::once(first).chain(others) {
            while !self.has_come(rank) {
                if spins == 0 {
                    self.sleep_until(rank)?;
                    break;
                }
                spins -= 1;
                std::hint::spin_loop();
            }
        }
        Ok(start.elapsed())
    }

    fn sleep_until(&self, rank: usize) -> Result<()> {
        let state = self.state(rank);
        let poll = |limit: Duration| {
            let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
            state.sleepers.fetch_add(1, SeqCst);
            let seen = state.reached.load(SeqCst);
            if !self.has_reached(seen) && state.gone.load(SeqCst) == 0 {
                // However it ends (woken, changed meanwhile, timed out, interrupted), the counter is looked at again.
                let _ = futex::wait(&state.reached, futex::Flags::empty(), seen, Some(&limit));
            }
            state.sleepers.fetch_sub(1, SeqCst);
            let gone = state.gone.load(SeqCst) != 0;
            match self.has_come(rank) {
                false if gone => {
                    Err(Error::peer_lost(format!("rank {} has left; its own message says why", self.names[rank])))
                }
                come => Ok(come),
            }
        };
        self.health.wait(self.waiting, poll).map(drop).map_err(|error| match self.health.check() {
            // The watch has its own, better account.
            Err(_) => error,
            Ok(()) => {
                let missing = (0..self.size()).filter(|&rank| !self.has_come(rank)).map(|rank| self.names[rank]);
                let missing: Vec<usize> = missing.collect();
                error.context(format!("ranks {missing:?} have not come"))
            }
        })
    }

    fn has_come(&self, rank: usize) -> bool {
        self.has_reached(self.state(rank).reached.load(Acquire))
    }
    fn has_reached(&self, reached: u32) -> bool {
        reached.wrapping_sub(self.reached) as i32 >= 0
    }

    fn notice(&self, rank: usize) -> &Notice {
        // SAFETY: `rank` has reached this point, and does not write this notice again before this rank has moved on.
        unsafe { &(*self.lines(rank)).notices[self.reached as usize % 2] }
    }
    fn state(&self, rank: usize) -> &State {
        // SAFETY: mapped as long as `self` lives, zeroed at first, and all its fields are atomic.
        unsafe { &(*self.lines(rank)).state }
    }
    fn lines(&self, rank: usize) -> *mut Lines {
        self.boards[rank].address() as *mut Lines
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        let mine = self.state(self.rank);
        mine.gone.store(1, SeqCst);
        wake(mine);
    }
}

fn wake(state: &State) {
    let _ = futex::wake(&state.reached, futex::Flags::empty(), i32::MAX as u32);
}

/// A rank that spins on a core keeps the rank for which it waits from running there.
fn spins(cores: usize, ranks: usize) -> u32 {
    if cores >= ranks { SPINS } else { 0 }
}

/// Cores that the ranks have together: those on which at least one of them may run, or what their control group allows.
/// Collective.
fn cores(control: &mut Control) -> Result<usize> {
    const BYTES: usize = rustix::thread::CpuSet::MAX_CPU / 8;
    let mut mine = [0u8; BYTES];
    if let Ok(set) = rustix::thread::sched_getaffinity(None) {
        for core in (0..BYTES * 8).filter(|&core| set.is_set(core)) {
            mine[core / 8] |= 1 << (core % 8);
        }
    }
    let all = control.all_gather(&mine)?;
    let count = |bytes: &mut dyn Iterator<Item = u8>| bytes.map(|byte| byte.count_ones() as usize).sum::<usize>();
    let union = |byte: usize| all.iter().fold(0, |bits, mask| bits | mask.get(byte).copied().unwrap_or(0));
    let (together, own) = (count(&mut (0..BYTES).map(union)), count(&mut mine.into_iter()));
    // Less than this rank's own cores: a quota, which counts for all ranks. Not less: the rank may be bound to a few cores,
    // and others to others.
    let available = std::thread::available_parallelism().map_or(own, usize::from);
    Ok(if available < own { available.min(together) } else { together })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

    /// What the boards of ranks would spin, each rank a thread that is bound to one of `cores`.
    fn spins_of_ranks_on(cores: &[usize]) -> Vec<u32> {
        let rank = |(mut control, &core): (Control, &usize)| {
            std::thread::spawn(move || {
                let mut set = CpuSet::new();
                set.set(core);
                sched_setaffinity(None, &set).unwrap();
                let names = (0..control.size()).collect();
                Board::new(&mut control, names, Health::new(Duration::from_secs(60))).unwrap().spins
            })
        };
        let threads: Vec<_> = Control::local(cores.len()).unwrap().into_iter().zip(cores).map(rank).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    }

    #[test]
    fn nothing_spins_where_ranks_outnumber_cores() {
        assert_eq!((spins(2, 8), spins(2, 2), spins(8, 2)), (0, SPINS, SPINS));

        let set = sched_getaffinity(None).unwrap();
        let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect();
        assert_eq!(spins_of_ranks_on(&[cores[0]; 3]), [0; 3]);
        if let [first, second, ..] = cores[..] {
            assert_eq!(spins_of_ranks_on(&[first, second]), [SPINS; 2]);
            assert_eq!(spins_of_ranks_on(&[first, second, first]), [0; 3]);
        }
    }
}
