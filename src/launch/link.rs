//! One connected stream to a peer, with deadlines: framed messages, and descriptors over Unix sockets.
//!
//! A frame is a kind byte, a length (u32, little-endian) and the payload. Besides data there is one other kind: a rank
//! that fails tells its peers why before it closes, so that they can name the rank that is really at fault.

use crate::error::{Context, Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketFlags,
};
use socket2::{Domain, Socket, TcpKeepalive};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// No frame is longer: what ranks agree on at the start is small, and a stray byte must not become a huge allocation.
pub const MAX_FRAME: usize = 16 << 20;

const DATA: u8 = 1;
const FAILURE: u8 = 2;

/// A Unix or TCP stream to rank `peer`.
#[derive(Debug)]
pub struct Link {
    pub peer: usize,
    pub socket: Socket,
}

impl Link {
    pub fn new(peer: usize, socket: impl Into<Socket>) -> Link {
        Link { peer, socket: socket.into() }
    }

    /// Sends one frame. Errors are of kind `PeerLost` and name the peer.
    pub fn send(&self, payload: &[u8], deadline: Instant) -> Result<()> {
        if payload.len() > MAX_FRAME {
            return Err(Error::internal(format!(
                "a message of {} bytes; at most {MAX_FRAME} can be sent",
                payload.len()
            )));
        }
        self.send_frame(DATA, payload, deadline).map_err(|error| self.lost(error))
    }

    /// Tells the peer why this rank gives up. Best effort: the peer may be the one that is gone.
    pub fn send_failure(&self, error: &Error) {
        let text = error.to_string();
        let text = &text.as_bytes()[..text.len().min(4096)];
        let _ = self.send_frame(FAILURE, text, Instant::now() + Duration::from_millis(200));
    }

    /// Receives one frame's payload.
    pub fn receive(&self, deadline: Instant) -> Result<Vec<u8>> {
        let mut kind = [0];
        self.read(&mut kind, deadline).map_err(|error| self.lost(error))?;
        self.receive_rest(kind[0], deadline)
    }

    fn receive_rest(&self, kind: u8, deadline: Instant) -> Result<Vec<u8>> {
        let mut length = [0; 4];
        self.read(&mut length, deadline).map_err(|error| self.lost(error))?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_FRAME || !matches!(kind, DATA | FAILURE) {
            return Err(Error::peer_lost(format!(
                "rank {} sent a message of kind {kind} and {length} bytes; is something else at the other end?",
                self.peer
            )));
        }
        let mut payload = vec![0; length];
        self.read(&mut payload, deadline).map_err(|error| self.lost(error))?;
        match kind {
            DATA => Ok(payload),
            _ => Err(Error::peer_lost(String::from_utf8_lossy(&payload))),
        }
    }

    /// Sends a descriptor over a Unix stream.
    pub fn send_fd(&self, fd: BorrowedFd<'_>, deadline: Instant) -> Result<()> {
        let fds = [fd];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)), "the buffer was sized for one descriptor");
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        retry(&self.socket, PollFlags::OUT, deadline, || {
            rustix::net::sendmsg(&self.socket, &[IoSlice::new(&[DATA])], &mut ancillary, flags)
        })
        .map_err(|error| self.lost(error))?;
        Ok(())
    }

    /// Receives a descriptor over a Unix stream.
    pub fn receive_fd(&self, deadline: Instant) -> Result<OwnedFd> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let message = retry(&self.socket, PollFlags::IN, deadline, || {
            rustix::net::recvmsg(&self.socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, flags)
        })
        .map_err(|error| self.lost(error))?;
        if message.bytes == 0 {
            return Err(self.lost(Errno::CONNRESET));
        }
        if byte[0] == FAILURE {
            self.receive_rest(FAILURE, deadline)?;
        }
        let received = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        received.ok_or_else(|| {
            Error::internal(format!(
                "rank {} passed a descriptor that did not arrive; is the limit on open files reached (ulimit -n)?",
                self.peer
            ))
        })
    }

    /// Fills `buffer` or fails: `CONNRESET` when the peer has closed, `TIMEDOUT` at the deadline.
    pub fn read(&self, mut buffer: &mut [u8], deadline: Instant) -> Result<(), Errno> {
        while !buffer.is_empty() {
            let count = retry(&self.socket, PollFlags::IN, deadline, || {
                rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT).map(|(_, count)| count)
            })?;
            if count == 0 {
                return Err(Errno::CONNRESET);
            }
            buffer = &mut buffer[count..];
        }
        Ok(())
    }

    /// Sends all of `buffer` or fails as `read` does.
    pub fn write(&self, mut buffer: &[u8], deadline: Instant) -> Result<(), Errno> {
        while !buffer.is_empty() {
            let count = retry(&self.socket, PollFlags::OUT, deadline, || {
                rustix::net::send(&self.socket, buffer, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
            })?;
            buffer = &buffer[count..];
        }
        Ok(())
    }

    /// Whether the peer has closed, or its host said that it is gone; what it has still sent does not count.
    pub fn has_ended(&self) -> bool {
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        match rustix::net::recv(&self.socket, &mut [0; 1][..], flags) {
            Ok((_, count)) => count == 0,
            Err(error) => error != Errno::AGAIN && error != Errno::INTR,
        }
    }

    pub fn is_unix(&self) -> bool {
        self.socket.domain().is_ok_and(|domain| domain == Domain::UNIX)
    }

    /// This side's address on a TCP link.
    pub fn local_ip(&self) -> Option<IpAddr> {
        Some(self.socket.local_addr().ok()?.as_socket()?.ip())
    }

    /// The peer's address on a TCP link.
    pub fn peer_ip(&self) -> Option<IpAddr> {
        Some(self.socket.peer_addr().ok()?.as_socket()?.ip())
    }

    fn send_frame(&self, kind: u8, payload: &[u8], deadline: Instant) -> Result<(), Errno> {
        let mut frame = Vec::with_capacity(5 + payload.len());
        frame.push(kind);
        frame.extend((payload.len() as u32).to_le_bytes());
        frame.extend(payload);
        self.write(&frame, deadline)
    }

    fn lost(&self, error: Errno) -> Error {
        let peer = self.peer;
        Error::peer_lost(match error {
            Errno::CONNRESET | Errno::PIPE => format!("rank {peer} closed its connection"),
            Errno::TIMEDOUT => format!("rank {peer} did not answer in time"),
            error => format!("the connection to rank {peer} failed: {error}"),
        })
    }
}

