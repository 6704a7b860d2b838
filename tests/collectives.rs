//! One check for every transport: the same operations over 1 to 8 ranks and awkward lengths, with exact,
//! index-dependent integers, in and outside of arenas, and with real values against a serial pairwise tree. Ranks are
//! threads here: shared memory, futexes and sockets do not mind.

#[path = "common/exact.rs"]
mod exact;

use exact::{Operation, Where, check, check_all, check_order, check_reduce_update, integer};
use lockstep::comm::hosts::Hosts;
use lockstep::comm::{Communicator, chunk, connect, connect_hosts};
use lockstep::config::raw::{Parallel, TransportChoice};
use lockstep::device::{Slice, SliceMut};
use lockstep::error::{Error, Kind};
use lockstep::launch::rendezvous::Control;
use lockstep::launch::watch::Health;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

const TRANSPORTS: [Transport; 4] = [Transport::Shm, Transport::Tcp, Transport::Pairs, Transport::InTurn];

#[derive(Clone, Copy, Debug)]
enum Transport {
    Shm,
    Tcp,
    /// Hosts of two ranks: shared memory inside, tcp between. Three of them are no subtrees.
    Pairs,
    /// Two hosts to which the ranks are dealt in turn.
    InTurn,
}

impl Transport {
    fn connect(self, control: Control, health: Arc<Health>) -> lockstep::error::Result<Box<dyn Communicator>> {
        let keys = |key: fn(usize) -> usize| Hosts::new(&(0..control.size()).map(key).collect::<Vec<_>>());
        match self {
            Transport::Shm => connect(&Parallel::over(TransportChoice::Shm), control, health),
            Transport::Tcp => connect(&Parallel::over(TransportChoice::Tcp), control, health),
            Transport::Pairs => connect_hosts(keys(|rank| rank / 2), control, health),
            Transport::InTurn => connect_hosts(keys(|rank| rank % 2), control, health),
        }
    }
}

/// Long enough for a machine that is busy with something else; a hang becomes a failure, not a stuck test.
const WATCHDOG: Duration = Duration::from_secs(120);

/// Runs `rank` on `size` connected ranks and gives what they return, by rank.
fn world<T: Send + 'static>(
    transport: Transport,
    size: usize,
    rank: impl Fn(Box<dyn Communicator>) -> T + Send + Sync + Copy + 'static,
) -> Vec<T> {
    let (done, results) = mpsc::channel();
    for (number, control) in Control::local(size).unwrap().into_iter().enumerate() {
        let done = done.clone();
        thread::spawn(move || {
            let comm = transport.connect(control, Health::new(WATCHDOG)).unwrap();
            done.send((number, rank(comm))).unwrap();
        });
    }
    drop(done);
    let mut all: Vec<(usize, T)> = (0..size)
        .map(|_| results.recv_timeout(WATCHDOG).unwrap_or_else(|error| panic!("{transport:?}, {size} ranks: {error}")))
        .collect();
    all.sort_by_key(|(number, _)| *number);
    all.into_iter().map(|(_, result)| result).collect()
}

#[test]
fn every_operation_is_exact_for_1_to_8_ranks_and_all_lengths() {
    for transport in TRANSPORTS {
        for size in 1..=8 {
            world(transport, size, |mut comm| check_all(&mut *comm));
        }
    }
}

/// A whole team of threads works on a rank's share: every piece once, whoever takes it.
#[test]
fn a_team_shares_an_update() {
    world(Transport::Shm, 2, |mut comm| {
        const LEN: usize = 1_000_003;
        let arena = comm.allocate(4 * LEN).unwrap();
        let replica = comm.allocate_replicated(4 * LEN).unwrap();
        let team = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        team.install(|| check_reduce_update(&mut *comm, (&arena, &replica), true, LEN));
    });
}

/// What one rank writes into replicated memory and broadcasts, and what each writes into its chunk and gathers, all read.
#[test]
fn replicated_memory_is_the_same_on_all_ranks() {
    for transport in TRANSPORTS {
        for (size, len) in [(1, 100), (2, 100), (3, 70_001)] {
            world(transport, size, move |mut comm| {
                let replica = comm.allocate_replicated(4 * len).unwrap();
                let rank = comm.rank();
                // SAFETY: rank 0 writes before the broadcast, everyone its own chunk after the barrier.
                let values = || unsafe { replica.slice_mut(0..4 * len) };
                assert!(values().f32().iter().all(|value| *value == 0.0));
                comm.barrier().unwrap();
                if rank == 0 {
                    values().f32().iter_mut().enumerate().for_each(|(index, x)| *x = integer(0, index, 1));
                }
                comm.broadcast(values(), 0).unwrap();
                assert!(values().f32().iter().enumerate().all(|(index, x)| *x == integer(0, index, 1)));
                comm.barrier().unwrap();
                for index in chunk(len, size, rank) {
                    values().f32()[index] = integer(rank, index, 2);
                }
                comm.all_gather(values()).unwrap();
                for owner in 0..size {
                    let right = |index: usize| values().f32()[index] == integer(owner, index, 2);
                    assert!(chunk(len, size, owner).all(right), "{transport:?}, chunk {owner} on rank {rank}");
                }
            });
        }
    }
}

