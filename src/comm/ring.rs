//! The ring schedule between hosts: reduce-scatter, then all-gather, over any point-to-point connections.
//!
//! A buffer of S bytes is cut into N chunks; rank r owns chunk r. In turn d of the reduce-scatter rank r sends its chunk
//! r + d, as it is, to its owner, rank r + d: after N - 1 turns every owner has N versions of its chunk and adds them in
//! the order of the pairwise tree. In turn d of the all-gather it sends the result to rank r + d. Bytes that a rank sends,
//! and receives: (N - 1) S / N for each half, 2 (N - 1) / N S together, which is the least for an all-reduce
//! (Patarasuk and Yuan 2009) and what the classic ring sends. Where ranks share a host, one delegate a chunk sends what its
//! host has added up and receives the result into memory that they share (`Hosts`), so that the N of these bytes is the
//! number of hosts.
//!
//! The classic ring sends to its neighbour only and adds as the partial sum comes by, which fixes the order
//! ((x_r + x_r+1) + x_r+2) + ..., another one for every chunk, another one for every N. To get the tree's order out of it, a
//! rank would have to pass on every partial sum that cannot be joined yet: for the tree (x0 + x1) + (x2 + x3) a chunk that
//! starts in the middle of a pair travels as two partial sums on one hop of the way, 1.25 times the bytes at N = 4, and more
//! with larger N. Sending straight to the owner costs more connections and no byte.
//!
//! All turns run at once, each connection at its own pace: a connection carries a header that names the operation, and then
//! frames of a piece each, a term (of the peer's chunk) or a result (of this rank's chunk). Terms depend on nothing; an owner
//! adds a piece as soon as all versions of it are there, updates parameters with it if that is asked for, and sends the result
//! before further terms.
//!
//! An owner keeps `WINDOW` pieces of a fast peer and then leaves it to wait; the slowest peer's next term is always taken, so
//! all come through. Nothing blocks except `Mesh::wait`, with every connection open in both directions, so no length can
//! deadlock.

mod frames;

use self::frames::{Flow, Frame, Half, Header, Totals, header, out_of_step};
use super::hosts::Hosts;
use super::sum::{self, Subtree, values_mut};
use super::{Operation, Update, chunk};
use crate::error::Result;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Values that are sent, received and added at once: 512 KiB. In smaller ones the two ends of a fast link wake each other more
/// often (ARCHITECTURE.md, "Over a fast network"). Unit tests have smaller ones, so that a few fill the window.
const PIECE: usize = if cfg!(test) { 8 << 10 } else { 128 << 10 };
/// Pieces of one peer that wait for the others'.
const WINDOW: usize = 4;
const VALUE: usize = size_of::<f32>();

/// Connections to ranks of other hosts that never block: a stream of bytes each way.
pub trait Mesh: Send {
    /// Takes as many of `bytes` as go now, perhaps none. `more` says that what belongs to them follows at once.
    fn send(&mut self, peer: usize, bytes: &[u8], more: bool) -> Result<usize>;
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

/// One operation, as a rank runs it. Between the arrival of all ranks of this host at the operation and their leaving it,
/// nobody else touches this memory.
pub struct Job<'a> {
    pub operation: Operation,
    /// Of a broadcast.
    pub root: usize,
    /// Values.
    pub len: usize,
    /// Where each rank of this host has its data, by position; equal addresses for memory that they share.
    pub data: &'a [usize],
    /// Of `ReduceUpdate`: where this host has the values, and how they change.
    pub update: Option<(usize, &'a Update<'a>)>,
}

/// The schedule's memory, kept between operations so that none allocates.
pub struct Ring {
    rank: usize,
    hosts: Hosts,
    /// By peer.
    flows: Vec<Flow>,
    /// The tree over all ranks, as far as it is added up elsewhere.
    leaves: Vec<Leaf>,
    /// This host's subtrees, by position of the ranks in each.
    subtrees: Vec<Vec<usize>>,
    /// WINDOW pieces of every subtree of the other hosts.
    staging: Vec<f32>,
    /// A piece of sums on its way to an update.
    sums: Vec<f32>,
    terms: Vec<Subtree>,
    addresses: Vec<usize>,
    sequence: u64,
}

