//! The faults themselves, each done by a rank to itself, so that they work under every launcher.

use crate::error::{Context, Kind, Result};
use crate::launch::watch::Health;
use rustix::net::{AddressFamily, sockopt};
use rustix::process::{Signal, getpid, kill_process};
use socket2::{SockFilter, SockRef};
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::ptr;
use std::time::Duration;

pub fn signal(signal: Signal) -> Result<()> {
    kill_process(getpid(), signal).or_kind(Kind::Internal, "--inject: sending a signal to this process")
}

/// A stopped process cannot wake itself, but a timer of it can: SIGCONT does its work when it is sent, not when it is
/// received (timer_create(2), signal(7)).
pub fn stop(wake_after: Option<Duration>) -> Result<()> {
    if let Some(time) = wake_after {
        send_later(libc::SIGCONT, time).or_kind(Kind::Internal, "--inject: setting a timer")?;
    }
    signal(Signal::STOP)
}

/// The timer stays with the process; it goes off once.
fn send_later(signal: i32, time: Duration) -> io::Result<()> {
    // SAFETY: all of these structures may be zero.
    let (mut event, mut when): (libc::sigevent, libc::itimerspec) = unsafe { std::mem::zeroed() };
    event.sigev_notify = libc::SIGEV_SIGNAL;
    event.sigev_signo = signal;
    when.it_value.tv_sec = time.as_secs() as libc::time_t;
    // Zero would never go off.
    when.it_value.tv_nsec = time.subsec_nanos().max(1).into();
    let mut timer = MaybeUninit::uninit();
    // SAFETY: the pointers are to values that live here; the timer is used once it was made.
    let done = unsafe {
        libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, timer.as_mut_ptr()) == 0
            && libc::timer_settime(timer.assume_init(), 0, &when, ptr::null_mut()) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// As if this rank's cable were cut: its TCP connections stay open and nothing comes in any more, not even the answers to
/// what still goes out, its heartbeats end, and it waits, as it would for its peers. It ends at the time-out.
pub fn drop_links(health: &Health) -> Result<()> {
    health.cut_off();
    deafen_sockets().or_kind(Kind::Internal, "--inject: cutting off the TCP connections")?;
    let for_nothing = |slice| {
        std::thread::sleep(slice);
        Ok(false)
    };
    health.wait("waiting for the other ranks behind a dropped link", for_nothing).map(drop)
}

fn deafen_sockets() -> io::Result<()> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let Some(number) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // SAFETY: borrowed for this moment; should another thread have closed it, the calls fail or meet another socket of
        // this process, which is to be deaf too.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        if matches!(sockopt::socket_domain(fd), Ok(AddressFamily::INET | AddressFamily::INET6)) {
            deafen(SockRef::from(&fd))?;
        }
    }
    Ok(())
}

/// A filter drops each packet to this socket: data, acknowledgements and the end of the stream (socket(7), SO_ATTACH_FILTER).
fn deafen(socket: SockRef<'_>) -> io::Result<()> {
    // BPF_RET | BPF_K: so many bytes of the packet pass.
    const NOTHING: [SockFilter; 1] = [SockFilter::new(0x06, 0, 0, 0)];
    socket.attach_filter(&NOTHING)
}

/// The lowest bit of the mantissa: as small an error as memory can make.
pub fn flip_bit(value: &mut f32) {
    *value = f32::from_bits(value.to_bits() ^ 1);
}

/// Flips a bit of the last byte, which is one of a tensor's values.
pub fn flip_byte(path: &Path) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut byte)?;
    file.seek(SeekFrom::End(-1))?;
    file.write_all(&[byte[0] ^ 1])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_deaf_socket_hears_neither_data_nor_the_end_of_the_stream() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        let mut byte = [0];
        sender.write_all(b"a").unwrap();
        receiver.read_exact(&mut byte).unwrap();

        deafen(SockRef::from(&receiver)).unwrap();
        sender.write_all(b"b").unwrap();
        drop(sender);
        receiver.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        assert_eq!(receiver.read(&mut byte).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_flipped_byte_is_one_byte() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, [1, 2, 4]).unwrap();
        flip_byte(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), [1, 2, 5]);
    }
}
