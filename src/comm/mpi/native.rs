//! MPI's own collectives.
//!
//! An operation is cut into pieces, each a non-blocking collective of its own, and a window of them is under way at once:
//! while one is summed the next are on the network. All ranks begin the pieces in the same order, as MPI demands. Sums come
//! into a buffer beside the data, as many as the window has pieces, and are copied; so no operation needs memory of the
//! size of its data. `reduce_dtype` is about reduce_scatter, and so reduce_update, by which gradients are summed: what else
//! training sums are losses, counts, flags and norms, which all_reduce leaves exact, and parameters are only gathered.
//!
//! The chunks of reduce_scatter and all_gather go as reductions to, and broadcasts from, their owners, the first pieces of
//! all chunks before the second, so that every rank is the root of some of the pieces under way. A rank that calls another operation, or
//! another length, than its peers is not noticed here: MPI does not say.

use super::rounded::Rounded;
use crate::comm::hosts::Hosts;
use crate::comm::patience::Patience;
use crate::comm::{Communicator, Operation, Words, chunk};
use crate::config::raw::ReduceDtype;
use crate::device::{Arena, SliceMut};
use crate::error::Result;
use crate::launch::mpi::{check, duplicate_world, is_complete, null};
use crate::launch::watch::Health;
use ::mpi::ffi;
use std::ffi::{c_int, c_void};
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Values that one collective of MPI's takes: 256 KiB.
const PIECE: usize = 64 << 10;
/// Collectives under way.
const WINDOW: usize = 8;

pub struct Native {
    rank: usize,
    size: usize,
    comm: ffi::MPI_Comm,
    health: Arc<Health>,
    /// A piece for every place in the window. Never freed: after a failure MPI may still write there.
    sums: ManuallyDrop<Vec<f32>>,
    /// Where gradients are summed in bf16.
    rounded: Option<Rounded>,
}

// SAFETY: MPI's handles belong to the process, and one thread after the other may use them (MPI_THREAD_SERIALIZED).
unsafe impl Send for Native {}

/// Values, and the rank to which they belong.
struct Piece {
    values: Range<usize>,
    root: usize,
}

/// What is done with a piece.
#[derive(Clone, Copy)]
enum Call {
    /// Every rank gets the sum.
    AllReduce,
    /// The root gets the sum, in bf16 if that was asked for.
    Reduce,
    /// Every rank gets the root's.
    Broadcast,
}

/// A piece under way.
struct Flight {
    piece: Piece,
    request: ffi::MPI_Request,
}

impl Native {
    /// Collective.
    pub fn new(rank: usize, size: usize, dtype: ReduceDtype, health: Arc<Health>) -> Result<Native> {
        let rounded = match dtype {
            ReduceDtype::F32 => None,
            ReduceDtype::Bf16 => Some(Rounded::new(WINDOW, PIECE)?),
        };
        let sums = ManuallyDrop::new(vec![0.0; WINDOW * PIECE]);
        Ok(Native { rank, size, comm: duplicate_world(&health)?, health, sums, rounded })
    }

    /// Does `call` with all pieces. MPI does not tell waiting for a rank from moving its bytes, so no wait is reported.
    fn run(
        &mut self,
        words: Words,
        call: Call,
        data: &mut [f32],
        pieces: impl Iterator<Item = Piece>,
    ) -> Result<Duration> {
        let mut window: [Option<Flight>; WINDOW] = [const { None }; WINDOW];
        let data = data.as_mut_ptr();
        for (number, piece) in pieces.enumerate() {
            let place = number % WINDOW;
            if let Some(oldest) = window[place].take() {
                self.finish(words, call, data, oldest, place)?;
            }
            let request = self.begin(words, call, data, &piece, place)?;
            window[place] = Some(Flight { piece, request });
        }
        for (place, flight) in window.into_iter().enumerate() {
            flight.map_or(Ok(()), |flight| self.finish(words, call, data, flight, place))?;
        }
        Ok(Duration::ZERO)
    }

    /// `data` is that of `run`. Until the request is complete, MPI has the values and the place in `sums`; after an error
    /// nobody calls MPI again, so it touches neither.
    fn begin(
        &mut self,
        words: Words,
        call: Call,
        data: *mut f32,
        Piece { values, root }: &Piece,
        place: usize,
    ) -> Result<ffi::MPI_Request> {
        let mut request = null();
        let (count, root) = (values.len() as c_int, *root as c_int);
        // SAFETY: a piece is inside of the data.
        let values = unsafe { std::slice::from_raw_parts_mut(data.add(values.start), values.len()) };
        if let (Call::Reduce, Some(rounded)) = (call, &mut self.rounded) {
            return rounded.reduce(place, values, root, self.comm);
        }
        let values: *mut c_void = values.as_mut_ptr().cast();
        // SAFETY: a piece is no longer than its place in `sums`.
        let code = unsafe {
            let sums: *mut c_void = self.sums.as_mut_ptr().add(place * PIECE).cast();
            let (float, sum) = (ffi::RSMPI_FLOAT, ffi::RSMPI_SUM);
            match call {
                Call::AllReduce => ffi::MPI_Iallreduce(values, sums, count, float, sum, self.comm, &mut request),
                Call::Reduce => ffi::MPI_Ireduce(values, sums, count, float, sum, root, self.comm, &mut request),
                Call::Broadcast => ffi::MPI_Ibcast(values, count, float, root, self.comm, &mut request),
            }
        };
        check(code, words.name).map(|()| request)
    }

