//! Exact checks of a communicator's operations: index-dependent integers, in and outside of arenas, and real values against
//! a serial pairwise tree.

use lockstep::comm::{Communicator, chunk, split};
use lockstep::device::{Arena, SliceMut};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// Every operation, at all lengths and places. Collective.
pub fn check_all(comm: &mut dyn Communicator) {
    let size = comm.size();
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
                check(comm, &arena, operation, place, len, integer);
            }
        }
        comm.barrier().unwrap();
        for in_arena in [true, false] {
            check_reduce_update(comm, (&arena, &replica), in_arena, len);
        }
    }
}

/// That sums have the bits of the pairwise tree. Collective.
pub fn check_order(comm: &mut dyn Communicator) {
    let arena = comm.allocate(4 * (70_001 + 8)).unwrap();
    for len in [5, 1000, 70_001] {
        for place in [Where::Arena, Where::Heap] {
            check(comm, &arena, Operation::AllReduce, place, len, real);
            check(comm, &arena, Operation::ReduceScatter, place, len, real);
        }
    }
}

/// Lengths around everything that a transport treats differently: nothing, less than a value a rank, cache lines, short
/// messages, staging pieces.
fn lengths(size: usize) -> Vec<usize> {
    // This one takes three staging pieces of shared memory; for two ranks another, three of a connection.
    let mut lengths = vec![0, 1, size - 1, size, size + 1, 17, 16 * size + 1, 1023, 1024, 1025, 4099, 140_001];
    lengths.extend((size == 2).then_some(600_001));
    lengths.dedup();
    lengths
}

#[derive(Clone, Copy, Debug)]
pub enum Operation {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast { root: usize },
}

/// Where a rank's data lies.
#[derive(Clone, Copy, Debug)]
pub enum Where {
    Arena,
    /// An arena, from a value that begins no cache line.
    Unaligned,
    Heap,
    /// Arenas on even ranks, the heap on odd ones.
    Mixed,
}

/// Small integers: every partial sum is exact, so the result does not depend on the order.
pub fn integer(rank: usize, index: usize, salt: usize) -> f32 {
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
pub fn check_reduce_update(
    comm: &mut dyn Communicator,
    (arena, replica): (&Arena, &Arena),
    in_arena: bool,
    len: usize,
) {
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
pub fn check(
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
