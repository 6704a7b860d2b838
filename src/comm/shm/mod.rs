//! Collectives through shared memory, for ranks of one host.
//!
//! Each rank's arena is a memfd that all ranks map. An all-reduce of S bytes in arenas is one pass: all arrive; rank r
//! reads slice r (S / N bytes) of every rank, adds in the order of the pairwise tree, and writes the sum to slice r of
//! every rank; all leave. That is N reads and N writes of S / N bytes: 2 S bytes moved a rank, the least there is for
//! data that every rank wants whole, and the lines written are those just read, so nothing else crosses the bus.
//!
//! Replicated memory is one memfd, mapped by all. `reduce_update` into it is the same pass but for its end: the sums of a piece
//! of slice r go to the caller while they are in the first-level cache, no sum is written back, and what the caller makes of
//! them lies where all ranks read it. Memory sees N reads of S / N bytes a rank, and what the caller touches. Gathering such
//! memory, or broadcasting it, takes no copy, only the synchronisation.
//!
//! Short operations (4 KiB and less) travel in the notice with which a rank arrives (`board`): one exchange of flags,
//! and everyone adds everything itself, in the same order, to the same bits.
//!
//! Data outside arenas is staged, piece by piece, through two buffers of a staging arena, with one synchronisation a piece:
//! while piece p is copied in, piece p - 1 is reduced and piece p - 2 is copied out.

mod board;
mod memory;

use super::hosts::Hosts;
use super::sum::{self, values_mut};
use super::{Communicator, Operation, Update, chunk, reduce_then_update};
use crate::device::{Arena, Place, SliceMut};
use crate::error::Result;
use crate::launch::rendezvous::Control;
use crate::launch::watch::Health;
use board::{Board, Call, SHORT};
use memory::{Mapping, share, share_one};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Values in one of the two staging buffers: 256 KiB, so that both stay in a core's second-level cache.
const PIECE: usize = 64 << 10;

pub struct Shm {
    rank: usize,
    size: usize,
    control: Control,
    board: Board,
    /// Every rank's staging arena, by rank.
    staging: Vec<Arc<Mapping>>,
    arenas: Vec<Shared>,
    /// Where every rank has the data of the present operation, by rank.
    addresses: Vec<usize>,
}

/// One collective allocation. Replicated memory is the same mapping for every rank.
struct Shared {
    mappings: Vec<Arc<Mapping>>,
    bytes: usize,
}

impl Shared {
    fn is_replicated(&self) -> bool {
        self.mappings.iter().all(|mapping| mapping.address() == self.mappings[0].address())
    }
}

impl Shm {
    /// Among the ranks of `control`, which are `names` in the world. Collective.
    pub fn new(mut control: Control, names: Vec<usize>, health: Arc<Health>) -> Result<Shm> {
        let board = Board::new(&mut control, names, health)?;
        let staging = share(&mut control, "lockstep-staging", 2 * PIECE * size_of::<f32>())?;
        let (rank, size) = (control.rank(), control.size());
        Ok(Shm { rank, size, control, board, staging, arenas: Vec::new(), addresses: vec![0; size] })
    }

    fn run(&mut self, operation: Operation, root: usize, mut data: SliceMut<'_>) -> Result<Duration> {
        let len = data.f32().len();
        let (arena, offset) = self.locate(&data);
        let sums = matches!(operation, Operation::AllReduce | Operation::ReduceScatter);
        assert!(!sums || !self.is_replicated(arena), "replicated memory has no terms of a sum");
        let call = Call { operation, root: root as u32, len: len as u64, arena, offset };
        if len <= SHORT {
            return self.short(call, data.into_f32());
        }
        let waited = self.board.agree(call, |_| ())?;
        if !self.find() {
            return Ok(waited + self.staged(call, data.into_f32())?);
        }
        self.direct(call);
        Ok(waited + self.board.synchronise()?)
    }

    /// The ranks arrive at an operation whose work is done elsewhere, and then `leave`. Gives where each has its data, or
    /// `None` if one's is in no arena.
    pub fn arrive(
        &mut self,
        operation: Operation,
        root: usize,
        data: &SliceMut<'_>,
    ) -> Result<(Duration, Option<&[usize]>)> {
        let (arena, offset) = self.locate(data);
        let len = (data.bytes() / size_of::<f32>()) as u64;
        let waited = self.board.agree(Call { operation, root: root as u32, len, arena, offset }, |_| ())?;
        let found = len == 0 || self.find();
        Ok((waited, found.then_some(&self.addresses)))
    }

