//! MPI's messages as streams of bytes between ranks, for the ring schedule.
//!
//! To and from every peer there are a few buffers, used in turn: what is sent is gathered in one and goes from there as one
//! message, and as many receives are posted ahead. MPI keeps the messages of two ranks in order, so the oldest buffer is
//! always the next part of the stream. All requests stand in one table, for one question to MPI (`progress`); between two
//! such questions nothing changes. A byte is copied once on its way out and once on its way in.
//!
//! MPI moves a long message only while both ends call it. So an operation ends with `flush`: a rank that went on to other
//! work with a message half sent would keep its peer waiting.

use crate::comm::patience::Patience;
use crate::comm::ring::Mesh;
use crate::device::{Arena, SliceMut};
use crate::error::Result;
use crate::launch::mpi::{check, duplicate_world, null};
use crate::launch::watch::Health;
use ::mpi::ffi;
use std::ffi::c_int;
use std::mem::ManuallyDrop;
use std::sync::Arc;

/// Bytes that a message carries at most: what the schedule sends at once, with what it puts in front.
const MESSAGE: usize = (128 << 10) + 64;
/// Messages under way to a peer, and from it.
const DEPTH: usize = 4;
/// All have this one: the communicator is for them alone.
const TAG: c_int = 0;

pub struct Messages {
    comm: ffi::MPI_Comm,
    health: Arc<Health>,
    streams: Vec<Stream>,
    /// The place in `streams`, by rank.
    places: Vec<usize>,
    /// A buffer of `MESSAGE` bytes for every slot.
    buffers: ManuallyDrop<Arena>,
    /// By slot; null: the buffer is this rank's.
    requests: Vec<ffi::MPI_Request>,
    /// Bytes of the message that has come, by slot.
    lengths: Vec<usize>,
    /// What `progress` is told.
    done: Vec<c_int>,
    statuses: Vec<ffi::MPI_Status>,
}

// SAFETY: MPI's handles belong to the process, and one thread after the other may use them (MPI_THREAD_SERIALIZED).
unsafe impl Send for Messages {}

/// How far the streams to and from one peer have come.
#[derive(Clone, Default)]
struct Stream {
    peer: usize,
    /// Messages sent.
    sent: usize,
    /// Bytes gathered for the next one.
    gathered: usize,
    /// Messages read to their end.
    read: usize,
    /// Bytes read of the next one.
    offset: usize,
}

#[derive(Clone, Copy)]
enum Direction {
    Out,
    In,
}

/// Where message number `number` of the stream at `place` stands in the tables.
fn slot(place: usize, direction: Direction, number: usize) -> usize {
    (place * 2 + direction as usize) * DEPTH + number % DEPTH
}

fn is_incoming(slot: usize) -> bool {
    slot / DEPTH % 2 == Direction::In as usize
}

impl Messages {
    /// Between this rank and `peers`, of a world of `size`. Collective over all of these.
    pub fn new(size: usize, peers: &[usize], health: Arc<Health>) -> Result<Messages> {
        let slots = peers.len() * 2 * DEPTH;
        let mut places = vec![usize::MAX; size];
        peers.iter().enumerate().for_each(|(place, &peer)| places[peer] = place);
        // SAFETY: plain numbers.
        let nothing: ffi::MPI_Status = unsafe { std::mem::zeroed() };
        let mut messages = Messages {
            comm: duplicate_world(&health)?,
            health,
            streams: peers.iter().map(|&peer| Stream { peer, ..Stream::default() }).collect(),
            places,
            buffers: ManuallyDrop::new(Arena::host(slots * MESSAGE)?),
            requests: vec![null(); slots],
            lengths: vec![0; slots],
            done: vec![0; slots],
            statuses: vec![nothing; slots],
        };
        for place in 0..peers.len() {
            (0..DEPTH).try_for_each(|number| messages.let_come(place, number))?;
        }
        Ok(messages)
    }

    /// Posts the receive of message number `number`.
    fn let_come(&mut self, place: usize, number: usize) -> Result<()> {
        let slot = slot(place, Direction::In, number);
        let (address, peer) = (self.buffer(slot).u8().as_mut_ptr().cast(), self.streams[place].peer as c_int);
        // SAFETY: the buffer is left alone until the request is complete, and lives as long.
        let code = unsafe {
            let (count, kind) = (MESSAGE as c_int, ffi::RSMPI_UINT8_T);
            ffi::MPI_Irecv(address, count, kind, peer, TAG, self.comm, &mut self.requests[slot])
        };
        check(code, "receiving")
    }

    /// Sends what is gathered for a peer, if there is anything.
    fn let_go(&mut self, place: usize) -> Result<()> {
        let Stream { peer, sent, gathered, .. } = self.streams[place];
        if gathered == 0 {
            return Ok(());
        }
        let slot = slot(place, Direction::Out, sent);
        let address = self.buffer(slot).u8().as_ptr().cast();
        // SAFETY: the buffer is left alone until the request is complete, and lives as long.
        let code = unsafe {
            let (count, kind) = (gathered as c_int, ffi::RSMPI_UINT8_T);
            ffi::MPI_Isend(address, count, kind, peer as c_int, TAG, self.comm, &mut self.requests[slot])
        };
        check(code, "sending")?;
        self.streams[place].sent += 1;
        self.streams[place].gathered = 0;
        Ok(())
    }

