//! One check for every transport: the same operations over 1 to 8 ranks and awkward lengths, with exact,
//! index-dependent integers, in and outside of arenas, and with real values against a serial pairwise tree. Ranks are
//! threads here: shared memory, futexes and sockets do not mind.

use lockstep::comm::hosts::Hosts;
use lockstep::comm::{Communicator, chunk, connect, connect_hosts, split};
use lockstep::config::raw::{Parallel, TransportChoice};
use lockstep::device::{Arena, Slice, SliceMut};
use lockstep::error::{Error, Kind};
use lockstep::launch::rendezvous::Control;
use lockstep::launch::watch::Health;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
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

/// Lengths around everything that a transport treats differently: nothing, less than a value a rank, cache lines, short
/// messages, staging pieces.
fn lengths(size: usize) -> Vec<usize> {
    // The longest takes three staging pieces.
    let mut lengths = vec![0, 1, size - 1, size, size + 1, 17, 16 * size + 1, 1023, 1024, 1025, 4099, 140_001];
    lengths.dedup();
    lengths
}

#[derive(Clone, Copy, Debug)]
enum Operation {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast { root: usize },
}

/// Where a rank's data lies.
#[derive(Clone, Copy, Debug)]
enum Where {
    Arena,
    /// An arena, from a value that begins no cache line.
    Unaligned,
    Heap,
    /// Arenas on even ranks, the heap on odd ones.
    Mixed,
}

/// Small integers: every partial sum is exact, so the result does not depend on the order.
fn integer(rank: usize, index: usize, salt: usize) -> f32 {
    ((index * 7 + rank * 131 + salt * 29) % 1009) as f32
}

/// Values whose sum depends on the order of addition.
fn real(rank: usize, index: usize, salt: usize) -> f32 {
    let x = ((index * 7919 + rank * 104_729 + salt) as f32 * 0.618_034).sin();
    x * 10f32.powi((rank * 3 + index) as i32 % 7 - 3)
}

/// The order of addition that all transports promise, one value at a time.
fn serial_tree(values: &[f32]) -> f32 {
    match values {
        [one] => *one,
        _ => {
            let (left, right) = values.split_at(split(values.len()));
            serial_tree(left) + serial_tree(right)
        }
    }
}

/// `reduce_update` where the terms are in an arena and the values in replicated memory, and where both are on the heap: every
/// value becomes itself doubled plus the sum over ranks, each once, and all ranks have all.
fn check_reduce_update(comm: &mut dyn Communicator, (arena, replica): (&Arena, &Arena), in_arena: bool, len: usize) {
    let (rank, size) = (comm.rank(), comm.size());
    let salt = len + size;
    let (mut heap, mut heap_values) = (vec![0.0; len], vec![0.0; len]);
    // SAFETY: between operations this rank's arena is its own, and so is its chunk of the replicated memory.
    let (mut terms, mut values) = match in_arena {
        true => unsafe { (arena.slice_mut(0..4 * len), replica.slice_mut(0..4 * len)) },
        false => (SliceMut::from(&mut heap[..]), SliceMut::from(&mut heap_values[..])),
    };
    terms.f32().iter_mut().enumerate().for_each(|(index, x)| *x = integer(rank, index, salt));
    for index in chunk(len, size, rank) {
        values.f32()[index] = integer(0, index, salt + 1);
    }
    let updated = AtomicUsize::new(0);
    comm.reduce_update(terms, values.reborrow(), &|range, sums, values| {
        assert!(range.len() == sums.len() && range.len() == values.len());
        updated.fetch_add(range.len(), SeqCst);
        values.iter_mut().zip(sums).for_each(|(value, sum)| *value = 2.0 * *value + *sum);
    })
    .unwrap();
    assert_eq!(updated.load(SeqCst), chunk(len, size, rank).len());
    for (index, found) in values.f32().iter().enumerate() {
        let sum: f32 = (0..size).map(|rank| integer(rank, index, salt)).sum();
        let expected = 2.0 * integer(0, index, salt + 1) + sum;
        assert!(
            *found == expected,
            "{}, rank {rank} of {size}, value {index} of {len}: {found}, expected {expected}",
            comm.transport()
        );
    }
    // Nobody changes the one copy while someone still reads it.
    comm.barrier().unwrap();
}