    pub fn leave(&mut self) -> Result<Duration> {
        self.board.synchronise()
    }

    /// Whether terms and values are where a `reduce_update` is one pass.
    pub fn reaches(&self, terms: &SliceMut<'_>, values: &SliceMut<'_>) -> bool {
        self.locate(terms).0 > 0 && self.is_replicated(self.locate(values).0)
    }

    /// Everyone's values, or this rank's part of them, are in the notices.
    fn short(&mut self, call: Call, data: &mut [f32]) -> Result<Duration> {
        let (rank, size, root) = (self.rank, self.size, call.root as usize);
        let mine = chunk(data.len(), size, rank);
        let waited = self.board.agree(call, |values| values[..data.len()].copy_from_slice(data))?;
        let values = |rank: usize| &self.board.values(rank)[..];
        match call.operation {
            Operation::AllReduce => sum::tree(size, values, data),
            Operation::ReduceScatter => sum::tree(size, |rank| &values(rank)[mine.start..], &mut data[mine.clone()]),
            Operation::AllGather => {
                for rank in 0..size {
                    let range = chunk(data.len(), size, rank);
                    data[range.clone()].copy_from_slice(&values(rank)[range]);
                }
            }
            Operation::Broadcast => data.copy_from_slice(&values(root)[..data.len()]),
            Operation::Barrier => {}
            Operation::ReduceUpdate => unreachable!("reduce_update is never short"),
        }
        Ok(waited)
    }

    /// Everyone's data is in arenas, at `addresses`, and all have arrived.
    fn direct(&mut self, call: Call) {
        let (rank, size, len) = (self.rank, self.size, call.len as usize);
        let mine = chunk(len, size, rank);
        // SAFETY: all ranks are between the two synchronisation points of one operation on `len` values at these
        // addresses, and whatever one of them writes there, no other touches.
        let values = |rank: usize, range| unsafe { values_mut(self.addresses[rank], range) };
        match call.operation {
            // SAFETY: the same; chunk r of every rank is rank r's alone.
            Operation::AllReduce => unsafe { sum::tree_in_place(&self.addresses, mine, 0..size) },
            // SAFETY: the same; chunk r of every rank is read by rank r alone.
            Operation::ReduceScatter => unsafe { sum::tree_in_place(&self.addresses, mine, rank..rank + 1) },
            Operation::AllGather => {
                for other in (0..size).filter(|&other| self.addresses[other] != self.addresses[rank]) {
                    let range = chunk(len, size, other);
                    values(rank, range.clone()).copy_from_slice(values(other, range));
                }
            }
            Operation::Broadcast if self.addresses[rank] == self.addresses[call.root as usize] => {}
            Operation::Broadcast => values(rank, 0..len).copy_from_slice(values(call.root as usize, 0..len)),
            Operation::Barrier => {}
            Operation::ReduceUpdate => unreachable!("reduce_update has its own pass"),
        }
    }

    /// Someone's data is not in an arena, and all have arrived.
    fn staged(&mut self, call: Call, data: &mut [f32]) -> Result<Duration> {
        let stage = Stage { rank: self.rank, size: self.size, call, staging: &self.staging };
        let pieces = stage.pieces();
        let mut waited = Duration::ZERO;
        for step in 0..pieces + 2 {
            // The order matters where the piece that leaves and the piece that comes share a buffer.
            if step >= 2 {
                stage.copy_out(step - 2, data);
            }
            if step < pieces {
                stage.copy_in(step, data);
            }
            if (1..=pieces).contains(&step) {
                stage.combine(step - 1, data, &mut self.addresses);
            }
            if step <= pieces {
                waited += self.board.synchronise()?;
            }
        }
        Ok(waited)
    }

    /// Whether an arena, counted from 1, is one copy for all; 0 is none.
    fn is_replicated(&self, arena: u64) -> bool {
        arena > 0 && self.arenas[arena as usize - 1].is_replicated()
    }