/// Between two probes of a silent connection; the kernel counts in whole seconds.
const PROBE: Duration = Duration::from_secs(1);
/// How long what was sent may stay without an answer. A heartbeat every 200 ms makes it 1.7 s from the cut to the error.
const UNANSWERED: Duration = Duration::from_millis(1500);

/// Lets the kernel end a TCP connection whose other end is cut off, which by itself it does not notice before something
/// is sent, and then after a quarter of an hour. An idle connection ends after 3 s (tcp(7), TCP_KEEPIDLE); one on which
/// something is under way is left to `end_when_cut`.
pub fn keep_alive(socket: &Socket) -> std::io::Result<()> {
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(PROBE).with_interval(PROBE).with_retries(2))
}

/// `keep_alive` that ends the connection within 2 s of the cut, whether it is idle or not (tcp(7), TCP_USER_TIMEOUT). For
/// little messages alone: it also ends a connection whose reader lets the buffers fill up and then takes as long, as a
/// rank does that is late to a collective.
pub fn end_when_cut(socket: &Socket) -> std::io::Result<()> {
    keep_alive(socket)?;
    socket.set_tcp_user_timeout(Some(UNANSWERED))
}

/// A connected pair of Unix streams, closed on exec.
pub fn pair() -> Result<(OwnedFd, OwnedFd)> {
    let (a, b) = Socket::pair(Domain::UNIX, socket2::Type::STREAM, None)
        .or_kind(Kind::Internal, "a pair of sockets for a rank (is the limit on open files, ulimit -n, reached?)")?;
    Ok((a.into(), b.into()))
}

/// Repeats a non-blocking call until it does something else than ask for patience.
fn retry<T>(
    socket: &Socket,
    events: PollFlags,
    deadline: Instant,
    mut call: impl FnMut() -> Result<T, Errno>,
) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::AGAIN) => {}
            Err(Errno::INTR) => continue,
            other => return other,
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Errno::TIMEDOUT);
        }
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::new(socket, events)], Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// The next connection to `listener`; `None` at the deadline.
pub fn accept(listener: &Socket, deadline: Instant) -> Result<Option<Socket>> {
    listener.set_nonblocking(true).or_kind(Kind::Internal, "the listening socket")?;
    match retry(listener, PollFlags::IN, deadline, || rustix::net::accept_with(listener, SocketFlags::CLOEXEC)) {
        Ok(fd) => Ok(Some(fd.into())),
        Err(Errno::TIMEDOUT) => Ok(None),
        Err(error) => Err(Error::internal(format!("accepting a peer's connection: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Write};
    use std::net::{TcpListener, TcpStream};

    /// What a write says after 4 s of a reader that does not read.
    fn write_unread(options: impl Fn(&Socket) -> std::io::Result<()>) -> ErrorKind {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _unread = listener.accept().unwrap();
        let sender = Socket::from(sender);
        options(&sender).unwrap();
        sender.set_write_timeout(Some(Duration::from_secs(4))).unwrap();
        let block = vec![0; 1 << 20];
        loop {
            if let Err(error) = (&sender).write_all(&block) {
                return error.kind();
            }
        }
    }

    #[test]
    fn a_late_reader_costs_a_connection_only_where_messages_are_little() {
        assert_eq!(write_unread(keep_alive), ErrorKind::WouldBlock, "the connection stays, the buffers are full");
        assert_eq!(write_unread(end_when_cut), ErrorKind::TimedOut);
    }
}
