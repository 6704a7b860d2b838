use super::*;
use std::collections::VecDeque;
use std::sync::{Arc, Barrier, Condvar, Mutex};

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
    fn send(&mut self, peer: usize, bytes: &[u8], _: bool) -> Result<usize> {
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

/// Runs one operation on all ranks; gives every rank's data and the bytes it sent. `keys` say who shares a host: there the
/// ranks arrive and leave together, as in `Cluster`.
fn run(keys: &[usize], operation: Operation, root: usize, len: usize) -> Vec<(Vec<f32>, usize)> {
    let size = keys.len();
    let empty = || vec![VecDeque::new(); size];
    let bytes = Mutex::new((0..size).map(|_| empty()).collect());
    let streams = Arc::new(Streams { bytes, changed: Condvar::new() });
    let hosts = Hosts::new(keys);
    let meetings: Vec<Barrier> = (0..hosts.count()).map(|host| Barrier::new(hosts.members(host).len())).collect();
    let mut data: Vec<Vec<f32>> = (0..size).map(|rank| (0..len).map(|index| value(rank, index)).collect()).collect();
    let addresses: Vec<usize> = data.iter_mut().map(|data| data.as_mut_ptr() as usize).collect();
    let sent: Vec<usize> = std::thread::scope(|scope| {
        let rank = |rank: usize| {
            let mut mesh = Reluctant { rank, size, streams: streams.clone(), calls: 0, sent: 0 };
            let (hosts, meeting) = (hosts.clone(), &meetings[hosts.of(rank)]);
            let data: Vec<usize> = hosts.members(hosts.of(rank)).iter().map(|&rank| addresses[rank]).collect();
            scope.spawn(move || {
                meeting.wait();
                let job = Job { operation, root, len, data: &data, update: None };
                // SAFETY: the vectors outlive the threads, which do with them what the schedule says.
                unsafe { Ring::new(rank, hosts).run(&mut mesh, &job) }.unwrap();
                meeting.wait();
                mesh.sent
            })
        };
        let threads: Vec<_> = (0..size).map(rank).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    data.into_iter().zip(sent).collect()
}

fn value(rank: usize, index: usize) -> f32 {
    ((index * 31 + rank * 977) % 4093) as f32
}

/// Equal hosts, hosts that are no subtrees, unequal ones, ranks dealt out in turn.
const LAYOUTS: [&[usize]; 7] =
    [&[0, 1], &[0, 1, 2], &[0, 1, 2, 3], &[0, 0, 1, 1], &[0, 0, 1, 1, 2, 2], &[0, 0, 0, 1], &[0, 1, 0, 1, 1]];

#[test]
fn partial_sends_and_receives_come_together() {
    for keys in LAYOUTS {
        let size = keys.len();
        // The longest has more pieces a chunk than fit the window: a fast peer has to wait for the slow one.
        for len in [0, 5, 16 * size, size * (WINDOW + 3) * PIECE + 7] {
            let sum = |index| (0..size).map(|rank| value(rank, index)).sum::<f32>();
            for (rank, (data, _)) in run(keys, Operation::AllReduce, 0, len).iter().enumerate() {
                let wrong = data.iter().enumerate().position(|(index, found)| *found != sum(index));
                assert_eq!(wrong, None, "{keys:?}, rank {rank}, {len} values");
            }
            for (rank, (data, _)) in run(keys, Operation::Broadcast, size - 1, len).iter().enumerate() {
                let wrong = data.iter().enumerate().position(|(index, found)| *found != value(size - 1, index));
                assert_eq!(wrong, None, "{keys:?}, rank {rank}, {len} values");
            }
            for (rank, (data, _)) in run(keys, Operation::AllGather, 0, len).iter().enumerate() {
                for owner in 0..size {
                    let wrong = chunk(len, size, owner).find(|&index| data[index] != value(owner, index));
                    assert_eq!(wrong, None, "{keys:?}, rank {rank}, {len} values");
                }
            }
        }
    }
}

#[test]
fn the_bytes_are_the_rings() {
    for keys in LAYOUTS {
        let (hosts, len) = (Hosts::new(keys), keys.len() * 16 * 1000);
        let results = run(keys, Operation::AllReduce, 0, len);
        for host in 0..hosts.count() {
            let share = |ranks: usize| VALUE * len * ranks / keys.len();
            let own = hosts.members(host).len();
            // Its subtrees' terms for the others' chunks, and the results of its own to each other host.
            let payload = share(hosts.size() - own) * hosts.subtrees(host).len() + share(own) * (hosts.count() - 1);
            let sent: usize = hosts.members(host).iter().map(|&rank| results[rank].1).sum();
            assert!(sent >= payload && sent < payload + 2000, "{keys:?}: {sent} bytes instead of {payload}");
        }
    }
    // With M hosts of equal powers of two: 2 (M - 1) / M of the buffer for each.
    let sent: usize = run(&[0, 0, 1, 1], Operation::AllReduce, 0, 64_000)[..2].iter().map(|(_, sent)| sent).sum();
    assert!((VALUE * 64_000..VALUE * 64_000 + 500).contains(&sent), "{sent}");
}

#[test]
fn a_broadcast_costs_its_root_no_more_than_an_all_reduce() {
    let (size, len) = (4, 64_000);
    for (_, sent) in run(&[0, 1, 2, 3], Operation::Broadcast, 2, len) {
        assert!(sent <= 2 * (size - 1) * VALUE * len / size + 500, "{sent}");
    }
}
