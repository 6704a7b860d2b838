//! The ring schedule: reduce-scatter, then all-gather, over any point-to-point connections.
//!
//! A buffer of S bytes is cut into N chunks; rank r owns chunk r. In step d of the reduce-scatter rank r sends chunk
//! r + d, as it is, to its owner, rank r + d: after N - 1 steps every owner has N versions of its chunk and adds them in
//! the order of the pairwise tree. In step d of the all-gather it sends the sum to rank r + d. Bytes that a rank sends,
//! and receives: (N - 1) S / N for each half, 2 (N - 1) / N S together, which is the least for an all-reduce
//! (Patarasuk and Yuan 2009) and what the classic ring sends.
//!
//! The classic ring sends to its neighbour only and adds as the partial sum comes by, which fixes the order
//! ((x_r + x_r+1) + x_r+2) + ..., another one for every chunk, another one for every N. To get the tree's order out of it, a
//! rank would have to pass on every partial sum that cannot be joined yet: for the tree (x0 + x1) + (x2 + x3) a chunk that
//! starts in the middle of a pair travels as two partial sums on one hop of the way, 1.25 times the bytes at N = 4, and more
//! with larger N. Sending straight to the owner costs more connections and no byte.
//!
//! All steps run at once, each connection at its own pace: a connection carries, in order, a header that names the
//! operation, the contributions to the peer's chunk, and the sums of this rank's chunk. Contributions depend on nothing;
//! an owner adds a piece as soon as all versions of it are there, and sends the sum on. An owner keeps `WINDOW` pieces of
//! a fast peer and then leaves it to wait; the slow one's contributions do not depend on that, so all come through.
//! Nothing blocks except `Mesh::wait`, with every connection open in both directions, so no length can deadlock.
//!
//! A broadcast is the same with one contributor, 2 (N - 1) / N S sent by the root; an all-gather is the second half.

use super::{Words, chunk, sum, words};
use crate::error::{Error, Result};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Values that are sent, received and added at once: 128 KiB, a few of which fit a core's second-level cache.
const PIECE: usize = 32 << 10;
/// Pieces of one peer that wait for the others'.
const WINDOW: usize = 4;
const VALUE: usize = size_of::<f32>();

/// Connections to all other ranks that never block: a stream of bytes each way.
pub trait Mesh {
    fn rank(&self) -> usize;
    fn size(&self) -> usize;
    /// Takes as many of `bytes` as go now, perhaps none.
    fn send(&mut self, peer: usize, bytes: &[u8]) -> Result<usize>;
    /// Gives as many bytes as are there, perhaps none.
    fn receive(&mut self, peer: usize, buffer: &mut [u8]) -> Result<usize>;
    /// Returns when some connection may have become ready since it last said no. `peer` is one that is waited for, `what`
    /// what this rank is doing meanwhile.
    fn wait(&mut self, what: &str, peer: usize) -> Result<()>;
    /// Returns when all that was sent reaches its peers without this rank's help.
    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast { root: usize },
    Barrier,
}

impl Operation {
    /// The ranks whose values are added.
    fn contributors(self, owner: usize, size: usize) -> Range<usize> {
        match self {
            Operation::AllReduce | Operation::ReduceScatter => 0..size,
            Operation::Broadcast { root } => root..root + 1,
            Operation::AllGather | Operation::Barrier => owner..owner + 1,
        }
    }

    /// Whether `to` needs the sums of other ranks' chunks.
    fn gathers(self, to: usize) -> bool {
        match self {
            Operation::AllReduce | Operation::AllGather => true,
            Operation::Broadcast { root } => to != root,
            Operation::ReduceScatter | Operation::Barrier => false,
        }
    }

    /// Its number in a header; `WORDS` is by that.
    fn code(self) -> usize {
        match self {
            Operation::AllReduce => 1,
            Operation::ReduceScatter => 2,
            Operation::AllGather => 3,
            Operation::Broadcast { .. } => 4,
            Operation::Barrier => 5,
        }
    }
}

const WORDS: [Words; 6] = [
    words!("?"),
    words!("all-reduce"),
    words!("reduce-scatter"),
    words!("all-gather"),
    words!("broadcast"),
    words!("barrier"),
];

const HEADER: usize = 24;

