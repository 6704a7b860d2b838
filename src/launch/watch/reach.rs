//! Whether the network still carries what is sent, from the kernel's own account of a TCP connection (tcp(7), TCP_INFO).
//!
//! The kernel at the other end acknowledges what arrives, for a process that is stopped, slow or crowded out too; when its
//! buffers are full it closes its window, and then nothing is under way. So bytes under way while no acknowledgement
//! comes say that the network is cut or the machine is gone, and nothing about the process. TCP_USER_TIMEOUT would end the
//! connection by itself, but it also ends one whose window stays closed for as long, as that of a late rank does.

use socket2::Socket;
use std::mem::{self, MaybeUninit};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// How long bytes may be under way without an acknowledgement. The kernel sends them again after 0.2, 0.6 and about 1.5 s, so
/// an interruption of half a second is survived. With a heartbeat's interval until something is sent, and another until the
/// watch looks, a cut is noticed within 2 s.
pub const CUT: Duration = Duration::from_millis(1500);

/// What is remembered of a connection from one look to the next.
#[derive(Default)]
pub struct Reach {
    /// Since when bytes have been under way without an acknowledgement.
    unanswered: Option<Instant>,
}

/// A transport's connection to `peer`. It closes when the transport is done with it.
pub struct Line {
    pub peer: usize,
    socket: Weak<Socket>,
    pub reach: Reach,
}

/// The kernel's account of a connection.
struct Account {
    under_way: bool,
    /// Since the last acknowledgement.
    silent: Duration,
}

impl Line {
    pub fn new(peer: usize, socket: &Arc<Socket>) -> Line {
        Line { peer, socket: Arc::downgrade(socket), reach: Reach::default() }
    }

    pub fn is_cut(&mut self, now: Instant) -> bool {
        self.socket.upgrade().is_some_and(|socket| self.reach.is_cut(&socket, now))
    }
}

impl Reach {
    /// To be asked a few times a second. A Unix socket is never cut.
    pub fn is_cut(&mut self, socket: &Socket, now: Instant) -> bool {
        account(socket).is_some_and(|account| self.observe(&account, now))
    }

    fn observe(&mut self, account: &Account, now: Instant) -> bool {
        if !account.under_way {
            self.unanswered = None;
            return false;
        }
        // An acknowledgement since the last look begins the time anew.
        let since = self.unanswered.map_or(now, |since| since.max(now.checked_sub(account.silent).unwrap_or(since)));
        self.unanswered = Some(since);
        now.duration_since(since) > CUT
    }
}

/// `None` if that is no TCP connection.
fn account(socket: &Socket) -> Option<Account> {
    let info = info(socket)?;
    Some(Account { under_way: info.tcpi_unacked > 0, silent: Duration::from_millis(info.tcpi_last_ack_recv.into()) })
}

/// How long what is sent takes to be acknowledged, smoothed by the kernel. `None` if that is no TCP connection.
pub fn round_trip(socket: &Socket) -> Option<Duration> {
    Some(Duration::from_micros(info(socket)?.tcpi_rtt.into()))
}

fn info(socket: &Socket) -> Option<libc::tcp_info> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = mem::size_of_val(&info) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes; all fields are integers, for which zeros are a value.
    unsafe {
        let into = info.as_mut_ptr().cast();
        let failed = libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, into, &mut length);
        (failed == 0).then(|| info.assume_init())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    /// When a connection is called cut, looked at every 200 ms; `account` says by the time in ms whether bytes are under way,
    /// and when the last acknowledgement came.
    fn cut_at(account: impl Fn(u64) -> (bool, u64)) -> Option<u64> {
        let start = Instant::now();
        let mut reach = Reach::default();
        (0..600_000).step_by(200).find(|&ms| {
            let (under_way, acknowledged) = account(ms);
            let silent = Duration::from_millis(ms - acknowledged);
            reach.observe(&Account { under_way, silent }, start + Duration::from_millis(ms))
        })
    }

    #[test]
    fn only_bytes_under_way_without_an_acknowledgement_make_a_cut() {
        assert_eq!(cut_at(|ms| (false, ms)), None, "idle");
        assert_eq!(cut_at(|_| (false, 0)), None, "a closed window: nothing is under way, and nothing comes");
        assert_eq!(cut_at(|ms| (true, ms.saturating_sub(150))), None, "busy");
        assert_eq!(cut_at(|ms| (true, ms / 1000 * 1000)), None, "slow: an acknowledgement a second");
        assert_eq!(cut_at(|ms| (ms >= 60_000, ms.min(50_000))), Some(61_600), "cut, and then something was sent");
        assert_eq!(cut_at(|ms| (true, ms.min(60_000))), Some(61_600), "cut while busy");
    }

    #[test]
    fn a_reader_that_does_not_read_is_not_cut_off() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _unread = listener.accept().unwrap();
        sender.set_nonblocking(true).unwrap();
        let socket = Arc::new(Socket::from(sender));
        let mut line = Line::new(1, &socket);
        let start = Instant::now();
        while start.elapsed() < 3 * CUT {
            while (&*socket).write(&[0; 1 << 16]).is_ok() {}
            assert!(!line.is_cut(Instant::now()), "after {:?}", start.elapsed());
            std::thread::sleep(Duration::from_millis(50));
        }
        drop(socket);
        assert!(!line.is_cut(Instant::now()), "the transport is gone");
    }
}