struct Leaf {
    ranks: usize,
    /// The first of its ranks.
    first: usize,
    at: Source,
}

#[derive(Clone, Copy)]
enum Source {
    /// A rank of this host, by position.
    Here(usize),
    /// In the staging memory, by number.
    There(usize),
}

impl Ring {
    pub fn new(rank: usize, hosts: Hosts) -> Ring {
        let here = hosts.of(rank);
        let (mut leaves, mut staged) = (Vec::new(), 0);
        let mut slots = vec![0..0; hosts.count()];
        for (host, slots) in slots.iter_mut().enumerate() {
            let first_slot = staged;
            for ranks in hosts.subtrees(host) {
                if host == here {
                    let leaf = |rank| Leaf { ranks: 1, first: rank, at: Source::Here(hosts.position(rank)) };
                    leaves.extend(ranks.map(leaf));
                } else {
                    leaves.push(Leaf { ranks: ranks.len(), first: ranks.start, at: Source::There(staged) });
                    staged += 1;
                }
            }
            *slots = first_slot..staged;
        }
        leaves.sort_by_key(|leaf| leaf.first);
        let flow = |peer: usize| Flow { peer, staged: slots[hosts.of(peer)].clone(), ..Flow::default() };
        Ring {
            rank,
            flows: hosts.peers(rank).into_iter().map(flow).collect(),
            subtrees: hosts
                .subtrees(here)
                .into_iter()
                .map(|ranks| ranks.map(|rank| hosts.position(rank)).collect())
                .collect(),
            staging: vec![0.0; staged * WINDOW * PIECE],
            sums: vec![0.0; PIECE],
            terms: Vec::with_capacity(leaves.len()),
            addresses: Vec::with_capacity(hosts.members(here).len()),
            leaves,
            hosts,
            sequence: 0,
        }
    }

    pub fn hosts(&self) -> &Hosts {
        &self.hosts
    }

    /// Runs one operation to its end; gives the time waited until all peers had come to it.
    ///
    /// # Safety
    /// `job.data`, and the values of its update, are addresses of `job.len` values, valid and aligned, that are used as `Job`
    /// says.
    pub unsafe fn run(&mut self, mesh: &mut dyn Mesh, job: &Job<'_>) -> Result<Duration> {
        self.sequence += 1;
        let header = header(job, self.sequence);
        let mut pass = Pass::new(self, mesh, job, header);
        pass.start_own();
        let mut waited = Duration::ZERO;
        loop {
            let mut moved = false;
            for flow in 0..pass.ring.flows.len() {
                moved |= pass.send(flow)?;
                moved |= pass.receive(flow)?;
            }
            moved |= pass.add();
            if moved {
                continue;
            }
            let Some(flow) = pass.ring.flows.iter().find(|flow| !flow.is_done()) else {
                pass.mesh.flush()?;
                return Ok(waited);
            };
            let peer = flow.peer;
            let all_here = pass.ring.flows.iter().all(|flow| flow.received.has_header());
            let start = Instant::now();
            pass.mesh.wait(job.operation.words().waiting, peer)?;
            if !all_here {
                waited += start.elapsed();
            }
        }
    }
}

/// One operation under way.
struct Pass<'a> {
    ring: &'a mut Ring,
    mesh: &'a mut dyn Mesh,
    job: &'a Job<'a>,
    header: Header,
    position: usize,
    /// Values of this rank's chunk that are final.
    finished: usize,
}