    /// Waits for the end of a piece that `begin` began, and puts the sums where they belong.
    fn finish(&mut self, words: Words, call: Call, data: *mut f32, flight: Flight, place: usize) -> Result<()> {
        let Flight { piece: Piece { values, root }, request } = flight;
        self.complete(words, request)?;
        // SAFETY: a piece is inside of the data, and MPI has given it back.
        let values = unsafe { std::slice::from_raw_parts_mut(data.add(values.start), values.len()) };
        match (call, &self.rounded) {
            (Call::Broadcast, _) => {}
            (Call::Reduce, _) if root != self.rank => {}
            (Call::Reduce, Some(rounded)) => rounded.take_sums(place, values),
            (Call::Reduce, None) | (Call::AllReduce, _) => {
                values.copy_from_slice(&self.sums[place * PIECE..][..values.len()]);
            }
        }
        Ok(())
    }

    fn complete(&self, words: Words, mut request: ffi::MPI_Request) -> Result<()> {
        let patience = Patience::new();
        let poll = |_| {
            let done = is_complete(&mut request)?;
            if !done {
                patience.rest();
            }
            Ok(done)
        };
        self.health.wait(words.waiting, poll).map(drop)
    }
}

/// `0..len`, all for `root`.
fn pieces(len: usize, root: usize) -> impl Iterator<Item = Piece> {
    (0..len).step_by(PIECE).map(move |start| Piece { values: start..(start + PIECE).min(len), root })
}

/// Every rank's chunk of `0..len`, for its owner.
fn pieces_of_chunks(len: usize, size: usize) -> impl Iterator<Item = Piece> {
    let piece = move |round: usize, root: usize| {
        let chunk = chunk(len, size, root);
        let start = (chunk.start + round * PIECE).min(chunk.end);
        Piece { values: start..(start + PIECE).min(chunk.end), root }
    };
    let longest = (0..size).map(|rank| chunk(len, size, rank).len()).max().unwrap_or(0);
    let rounds = 0..longest.div_ceil(PIECE);
    rounds.flat_map(move |round| (0..size).map(move |root| piece(round, root))).filter(|piece| !piece.values.is_empty())
}

impl Communicator for Native {
    fn rank(&self) -> usize {
        self.rank
    }
    fn size(&self) -> usize {
        self.size
    }
    /// Each by itself: MPI does not say how it gets to the others.
    fn hosts(&self) -> Hosts {
        Hosts::apart(self.size)
    }
    fn transport(&self) -> &'static str {
        "mpi, its own collectives"
    }
    fn allocate(&mut self, bytes: usize) -> Result<Arena> {
        Arena::host(bytes)
    }
    fn allocate_replicated(&mut self, bytes: usize) -> Result<Arena> {
        Arena::host(bytes)
    }
    fn received(&self, len: usize, each: &mut dyn FnMut(Range<usize>)) {
        let own = chunk(len, self.size, self.rank);
        [0..own.start, own.end..len].into_iter().for_each(each);
    }
    fn all_reduce(&mut self, mut data: SliceMut<'_>) -> Result<Duration> {
        let data = data.f32();
        self.run(Operation::AllReduce.words(), Call::AllReduce, data, pieces(data.len(), 0))
    }
    fn reduce_scatter(&mut self, mut data: SliceMut<'_>) -> Result<Duration> {
        let data = data.f32();
        self.run(Operation::ReduceScatter.words(), Call::Reduce, data, pieces_of_chunks(data.len(), self.size))
    }
    fn all_gather(&mut self, mut data: SliceMut<'_>) -> Result<Duration> {
        let data = data.f32();
        self.run(Operation::AllGather.words(), Call::Broadcast, data, pieces_of_chunks(data.len(), self.size))
    }
    fn broadcast(&mut self, mut data: SliceMut<'_>, root: usize) -> Result<Duration> {
        let data = data.f32();
        self.run(Operation::Broadcast.words(), Call::Broadcast, data, pieces(data.len(), root))
    }
    fn barrier(&mut self) -> Result<Duration> {
        let words = Operation::Barrier.words();
        let mut request = null();
        // SAFETY: the request lives until it is complete.
        check(unsafe { ffi::MPI_Ibarrier(self.comm, &mut request) }, words.name)?;
        self.complete(words, request).map(|()| Duration::ZERO)
    }
}
