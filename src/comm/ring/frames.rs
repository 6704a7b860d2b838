//! The frames of one connection: what two ranks send each other in an operation, and how far they have come with it.
//!
//! Each direction carries a header that names the operation, and then frames of a piece each: a tag that says which kind,
//! and the values. A connection takes and gives as many bytes as it likes, so a frame is sent and received in parts.

use super::{Job, Mesh};
use crate::comm::Operation;
use crate::error::{Error, Result};
use std::ops::Range;

/// How far the connection with one peer has come.
#[derive(Default)]
pub struct Flow {
    pub peer: usize,
    /// Where the subtrees of the peer's host lie in the staging memory.
    pub staged: Range<usize>,
    /// Frames of this operation: terms to the peer and from it, results to the peer and from it.
    pub total: Totals,
    pub sent: Half,
    pub received: Half,
}

#[derive(Clone, Copy, Default)]
pub struct Totals {
    pub terms_out: usize,
    pub terms_in: usize,
    pub results_out: usize,
    pub results_in: usize,
}

/// One direction of a connection.
#[derive(Clone, Copy, Default)]
pub struct Half {
    /// Bytes of the header.
    header: usize,
    theirs: Header,
    /// Frames that are through.
    pub terms: usize,
    pub results: usize,
    /// The frame under way: which, and how many bytes of it are through, its tag included.
    pub frame: Option<Frame>,
    bytes: usize,
    tag: [u8; TAG],
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    Term,
    Result,
}

/// What a connection carries first.
pub type Header = [u8; HEADER];

const HEADER: usize = 24;
/// What a frame begins with: its kind.
const TAG: usize = 4;

/// The operation, its root, its length, and how many came before it.
pub fn header(job: &Job<'_>, sequence: u64) -> Header {
    let mut bytes = [0; HEADER];
    bytes[0..4].copy_from_slice(&(job.operation as u32).to_le_bytes());
    bytes[4..8].copy_from_slice(&(job.root as u32).to_le_bytes());
    bytes[8..16].copy_from_slice(&(job.len as u64).to_le_bytes());
    bytes[16..24].copy_from_slice(&sequence.to_le_bytes());
    bytes
}

impl Flow {
    /// Whether all of the operation is sent and received.
    pub fn is_done(&self) -> bool {
        let Flow { total, sent, received, .. } = self;
        sent.has_header()
            && received.has_header()
            && (sent.terms, sent.results) == (total.terms_out, total.results_out)
            && (received.terms, received.results) == (total.terms_in, total.results_in)
    }
}

impl Frame {
    fn tag(self) -> [u8; TAG] {
        match self {
            Frame::Term => *b"term",
            Frame::Result => *b"done",
        }
    }
}

impl Half {
    /// Whether the header is through.
    pub fn has_header(&self) -> bool {
        self.header == HEADER
    }

    /// Sends what it can of the header; gives the number of bytes. `more` says that a frame follows at once.
    pub fn send_header(&mut self, mesh: &mut dyn Mesh, peer: usize, header: &Header, more: bool) -> Result<usize> {
        let count = mesh.send(peer, &header[self.header..], more)?;
        self.header += count;
        Ok(count)
    }

    /// Sends what it can of the frame under way; gives the number of bytes.
    pub fn send(&mut self, mesh: &mut dyn Mesh, peer: usize, frame: Frame, payload: &[u8]) -> Result<usize> {
        let before = self.bytes;
        if self.bytes < TAG {
            self.bytes += mesh.send(peer, &frame.tag()[self.bytes..], true)?;
        }
        if self.bytes >= TAG {
            self.bytes += mesh.send(peer, &payload[self.bytes - TAG..], false)?;
        }
        let count = self.bytes - before;
        if self.bytes == TAG + payload.len() {
            self.is_through(frame);
        }
        Ok(count)
    }

    /// Receives what it can of the header; gives the number of bytes, and once it is whole, what it says.
    pub fn receive_header(&mut self, mesh: &mut dyn Mesh, peer: usize) -> Result<(usize, Option<Header>)> {
        let count = mesh.receive(peer, &mut self.theirs[self.header..])?;
        self.header += count;
        Ok((count, self.has_header().then_some(self.theirs)))
    }

    /// Receives what it can of the next frame's tag; gives the number of bytes.
    pub fn receive_tag(&mut self, mesh: &mut dyn Mesh, peer: usize, job: &Job<'_>, total: &Totals) -> Result<usize> {
        let count = mesh.receive(peer, &mut self.tag[self.bytes..])?;
        self.bytes += count;
        if self.bytes == TAG {
            self.frame = Some(self.frame_that_comes(peer, job.operation, total)?);
        }
        Ok(count)
    }

    fn frame_that_comes(&self, peer: usize, operation: Operation, total: &Totals) -> Result<Frame> {
        if self.tag == Frame::Term.tag() && self.terms < total.terms_in {
            Ok(Frame::Term)
        } else if self.tag == Frame::Result.tag() && self.results < total.results_in {
            Ok(Frame::Result)
        } else {
            Err(Error::internal(format!(
                "rank {peer} sent {:?} in the middle of {}: the ranks are out of step",
                String::from_utf8_lossy(&self.tag),
                operation.words().name
            )))
        }
    }

    /// Receives what it can of the frame under way; gives the number of bytes.
    pub fn receive(&mut self, mesh: &mut dyn Mesh, peer: usize, frame: Frame, space: &mut [u8]) -> Result<usize> {
        let count = mesh.receive(peer, &mut space[self.bytes - TAG..])?;
        self.bytes += count;
        if self.bytes == TAG + space.len() {
            self.is_through(frame);
        }
        Ok(count)
    }

    fn is_through(&mut self, frame: Frame) {
        match frame {
            Frame::Term => self.terms += 1,
            Frame::Result => self.results += 1,
        }
        (self.frame, self.bytes) = (None, 0);
    }
}

/// The ranks' headers differ.
pub fn out_of_step(peer: usize, theirs: &Header, rank: usize, own: &Header) -> Error {
    let say = |header: &Header| {
        let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let name = Operation::from_number(number(0)).map_or("?", |operation| operation.words().name);
        format!("{name} of {} values (root {}, operation {})", number(8), number(4), number(16))
    };
    let (theirs, own) = (say(theirs), say(own));
    Error::internal(format!("the ranks are out of step: rank {peer} called {theirs}, rank {rank} {own}"))
}