#[test]
fn sums_have_the_bits_of_the_serial_pairwise_tree() {
    for transport in TRANSPORTS {
        for size in 2..=8 {
            world(transport, size, |mut comm| check_order(&mut *comm));
        }
    }
}

/// Many operations of changing length without anything between them: a notice, a buffer or a byte of the operation
/// before must never be taken for one of this.
#[test]
fn operations_back_to_back_do_not_mix() {
    for transport in TRANSPORTS {
        world(transport, 3, |mut comm| {
            let arena = comm.allocate(4 * 100_008).unwrap();
            for round in 0..60 {
                let len = [3, 40_000, 1, 0, 1500, 99_999][round % 6];
                check(&mut *comm, &arena, Operation::AllReduce, Where::Arena, len, integer);
                check(&mut *comm, &arena, Operation::Broadcast { root: round % 3 }, Where::Heap, len, integer);
            }
        });
    }
}

/// Every rank in turn comes late to a barrier; behind it, all must see what the late one did before it.
#[test]
fn a_barrier_waits_for_every_rank() {
    for transport in TRANSPORTS {
        for size in [2, 3, 8] {
            let flags: &'static [AtomicBool] = Box::leak((0..size).map(|_| AtomicBool::new(false)).collect());
            let early: Vec<Vec<usize>> = world(transport, size, move |mut comm| {
                let mut passed_before = |late: usize| {
                    if comm.rank() == late {
                        thread::sleep(Duration::from_millis(50));
                        flags[late].store(true, SeqCst);
                    }
                    comm.barrier().unwrap();
                    !flags[late].load(SeqCst)
                };
                (0..size).filter(|late| passed_before(*late)).collect()
            });
            for (rank, early) in early.iter().enumerate() {
                assert!(early.is_empty(), "{transport:?}: rank {rank} of {size} did not wait for ranks {early:?}");
            }
        }
    }
}

#[test]
fn memory_of_an_arena_is_zeroed_and_aligned_and_outlives_its_communicator() {
    for transport in TRANSPORTS {
        world(transport, 2, |mut comm| {
            assert_eq!(comm.allocate_replicated(100).unwrap().bytes(), 100);
            let arenas = [comm.allocate(0).unwrap(), comm.allocate(100).unwrap(), comm.allocate(10_000).unwrap()];
            drop(comm);
            for (arena, bytes) in arenas.iter().zip([0, 100, 10_000]) {
                // SAFETY: nobody else uses it.
                let slice: Slice<'_> = unsafe { arena.slice(0..bytes) };
                assert!(slice.u8().iter().all(|byte| *byte == 0));
                assert_eq!((arena.bytes(), arena.address() % 64), (bytes, 0));
            }
        });
    }
}

/// Rank `size - 1` leaves in the middle, others are in the operation it does not come to.
#[test]
fn a_rank_that_leaves_ends_the_others_with_peer_lost() {
    for transport in TRANSPORTS {
        for (size, len) in [(2, 1), (3, 100_000), (4, 5000)] {
            let errors: Vec<Option<Error>> = world(transport, size, move |mut comm| {
                let mut data = vec![1.0; len];
                comm.all_reduce(SliceMut::from(&mut data[..])).unwrap();
                if comm.rank() == comm.size() - 1 {
                    return None;
                }
                comm.all_reduce(SliceMut::from(&mut data[..])).err()
            });
            for (rank, error) in errors.iter().enumerate().take(size - 1) {
                let error = error.as_ref().unwrap_or_else(|| panic!("{transport:?}: rank {rank} noticed nothing"));
                assert_eq!(error.kind(), Kind::PeerLost, "{error}");
                assert!(error.to_string().contains("rank"), "{error}");
            }
        }
    }
}

#[test]
fn a_failure_reported_by_the_watch_ends_a_wait() {
    for transport in TRANSPORTS {
        let [first, second] = Control::local(2).unwrap().try_into().unwrap();
        let health = Health::new(WATCHDOG);
        let (failing, other) = (health.clone(), Health::new(WATCHDOG));
        let idle = thread::spawn(move || transport.connect(second, other).unwrap());
        let waiting = thread::spawn(move || transport.connect(first, health).unwrap().barrier());
        let idle = idle.join().unwrap();
        failing.fail(Error::peer_lost("rank 1 (host a, pid 7) was killed"));
        let error = waiting.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("was killed"), "{error}");
        drop(idle);
    }
}

#[test]
fn ranks_that_are_out_of_step_are_told_so() {
    for transport in TRANSPORTS {
        for (len, other) in [(10, 11), (10, 100_000), (100_000, 100_001)] {
            let errors = world(transport, 2, move |mut comm| {
                let mut data = vec![0.0; if comm.rank() == 0 { len } else { other }];
                comm.all_reduce(SliceMut::from(&mut data[..])).unwrap_err()
            });
            let told = errors.iter().filter(|error| error.to_string().contains("out of step")).count();
            assert!(told >= 1, "{transport:?}: {errors:?}");
        }
    }
}