    /// Looks up where the ranks announced their data to be; false if one's is in no arena.
    fn find(&mut self) -> bool {
        for rank in 0..self.size {
            let Call { arena, offset, .. } = self.board.call(rank);
            let Some(shared) = (arena as usize).checked_sub(1).and_then(|arena| self.arenas.get(arena)) else {
                return false;
            };
            self.addresses[rank] = shared.mappings[rank].address() + offset as usize;
        }
        true
    }

    /// The arena that holds `data`, counted from 1, and the address in it; zeros if none does.
    fn locate(&self, data: &SliceMut<'_>) -> (u64, u64) {
        let inside = |shared: &Shared| {
            let offset = data.address().checked_sub(shared.mappings[self.rank].address())?;
            (offset + data.bytes() <= shared.bytes).then_some(offset as u64)
        };
        let found =
            self.arenas.iter().enumerate().find_map(|(index, shared)| Some((index as u64 + 1, inside(shared)?)));
        found.unwrap_or((0, 0))
    }
}

impl Communicator for Shm {
    fn rank(&self) -> usize {
        self.rank
    }
    fn size(&self) -> usize {
        self.size
    }
    fn hosts(&self) -> Hosts {
        Hosts::new(&vec![(); self.size])
    }
    fn transport(&self) -> &'static str {
        "shm"
    }

    fn allocate(&mut self, bytes: usize) -> Result<Arena> {
        let mappings = share(&mut self.control, "lockstep-arena", bytes)?;
        let mine = mappings[self.rank].clone();
        self.arenas.push(Shared { mappings, bytes });
        // SAFETY: a page-aligned mapping of at least `bytes`, which its owner keeps.
        Ok(unsafe { Arena::from_raw(Place::Host, mine.address(), bytes, Box::new(mine)) })
    }

    fn allocate_replicated(&mut self, bytes: usize) -> Result<Arena> {
        let one = Arc::new(share_one(&mut self.control, "lockstep-replica", bytes)?);
        self.arenas.push(Shared { mappings: vec![one.clone(); self.size], bytes });
        // SAFETY: a page-aligned mapping of at least `bytes`, which its owner keeps.
        Ok(unsafe { Arena::from_raw(Place::Host, one.address(), bytes, Box::new(one)) })
    }

    /// Nothing: there is one copy.
    fn received(&self, _len: usize, _each: &mut dyn FnMut(Range<usize>)) {}
    fn all_reduce(&mut self, data: SliceMut<'_>) -> Result<Duration> {
        self.run(Operation::AllReduce, 0, data)
    }
    fn reduce_scatter(&mut self, data: SliceMut<'_>) -> Result<Duration> {
        self.run(Operation::ReduceScatter, 0, data)
    }
    fn all_gather(&mut self, data: SliceMut<'_>) -> Result<Duration> {
        self.run(Operation::AllGather, 0, data)
    }

    fn reduce_update(
        &mut self,
        mut terms: SliceMut<'_>,
        mut values: SliceMut<'_>,
        update: &Update<'_>,
    ) -> Result<Duration> {
        if !self.reaches(&terms, &values) {
            return reduce_then_update(self, terms, values, update);
        }
        let (arena, offset) = self.locate(&terms);
        let (len, first) = (terms.f32().len(), values.address());
        assert_eq!(len, values.f32().len(), "a value for every sum");
        let call = Call { operation: Operation::ReduceUpdate, root: 0, len: len as u64, arena, offset };
        let waited = self.board.agree(call, |_| ())?;
        assert!(self.find(), "the ranks agreed on an operation in arenas");
        let to = |range: Range<usize>, sums: &mut [f32]| {
            // SAFETY: inside chunk r, which between the two synchronisation points is rank r's alone, each part once.
            update(range.clone(), sums, unsafe { values_mut(first, range) });
        };
        // SAFETY: all ranks are between the two synchronisation points, and none writes terms there.
        unsafe { sum::tree_to(&self.addresses, chunk(len, self.size, self.rank), &to) };
        Ok(waited + self.board.synchronise()?)
    }
    fn broadcast(&mut self, data: SliceMut<'_>, root: usize) -> Result<Duration> {
        self.run(Operation::Broadcast, root, data)
    }
    fn barrier(&mut self) -> Result<Duration> {
        self.run(Operation::Barrier, 0, SliceMut::empty())
    }

    fn expose(&mut self, mut data: SliceMut<'_>, work: &mut dyn FnMut(&[usize], Range<usize>)) -> Result<bool> {
        let len = data.f32().len();
        let (arena, offset) = self.locate(&data);
        let call = Call { operation: Operation::AllReduce, root: 0, len: len as u64, arena, offset };
        self.board.agree(call, |_| ())?;
        let reachable = self.find();
        if reachable {
            work(&self.addresses, chunk(len, self.size, self.rank));
        }
        self.board.synchronise()?;
        Ok(reachable)
    }
}