    fn let_all_go(&mut self) -> Result<()> {
        (0..self.streams.len()).try_for_each(|place| self.let_go(place))
    }

    /// Asks MPI what is done; says whether anything is.
    fn progress(&mut self) -> Result<bool> {
        let mut count = 0;
        // SAFETY: the tables have an entry for every request.
        let code = unsafe {
            let (requests, done) = (self.requests.as_mut_ptr(), self.done.as_mut_ptr());
            let total = self.requests.len() as c_int;
            ffi::MPI_Testsome(total, requests, &mut count, done, self.statuses.as_mut_ptr())
        };
        // MPI_UNDEFINED, which is negative, where no request is under way.
        let count = usize::try_from(count).unwrap_or(0);
        if code == ffi::MPI_ERR_IN_STATUS as c_int {
            self.statuses[..count].iter().try_for_each(|status| check(status.MPI_ERROR, "sending or receiving"))?;
        }
        check(code, "sending or receiving")?;
        for (&slot, status) in self.done[..count].iter().zip(&self.statuses) {
            let (slot, mut bytes) = (slot as usize, 0);
            if is_incoming(slot) {
                // SAFETY: the status of a receive.
                check(unsafe { ffi::MPI_Get_count(status, ffi::RSMPI_UINT8_T, &mut bytes) }, "receiving")?;
                self.lengths[slot] = bytes as usize;
            }
        }
        Ok(count > 0)
    }

    /// Waits until something has happened after which `enough` says yes.
    fn wait_until(&mut self, what: &str, enough: impl Fn(&Messages) -> bool) -> Result<()> {
        let (health, patience) = (self.health.clone(), Patience::new());
        let poll = |_| {
            let moved = self.progress()?;
            if !moved {
                patience.rest();
            }
            Ok(moved && enough(self))
        };
        health.wait(what, poll).map(drop)
    }

    fn is_free(&self, slot: usize) -> bool {
        self.requests[slot] == null()
    }

    fn all_is_sent(&self) -> bool {
        (0..self.requests.len()).all(|slot| is_incoming(slot) || self.is_free(slot))
    }

    /// The buffer of a slot whose request is null.
    fn buffer(&self, slot: usize) -> SliceMut<'static> {
        assert!(self.is_free(slot), "MPI has the buffer");
        // SAFETY: MPI does not, and nobody else has it; its users drop it before they do anything else.
        unsafe { self.buffers.slice_mut(slot * MESSAGE..(slot + 1) * MESSAGE) }
    }
}

impl Mesh for Messages {
    fn send(&mut self, peer: usize, bytes: &[u8], more: bool) -> Result<usize> {
        let place = self.places[peer];
        let Stream { sent, gathered, .. } = self.streams[place];
        let slot = slot(place, Direction::Out, sent);
        if !self.is_free(slot) {
            return Ok(0);
        }
        let count = bytes.len().min(MESSAGE - gathered);
        self.buffer(slot).u8()[gathered..gathered + count].copy_from_slice(&bytes[..count]);
        self.streams[place].gathered += count;
        if !more || gathered + count == MESSAGE {
            self.let_go(place)?;
        }
        Ok(count)
    }

    fn receive(&mut self, peer: usize, space: &mut [u8]) -> Result<usize> {
        let place = self.places[peer];
        let Stream { read, offset, .. } = self.streams[place];
        let slot = slot(place, Direction::In, read);
        if !self.is_free(slot) {
            return Ok(0);
        }
        let count = space.len().min(self.lengths[slot] - offset);
        space[..count].copy_from_slice(&self.buffer(slot).u8()[offset..offset + count]);
        self.streams[place].offset += count;
        if self.streams[place].offset == self.lengths[slot] {
            self.streams[place].offset = 0;
            self.streams[place].read += 1;
            self.let_come(place, read + DEPTH)?;
        }
        Ok(count)
    }

    fn wait(&mut self, what: &str, for_peer: usize) -> Result<()> {
        self.let_all_go()?;
        self.wait_until(what, |_| true).map_err(|error| match self.health.check() {
            // The watch has its own, better account.
            Err(_) => error,
            Ok(()) => error.context(format!("rank {for_peer} has not come or not answered")),
        })
    }

    fn flush(&mut self) -> Result<()> {
        self.let_all_go()?;
        match self.all_is_sent() {
            true => Ok(()),
            false => self.wait_until("waiting for the other ranks to take what it sent", Messages::all_is_sent),
        }
    }
}

impl Drop for Messages {
    /// Takes back the receives that nobody will answer. After a failure MPI keeps what it has: a peer may still write there.
    fn drop(&mut self) {
        if self.health.check().is_err() {
            return;
        }
        for request in self.requests.iter_mut().filter(|request| **request != null()) {
            // SAFETY: posted receives, as every operation waits for its sends; to cancel one waits for nobody (MPI 4.0, 3.8.4).
            unsafe {
                ffi::MPI_Cancel(request);
                ffi::MPI_Wait(request, ffi::RSMPI_STATUS_IGNORE);
            }
        }
        // SAFETY: once, here; MPI has no more use for it.
        unsafe { ManuallyDrop::drop(&mut self.buffers) };
    }
}