/// What a connection carries first: the operation, its root, its length, and how many came before it.
fn header(operation: Operation, len: usize, sequence: u64) -> [u8; HEADER] {
    let root = if let Operation::Broadcast { root } = operation { root } else { 0 };
    let mut bytes = [0; HEADER];
    bytes[0..4].copy_from_slice(&(operation.code() as u32).to_le_bytes());
    bytes[4..8].copy_from_slice(&(root as u32).to_le_bytes());
    bytes[8..16].copy_from_slice(&(len as u64).to_le_bytes());
    bytes[16..24].copy_from_slice(&sequence.to_le_bytes());
    bytes
}

/// How far the connection with one peer has come, in bytes of each part.
#[derive(Clone, Default)]
struct Flow {
    header_sent: usize,
    contributions_sent: usize,
    sums_sent: usize,
    header: [u8; HEADER],
    header_received: usize,
    contributions_received: usize,
    sums_received: usize,
}

/// The schedule's memory, kept between operations so that none allocates.
pub struct Ring {
    flows: Vec<Flow>,
    /// WINDOW pieces of every rank's contributions to this rank's chunk.
    staging: Vec<f32>,
    addresses: Vec<usize>,
    sequence: u64,
}

impl Ring {
    pub fn new(size: usize) -> Ring {
        let staging = vec![0.0; size * WINDOW * PIECE];
        Ring { flows: vec![Flow::default(); size], staging, addresses: Vec::with_capacity(size), sequence: 0 }
    }

    /// Runs one operation to its end; gives the time waited until all other ranks had come to it.
    pub fn run(&mut self, mesh: &mut dyn Mesh, operation: Operation, data: &mut [f32]) -> Result<Duration> {
        let (rank, size) = (mesh.rank(), mesh.size());
        self.flows.fill(Flow::default());
        self.sequence += 1;
        let header = header(operation, data.len(), self.sequence);
        let own = operation.contributors(rank, size) == (rank..rank + 1);
        let summed = if own { chunk(data.len(), size, rank).len() } else { 0 };
        let mut pass = Pass { ring: self, mesh, operation, header, data, rank, size, summed };

        let mut waited = Duration::ZERO;
        loop {
            let mut moved = false;
            for distance in 1..size {
                moved |= pass.send((rank + distance) % size)?;
                moved |= pass.receive((rank + size - distance) % size)?;
            }
            moved |= pass.add();
            if moved {
                continue;
            }
            let Some(peer) = (1..size).map(|distance| (rank + distance) % size).find(|&peer| !pass.is_done(peer))
            else {
                pass.mesh.flush()?;
                return Ok(waited);
            };
            let all_here =
                pass.ring.flows.iter().enumerate().all(|(peer, flow)| peer == rank || flow.header_received == HEADER);
            let start = Instant::now();
            pass.mesh.wait(WORDS[operation.code()].waiting, peer)?;
            if !all_here {
                waited += start.elapsed();
            }
        }
    }
}

/// Where piece `piece` of a peer's contributions lies in the staging memory.
fn slot(peer: usize, piece: usize) -> usize {
    (peer * WINDOW + piece % WINDOW) * PIECE
}

/// One operation under way.
struct Pass<'a> {
    ring: &'a mut Ring,
    mesh: &'a mut dyn Mesh,
    operation: Operation,
    header: [u8; HEADER],
    data: &'a mut [f32],
    rank: usize,
    size: usize,
    /// Values of this rank's chunk that are final.
    summed: usize,
}

