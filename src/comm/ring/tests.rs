use super::*;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};

/// Streams in memory that take and give a few bytes at a time, and often none.
struct Streams {
    /// By sender, then receiver.
    bytes: Mutex<Vec<Vec<VecDeque<u8>>>>,
    changed: Condvar,
}

struct Reluctant {
    rank: usize,
    size: usize,
    streams: Arc<Streams>,
    calls: usize,
    sent: usize,
}

/// A stream holds no more than this.
const CAPACITY: usize = 100_000;

impl Reluctant {
    /// How much the next call moves at most: 0 often, sometimes a part of a value. The last rank is much slower than the
    /// others, so that these run into the end of the window (11 shares no factor with the calls of a round).
    fn mood(&mut self) -> usize {
        self.calls += 1;
        if self.rank == self.size - 1 && !self.calls.is_multiple_of(11) {
            return 0;
        }
        [0, 3, 40_960, 0, 50_000, 17, 150_001][(self.calls + self.rank) % 7]
    }
}

impl Mesh for Reluctant {
    fn rank(&self) -> usize {
        self.rank
    }
    fn size(&self) -> usize {
        self.size
    }
    fn send(&mut self, peer: usize, bytes: &[u8]) -> Result<usize> {
        let mood = self.mood();
        let stream = &mut self.streams.bytes.lock().unwrap()[self.rank][peer];
        let count = mood.min(bytes.len()).min(CAPACITY - stream.len());
        stream.extend(&bytes[..count]);
        self.sent += count;
        self.streams.changed.notify_all();
        Ok(count)
    }
    fn receive(&mut self, peer: usize, buffer: &mut [u8]) -> Result<usize> {
        let mood = self.mood();
        let stream = &mut self.streams.bytes.lock().unwrap()[peer][self.rank];
        let count = mood.min(buffer.len()).min(stream.len());
        buffer.iter_mut().zip(stream.drain(..count)).for_each(|(to, from)| *to = from);
        self.streams.changed.notify_all();
        Ok(count)
    }
    fn wait(&mut self, _: &str, _: usize) -> Result<()> {
        // A mood may have said no where a stream would not have: the next try comes after a moment in any case.
        let bytes = self.streams.bytes.lock().unwrap();
        drop(self.streams.changed.wait_timeout(bytes, Duration::from_micros(50)).unwrap());
        Ok(())
    }
}

/// Runs one operation on all ranks; gives every rank's data and the bytes it sent.
fn run(size: usize, operation: Operation, len: usize) -> Vec<(Vec<f32>, usize)> {
    let empty = || vec![VecDeque::new(); size];
    let bytes = Mutex::new((0..size).map(|_| empty()).collect());
    let streams = Arc::new(Streams { bytes, changed: Condvar::new() });
    std::thread::scope(|scope| {
        let rank = |rank: usize| {
            let mut mesh = Reluctant { rank, size, streams: streams.clone(), calls: 0, sent: 0 };
            scope.spawn(move || {
                let mut data: Vec<f32> = (0..len).map(|index| value(rank, index)).collect();
                Ring::new(size).run(&mut mesh, operation, &mut data).unwrap();
                (data, mesh.sent)
            })
        };
        let threads: Vec<_> = (0..size).map(rank).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn value(rank: usize, index: usize) -> f32 {
    ((index * 31 + rank * 977) % 4093) as f32
}

#[test]
fn partial_sends_and_receives_come_together_and_the_bytes_are_the_rings() {
    for size in [2, 3, 4] {
        // The longest has more pieces a chunk than fit the window: a fast peer has to wait for the slow one.
        for len in [0, 5, 16 * size, size * (WINDOW + 3) * PIECE + 7] {
            let results = run(size, Operation::AllReduce, len);
            for (rank, (data, sent)) in results.iter().enumerate() {
                for (index, found) in data.iter().enumerate() {
                    let expected: f32 = (0..size).map(|rank| value(rank, index)).sum();
                    assert_eq!(*found, expected, "{size} ranks, value {index} of {len}");
                }
                // Headers, the others' chunks, and its own to each of them.
                let own = chunk(len, size, rank).len();
                assert_eq!(*sent, (size - 1) * HEADER + VALUE * (len - own + (size - 1) * own));
            }
        }
    }
}

#[test]
fn a_broadcast_costs_its_root_no_more_than_an_all_reduce() {
    let (size, len) = (4, 64_000);
    for (data, sent) in run(size, Operation::Broadcast { root: 2 }, len) {
        assert!(data.iter().enumerate().all(|(index, found)| *found == value(2, index)));
        assert!(sent <= 2 * (size - 1) * VALUE * len / size + (size - 1) * HEADER, "{sent}");
    }
}