impl<'a> Pass<'a> {
    fn new(ring: &'a mut Ring, mesh: &'a mut dyn Mesh, job: &'a Job<'a>, header: Header) -> Pass<'a> {
        let Ring { rank, hosts, flows, subtrees, .. } = &mut *ring;
        let (rank, here, from) = (*rank, hosts.of(*rank), hosts.of(job.root));
        let pieces = |owner: usize| chunk(job.len, hosts.size(), owner).len().div_ceil(PIECE);
        // What a host with so many subtrees sends for each piece of a chunk elsewhere.
        let terms = |host: usize, subtrees: usize| match job.operation {
            Operation::AllReduce | Operation::ReduceScatter | Operation::ReduceUpdate => subtrees,
            Operation::Broadcast => usize::from(host == from),
            Operation::AllGather | Operation::Barrier => 0,
        };
        let gathers = |host: usize| match job.operation {
            Operation::AllReduce | Operation::AllGather | Operation::ReduceUpdate => true,
            Operation::Broadcast => host != from,
            Operation::ReduceScatter | Operation::Barrier => false,
        };
        for flow in flows.iter_mut() {
            let (peer, there) = (flow.peer, hosts.of(flow.peer));
            let (speaks, is_spoken_to) = (hosts.delegate(here, peer) == rank, hosts.delegate(there, rank) == peer);
            let count = |condition: bool, frames: usize| if condition { frames } else { 0 };
            flow.total = Totals {
                terms_out: count(speaks, pieces(peer) * terms(here, subtrees.len())),
                terms_in: count(is_spoken_to, pieces(rank) * terms(there, flow.staged.len())),
                results_out: count(is_spoken_to && gathers(there), pieces(rank)),
                results_in: count(speaks && gathers(here), pieces(peer)),
            };
            (flow.sent, flow.received) = (Half::default(), Half::default());
        }
        let position = hosts.position(rank);
        Pass { ring, mesh, job, header, position, finished: 0 }
    }

    /// The elements of a piece of a rank's chunk.
    fn piece(&self, owner: usize, piece: usize) -> Range<usize> {
        let chunk = chunk(self.job.len, self.ring.hosts.size(), owner);
        let start = (chunk.start + piece * PIECE).min(chunk.end);
        start..(start + PIECE).min(chunk.end)
    }

    /// Where results are on this rank.
    fn results(&self) -> usize {
        self.job.update.map_or(self.job.data[self.position], |(values, _)| values)
    }

    /// Partial sums in each piece of the terms that this host sends.
    fn terms_a_piece(&self) -> usize {
        if self.job.operation == Operation::Broadcast { 1 } else { self.ring.subtrees.len() }
    }

    /// What is final from the beginning: a chunk that is gathered, and on its root's host all of a broadcast.
    fn start_own(&mut self) {
        let Ring { rank, hosts, .. } = &*self.ring;
        let chunk = |owner: usize| chunk(self.job.len, hosts.size(), owner);
        match self.job.operation {
            Operation::AllGather => self.spread(self.position, chunk(*rank)),
            Operation::Broadcast if hosts.of(self.job.root) == hosts.of(*rank) => {
                let from = hosts.position(self.job.root);
                self.spread(from, chunk(*rank));
                hosts.represented(*rank).for_each(|owner| self.spread(from, chunk(owner)));
            }
            Operation::Barrier => {}
            _ => return,
        }
        self.finished = chunk(*rank).len();
    }

    /// Copies values from one rank of this host to the others.
    fn spread(&self, from: usize, range: Range<usize>) {
        let from = self.job.data[from];
        for &to in self.job.data.iter().filter(|&&to| to != from) {
            // SAFETY: `run`'s contract: two buffers, in a range that is this rank's alone during the operation.
            unsafe { values_mut(to, range.clone()).copy_from_slice(values_mut(from, range.clone())) };
        }
    }

    /// Sends what it can of what comes next; says whether anything went.
    fn send(&mut self, flow: usize) -> Result<bool> {
        let Flow { peer, total, mut sent, .. } = self.ring.flows[flow];
        let count = if sent.has_header() {
            if sent.frame.is_none() {
                sent.frame = self.next_frame(&total, &sent);
                if sent.frame == Some(Frame::Term) {
                    self.add_up_here(peer, sent.terms);
                }
            }
            let Some(frame) = sent.frame else { return Ok(false) };
            let payload = match frame {
                Frame::Term => self.term(peer, sent.terms),
                // SAFETY: `run`'s contract; nobody writes results that are final.
                Frame::Result => unsafe { values_mut(self.results(), self.piece(self.ring.rank, sent.results)) },
            };
            sent.send(self.mesh, peer, frame, bytemuck::cast_slice(payload))?
        } else {
            let more = total.terms_out > 0 || (total.results_out > 0 && self.finished > 0);
            sent.send_header(self.mesh, peer, &self.header, more)?
        };
        self.ring.flows[flow].sent = sent;
        Ok(count > 0)
    }

    /// A result that is final, else the next term.
    fn next_frame(&self, total: &Totals, sent: &Half) -> Option<Frame> {
        let own = self.piece(self.ring.rank, 0).start;
        let is_final = || self.piece(self.ring.rank, sent.results).end - own <= self.finished;
        if sent.results < total.results_out && is_final() {
            Some(Frame::Result)
        } else if sent.terms < total.terms_out {
            Some(Frame::Term)
        } else {
            None
        }
    }

    /// Leaves the sum over the ranks of a subtree of this host where its first rank has its values.
    fn add_up_here(&mut self, owner: usize, term: usize) {
        if self.job.operation == Operation::Broadcast {
            return;
        }
        let range = self.piece(owner, term / self.ring.subtrees.len());
        let Ring { subtrees, addresses, .. } = &mut *self.ring;
        let subtree = &subtrees[term % subtrees.len()];
        if subtree.len() > 1 {
            addresses.clear();
            addresses.extend(subtree.iter().map(|&position| self.job.data[position]));
            // SAFETY: `run`'s contract: this chunk of all ranks of the host is its delegate's alone.
            unsafe { sum::tree_in_place(addresses, range, 0..1) };
        }
    }

    /// What this host has for a piece of another's chunk.
    fn term(&self, owner: usize, term: usize) -> &'static mut [f32] {
        let count = self.terms_a_piece();
        let position = match self.job.operation {
            Operation::Broadcast => self.ring.hosts.position(self.job.root),
            _ => self.ring.subtrees[term % count][0],
        };
        // SAFETY: as in `add_up_here`.
        unsafe { values_mut(self.job.data[position], self.piece(owner, term / count)) }
    }

    /// Receives what it can of what comes next; says whether anything came.
    fn receive(&mut self, flow: usize) -> Result<bool> {
        let Flow { peer, total, mut received, .. } = self.ring.flows[flow];
        if !received.has_header() {
            let (count, theirs) = received.receive_header(self.mesh, peer)?;
            self.ring.flows[flow].received = received;
            return match theirs {
                Some(theirs) if theirs != self.header => Err(out_of_step(peer, &theirs, self.ring.rank, &self.header)),
                _ => Ok(count > 0),
            };
        }
        if (received.terms, received.results) == (total.terms_in, total.results_in) {
            return Ok(false);
        }
        let mut count = 0;
        if received.frame.is_none() {
            count += received.receive_tag(self.mesh, peer, self.job, &total)?;
        }
        if let Some(frame) = received.frame
            && let Some(space) = self.space(flow, &received, frame)
        {
            count += received.receive(self.mesh, peer, frame, bytemuck::cast_slice_mut(space))?;
            if frame == Frame::Result && received.frame.is_none() {
                self.arrived(peer, received.results - 1);
            }
        }
        self.ring.flows[flow].received = received;
        Ok(count > 0)
    }

    /// Where the frame under way goes; `None` where it has to wait.
    fn space(&mut self, flow: usize, received: &Half, frame: Frame) -> Option<&'static mut [f32]> {
        let Flow { peer, ref staged, total, .. } = self.ring.flows[flow];
        match frame {
            // SAFETY: `run`'s contract: this chunk of this host's results is its delegate's alone.
            Frame::Result => Some(unsafe { values_mut(self.results(), self.piece(peer, received.results)) }),
            Frame::Term => {
                // A broadcast has one term a piece, whatever the subtrees.
                let count = (total.terms_in / self.pieces_of_own()).max(1);
                let (piece, subtree) = (received.terms / count, received.terms % count);
                if piece >= self.finished / PIECE + WINDOW {
                    return None;
                }
                let start = slot(staged.start + subtree, piece);
                let length = self.piece(self.ring.rank, piece).len();
                // SAFETY: a slot is written here until the piece is complete and read in `add`, one after the other.
                Some(unsafe { values_mut(self.ring.staging.as_mut_ptr() as usize, start..start + length) })
            }
        }
    }

    fn pieces_of_own(&self) -> usize {
        chunk(self.job.len, self.ring.hosts.size(), self.ring.rank).len().div_ceil(PIECE).max(1)
    }

    /// A piece of another's chunk is here: for all ranks of the host.
    fn arrived(&self, owner: usize, piece: usize) {
        if self.job.update.is_none() {
            self.spread(self.position, self.piece(owner, piece));
        }
    }

    /// Finishes the next piece of this rank's chunk if every term of it is there; says whether it did.
    fn add(&mut self) -> bool {
        let own = chunk(self.job.len, self.ring.hosts.size(), self.ring.rank);
        let piece = self.finished / PIECE;
        let range = self.piece(self.ring.rank, piece);
        let terms_a_piece = |flow: &Flow| flow.total.terms_in / own.len().div_ceil(PIECE);
        let is_here = |flow: &Flow| flow.received.terms >= (piece + 1) * terms_a_piece(flow);
        if self.finished == own.len() || !self.ring.flows.iter().all(is_here) {
            return false;
        }
        self.find_terms(&range, piece);
        let Ring { sums, terms, addresses, .. } = &mut *self.ring;
        let offset = range.start * VALUE;
        addresses.clear();
        match (self.job.operation, self.job.update) {
            (_, Some(_)) => addresses.push(sums.as_mut_ptr() as usize),
            (Operation::ReduceScatter, _) => addresses.push(self.job.data[self.position] + offset),
            _ => addresses.extend(self.job.data.iter().map(|data| data + offset)),
        }
        // SAFETY: `run`'s contract: this chunk of all ranks of this host is its owner's alone; and the staging is ours.
        unsafe { sum::join_subtrees(terms, range.len(), addresses) };
        if let Some((values, update)) = self.job.update {
            // SAFETY: as above.
            update(range.clone(), &mut sums[..range.len()], unsafe { values_mut(values, range.clone()) });
        }
        self.finished += range.len();
        true
    }

    /// The terms of a piece of this rank's chunk, in the order of the tree.
    fn find_terms(&mut self, range: &Range<usize>, piece: usize) {
        let Ring { hosts, leaves, staging, terms, flows, .. } = &mut *self.ring;
        let staging = |number: usize| staging.as_ptr() as usize + slot(number, piece) * VALUE;
        terms.clear();
        if self.job.operation == Operation::Broadcast {
            let from = hosts.of(self.job.root);
            let flow = flows.iter().find(|flow| hosts.of(flow.peer) == from && flow.total.terms_in > 0);
            let flow = flow.expect("a chunk of a broadcast from another host comes from its delegate");
            terms.push(Subtree { ranks: 1, address: staging(flow.staged.start) });
            return;
        }
        terms.extend(leaves.iter().map(|&Leaf { ranks, at, .. }| match at {
            Source::Here(position) => Subtree { ranks, address: self.job.data[position] + range.start * VALUE },
            Source::There(number) => Subtree { ranks, address: staging(number) },
        }));
    }
}

/// Where a piece of a subtree lies in the staging memory.
fn slot(number: usize, piece: usize) -> usize {
    (number * WINDOW + piece % WINDOW) * PIECE
}

#[cfg(test)]
mod tests;