impl Pass<'_> {
    fn chunk(&self, rank: usize) -> Range<usize> {
        chunk(self.data.len(), self.size, rank)
    }

    /// Values that `from` contributes to the chunk of `to`.
    fn contribution(&self, from: usize, to: usize) -> Range<usize> {
        let chunk = self.chunk(to);
        if self.operation.contributors(to, self.size).contains(&from) { chunk } else { chunk.start..chunk.start }
    }

    /// Sums that `from` sends to `to`.
    fn sums(&self, from: usize, to: usize) -> Range<usize> {
        let chunk = self.chunk(from);
        if self.operation.gathers(to) { chunk } else { chunk.start..chunk.start }
    }

    /// Sends what it can of what comes next; says whether anything went.
    fn send(&mut self, peer: usize) -> Result<bool> {
        let contribution = self.contribution(self.rank, peer);
        let sums = self.sums(self.rank, peer);
        let ready = sums.start..sums.start + self.summed.min(sums.len());
        let flow = &mut self.ring.flows[peer];
        let (sent, bytes) = if flow.header_sent < HEADER {
            (&mut flow.header_sent, &self.header[..])
        } else if flow.contributions_sent < contribution.len() * VALUE {
            (&mut flow.contributions_sent, bytemuck::cast_slice(&self.data[contribution]))
        } else {
            (&mut flow.sums_sent, bytemuck::cast_slice(&self.data[ready]))
        };
        let next = &bytes[*sent..bytes.len().min(*sent + PIECE * VALUE)];
        if next.is_empty() {
            return Ok(false);
        }
        let count = self.mesh.send(peer, next)?;
        *sent += count;
        Ok(count > 0)
    }

    /// Receives what it can of what comes next; says whether anything came.
    fn receive(&mut self, peer: usize) -> Result<bool> {
        let contribution = self.contribution(peer, self.rank);
        let sums = self.sums(peer, self.rank);
        let Ring { flows, staging, .. } = &mut *self.ring;
        let flow = &mut flows[peer];
        // What comes next: how much of its part is there, where in the part `space` begins, and the space.
        let (received, base, space): (_, usize, &mut [u8]) = if flow.header_received < HEADER {
            (&mut flow.header_received, 0, &mut flow.header)
        } else if flow.contributions_received < contribution.len() * VALUE {
            let piece = flow.contributions_received / VALUE / PIECE;
            if piece >= self.summed / PIECE + WINDOW {
                return Ok(false);
            }
            let count = (contribution.len() - piece * PIECE).min(PIECE);
            let space = &mut staging[slot(peer, piece)..][..count];
            (&mut flow.contributions_received, piece * PIECE * VALUE, bytemuck::cast_slice_mut(space))
        } else {
            (&mut flow.sums_received, 0, bytemuck::cast_slice_mut(&mut self.data[sums]))
        };
        let start = *received - base;
        let end = space.len().min(start + PIECE * VALUE);
        if start == end {
            return Ok(false);
        }
        let count = self.mesh.receive(peer, &mut space[start..end])?;
        *received += count;
        if flow.header_received == HEADER && flow.header != self.header {
            return Err(self.out_of_step(peer));
        }
        Ok(count > 0)
    }

    /// Adds the next piece of this rank's chunk if every version of it is there; says whether it did.
    fn add(&mut self) -> bool {
        let chunk = self.chunk(self.rank);
        let left = chunk.len() - self.summed;
        let count = left.min(PIECE);
        let end = (self.summed + count) * VALUE;
        let contributors = self.operation.contributors(self.rank, self.size);
        let here = |peer: usize| peer == self.rank || self.ring.flows[peer].contributions_received >= end;
        if left == 0 || !contributors.clone().all(here) {
            return false;
        }
        let piece = self.summed / PIECE;
        let out = &mut self.data[chunk.start + self.summed..][..count];
        if contributors.contains(&self.rank) {
            let staging = self.ring.staging.as_ptr();
            self.ring.addresses.clear();
            self.ring.addresses.extend(contributors.map(|peer| match peer == self.rank {
                true => out.as_mut_ptr() as usize,
                false => staging.wrapping_add(slot(peer, piece)) as usize,
            }));
            // SAFETY: `count` values of `out` and of each peer's slot, which nothing else borrows here.
            unsafe { sum::tree_in_place(&self.ring.addresses, 0..count, self.rank..self.rank + 1) };
        } else {
            out.copy_from_slice(&self.ring.staging[slot(contributors.start, piece)..][..count]);
        }
        self.summed += count;
        true
    }

    fn is_done(&self, peer: usize) -> bool {
        let flow = &self.ring.flows[peer];
        let bytes = |range: Range<usize>| range.len() * VALUE;
        flow.header_sent == HEADER
            && flow.contributions_sent == bytes(self.contribution(self.rank, peer))
            && flow.sums_sent == bytes(self.sums(self.rank, peer))
            && flow.header_received == HEADER
            && flow.contributions_received == bytes(self.contribution(peer, self.rank))
            && flow.sums_received == bytes(self.sums(peer, self.rank))
    }

    fn out_of_step(&self, peer: usize) -> Error {
        let say = |header: &[u8; HEADER]| {
            let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
            let name = WORDS.get(number(0) as usize).unwrap_or(&WORDS[0]).name;
            format!("{name} of {} values (root {}, operation {})", number(8), number(4), number(16))
        };
        let theirs = say(&self.ring.flows[peer].header);
        Error::internal(format!(
            "the ranks are out of step: rank {peer} called {theirs}, rank {} {}",
            self.rank,
            say(&self.header)
        ))
    }
}

#[cfg(test)]
mod tests;