/// One staged operation. Its piece p holds `share` values of every chunk: piece p of chunk k lies in the staging buffers
/// at k * share. A buffer belongs to a rank and, by turns, to even and odd pieces.
struct Stage<'a> {
    rank: usize,
    size: usize,
    call: Call,
    staging: &'a [Arc<Mapping>],
}

impl Stage<'_> {
    fn pieces(&self) -> usize {
        let longest = (0..self.size).map(|rank| chunk(self.call.len as usize, self.size, rank).len()).max();
        longest.unwrap_or(0).div_ceil(self.share())
    }

    /// This rank's data into its own buffer: all of it, or what the others lack.
    fn copy_in(&self, piece: usize, data: &[f32]) {
        for chunk in 0..self.size {
            let given = match self.call.operation {
                Operation::AllReduce | Operation::ReduceScatter => true,
                Operation::AllGather => chunk == self.rank,
                Operation::Broadcast => self.call.root as usize == self.rank,
                Operation::Barrier | Operation::ReduceUpdate => false,
            };
            if given {
                self.buffer(self.rank, piece, chunk).copy_from_slice(&data[self.part(piece, chunk)]);
            }
        }
    }

    /// What this rank alone does with all ranks' buffers.
    fn combine(&self, piece: usize, data: &mut [f32], addresses: &mut [usize]) {
        let (rank, size, root) = (self.rank, self.size, self.call.root as usize);
        match self.call.operation {
            Operation::AllReduce => {
                for (owner, address) in addresses.iter_mut().enumerate() {
                    *address = self.buffer(owner, piece, rank).as_ptr() as usize;
                }
                // SAFETY: part r of every rank's buffer of this piece is rank r's alone until the next synchronisation.
                unsafe { sum::tree_in_place(addresses, 0..self.part(piece, rank).len(), 0..size) };
            }
            Operation::ReduceScatter => {
                sum::tree(size, |owner| self.buffer(owner, piece, rank), &mut data[self.part(piece, rank)]);
            }
            Operation::AllGather => {
                for other in (0..size).filter(|&other| other != rank) {
                    data[self.part(piece, other)].copy_from_slice(self.buffer(other, piece, other));
                }
            }
            Operation::Broadcast if rank == root => {}
            Operation::Broadcast => {
                for chunk in 0..size {
                    data[self.part(piece, chunk)].copy_from_slice(self.buffer(root, piece, chunk));
                }
            }
            Operation::Barrier | Operation::ReduceUpdate => {}
        }
    }

    /// What the others left in this rank's buffer.
    fn copy_out(&self, piece: usize, data: &mut [f32]) {
        if self.call.operation == Operation::AllReduce {
            for chunk in 0..self.size {
                data[self.part(piece, chunk)].copy_from_slice(self.buffer(self.rank, piece, chunk));
            }
        }
    }

    /// Values of a chunk in one piece: whole cache lines.
    fn share(&self) -> usize {
        PIECE / self.size / 16 * 16
    }

    /// Where piece `piece` of chunk `chunk` lies in the data.
    fn part(&self, piece: usize, chunk: usize) -> Range<usize> {
        let chunk = super::chunk(self.call.len as usize, self.size, chunk);
        let start = chunk.start.saturating_add(piece * self.share()).min(chunk.end);
        start..(start + self.share()).min(chunk.end)
    }

    /// Where it lies in the staging of rank `owner`. Which rank may touch what, and when, is said at the top.
    #[allow(clippy::mut_from_ref)]
    fn buffer(&self, owner: usize, piece: usize, chunk: usize) -> &mut [f32] {
        let start = piece % 2 * PIECE + chunk * self.share();
        let range = start..start + self.part(piece, chunk).len();
        // SAFETY: inside the staging arena, since size * share <= PIECE.
        unsafe { values_mut(self.staging[owner].address(), range) }
    }
}