/// Fills, runs one operation and compares every value that it defines, and that nothing beside the data was touched.
fn check(
    comm: &mut dyn Communicator,
    arena: &Arena,
    operation: Operation,
    place: Where,
    len: usize,
    value: fn(usize, usize, usize) -> f32,
) {
    const GUARD: f32 = -77.25;
    let (rank, size) = (comm.rank(), comm.size());
    let salt = len + size;
    let mut heap = vec![GUARD; len + 8];
    let (start, buffer) = match place {
        Where::Heap => (1, SliceMut::from(&mut heap[..])),
        Where::Mixed if rank % 2 == 1 => (1, SliceMut::from(&mut heap[..])),
        // SAFETY: this rank's arena is used by nobody else between operations.
        Where::Unaligned => (3, unsafe { arena.slice_mut(0..4 * (len + 8)) }),
        _ => (0, unsafe { arena.slice_mut(0..4 * (len + 8)) }),
    };
    let buffer = buffer.into_f32();
    buffer.fill(GUARD);
    let data = start..start + len;
    buffer[data.clone()].iter_mut().enumerate().for_each(|(index, x)| *x = value(rank, index, salt));

    let slice = SliceMut::from(&mut buffer[data.clone()]);
    match operation {
        Operation::AllReduce => comm.all_reduce(slice),
        Operation::ReduceScatter => comm.reduce_scatter(slice),
        Operation::AllGather => comm.all_gather(slice),
        Operation::Broadcast { root } => comm.broadcast(slice, root),
    }
    .unwrap();

    let chunks: Vec<_> = (0..size).map(|rank| chunk(len, size, rank)).collect();
    let owner = |index| chunks.iter().position(|chunk| chunk.contains(&index)).unwrap();
    let mut values = vec![0.0; size];
    let mut sum = |index| {
        values.iter_mut().enumerate().for_each(|(rank, x)| *x = value(rank, index, salt));
        serial_tree(&values)
    };
    let mine = chunks[rank].clone();
    for (index, found) in buffer[data.clone()].iter().enumerate() {
        let expected = match operation {
            Operation::AllReduce => sum(index),
            Operation::ReduceScatter if mine.contains(&index) => sum(index),
            Operation::ReduceScatter => continue,
            Operation::AllGather => value(owner(index), index, salt),
            Operation::Broadcast { root } => value(root, index, salt),
        };
        assert!(
            found.to_bits() == expected.to_bits(),
            "{} {operation:?} {place:?}, rank {rank} of {size}, value {index} of {len}: {found}, expected {expected}",
            comm.transport()
        );
    }
    let guards = buffer[..data.start].iter().chain(&buffer[data.end..]);
    assert!(guards.into_iter().all(|guard| *guard == GUARD), "{operation:?} {place:?} {len}: wrote outside the data");
}

#[test]
fn every_operation_is_exact_for_1_to_8_ranks_and_all_lengths() {
    for transport in TRANSPORTS {
        for size in 1..=8 {
            world(transport, size, move |mut comm| {
                let longest = lengths(size).into_iter().max().unwrap();
                let arena = comm.allocate(4 * (longest + 8)).unwrap();
                let replica = comm.allocate_replicated(4 * longest).unwrap();
                let operations = [
                    Operation::AllReduce,
                    Operation::ReduceScatter,
                    Operation::AllGather,
                    Operation::Broadcast { root: 0 },
                    Operation::Broadcast { root: size - 1 },
                ];
                for len in lengths(size) {
                    for operation in operations {
                        for place in [Where::Arena, Where::Unaligned, Where::Heap, Where::Mixed] {
                            check(&mut *comm, &arena, operation, place, len, integer);
                        }
                    }
                    comm.barrier().unwrap();
                    for in_arena in [true, false] {
                        check_reduce_update(&mut *comm, (&arena, &replica), in_arena, len);
                    }
                }
            });
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
            world(transport, size, move |mut comm| {
                let arena = comm.allocate(4 * (70_001 + 8)).unwrap();
                for len in [5, 1000, 70_001] {
                    for place in [Where::Arena, Where::Heap] {
                        check(&mut *comm, &arena, Operation::AllReduce, place, len, real);
                        check(&mut *comm, &arena, Operation::ReduceScatter, place, len, real);
                    }
                }
            });
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
