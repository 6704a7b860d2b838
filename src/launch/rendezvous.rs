//! How ranks find each other: a star of streams with rank 0 in the middle, over which they agree on what is needed to
//! build everything else (addresses, descriptors, digests). It is made in one of three ways, and what is made is the same:
//!
//! - `pairs`: the launcher of `-n` makes socket pairs and its children inherit them;
//! - `abstract_unix`: ranks of one node under a foreign launcher meet at a socket in the abstract namespace, which has no
//!   file that could stay behind;
//! - `tcp`: rank 0 listens at MASTER_ADDR:MASTER_PORT and the others connect.
//!
//! Messages go 2 (N - 1) times over a link an operation: enough for a start-up, not meant for gradients.

mod hosts;

use super::link::{self, Link};
use crate::error::{Context, Error, Kind, Result};
use rustix::net::sockopt::socket_peercred;
use socket2::{Domain, SockAddr, Socket, Type};
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// The star as one rank sees it: rank 0 has a link to every other rank, in order; the others have one, to rank 0.
/// All operations are collective. Each has a deadline; errors are of kind `PeerLost` and name the rank that is at fault.
#[derive(Debug)]
pub struct Control {
    rank: usize,
    size: usize,
    links: Vec<Link>,
    timeout: Duration,
    /// Beside a TCP star of ranks that share a host: carries descriptors. Made when first needed.
    passing: Option<Box<Control>>,
}

/// How long a rank of an inherited star waits for another's message.
const TIMEOUT: Duration = Duration::from_secs(60);
/// How much longer the others wait: rank 0 knows who is missing and tells them.
const GRACE: Duration = Duration::from_secs(2);

impl Control {
    /// The streams of a star for `size` ranks: element r holds what rank r gives to `from_fds`.
    pub fn pairs(size: usize) -> Result<Vec<Vec<OwnedFd>>> {
        let mut fds: Vec<Vec<OwnedFd>> = (0..size).map(|_| Vec::new()).collect();
        for rank in 1..size {
            let (root, other) = link::pair()?;
            fds[0].push(root);
            fds[rank].push(other);
        }
        Ok(fds)
    }

    /// This rank's end of a star whose streams were inherited.
    pub fn from_fds(rank: usize, size: usize, fds: Vec<OwnedFd>) -> Result<Control> {
        let expected = if rank == 0 { size - 1 } else { 1 };
        if rank >= size || fds.len() != expected {
            return Err(Error::internal(format!(
                "rank {rank} of {size} was given {} streams to its peers, expected {expected}",
                fds.len()
            )));
        }
        let peer = |index: usize| if rank == 0 { index + 1 } else { 0 };
        let links = fds.into_iter().enumerate().map(|(index, fd)| Link::new(peer(index), fd)).collect();
        Ok(Control::new(rank, size, links, TIMEOUT))
    }

    /// All ends of a star inside one process: ranks that are threads.
    pub fn local(size: usize) -> Result<Vec<Control>> {
        let fds = Control::pairs(size)?;
        fds.into_iter().enumerate().map(|(rank, fds)| Control::from_fds(rank, size, fds)).collect()
    }

    /// Rank 0 listens at `master_addr:master_port`, the others connect, again and again until `timeout`.
    pub fn tcp(rank: usize, size: usize, master_addr: &str, master_port: u16, timeout: Duration) -> Result<Control> {
        let place = format!("{master_addr}:{master_port}");
        if rank == 0 {
            // Every interface: MASTER_ADDR may be a name that resolves to a loopback address on its own host.
            let listener = listen_tcp(master_port, is_ipv6(master_addr))
                .or_kind(Kind::Internal, format!("rank 0 listening on port {master_port} for its peers"))?;
            return gather(size, listener, &place, timeout);
        }
        join(rank, size, &place, timeout, |deadline| connect_tcp(master_addr, master_port, deadline))
    }

    /// Ranks of one node meet at an abstract socket. `name` must be the same for all ranks of the job and no other job's.
    pub fn abstract_unix(rank: usize, size: usize, name: &str, timeout: Duration) -> Result<Control> {
        let address = SockAddr::unix(format!("\0{name}")).or_kind(Kind::Internal, format!("abstract socket {name}"))?;
        let place = format!("the abstract socket {name}");
        if rank == 0 {
            let listener = Socket::new(Domain::UNIX, Type::STREAM, None)
                .and_then(|socket| socket.bind(&address).and_then(|()| socket.listen(1024)).map(|()| socket))
                .or_kind(Kind::Internal, format!("rank 0 listening at {place} for its peers"))?;
            return gather(size, listener, &place, timeout);
        }
        join(rank, size, &place, timeout, |_| {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            socket.connect(&address).map(|()| socket)
        })
    }

    fn new(rank: usize, size: usize, links: Vec<Link>, timeout: Duration) -> Control {
        Control { rank, size, links, timeout, passing: None }
    }

    pub fn rank(&self) -> usize {
        self.rank
    }
    pub fn size(&self) -> usize {
        self.size
    }
    /// How long an operation waits for another rank's message.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }
    /// The links, for a thread that goes on to watch them.
    pub fn into_links(self) -> Vec<Link> {
        self.links
    }

    /// Every rank's message on every rank, by rank.
    pub fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let deadline = self.deadline();
        if self.rank != 0 {
            self.links[0].send(mine, deadline)?;
            return (0..self.size).map(|_| self.links[0].receive(deadline)).collect();
        }
        self.as_root(|links| {
            let mut all = vec![mine.to_vec()];
            for link in links {
                all.push(link.receive(deadline)?);
            }
            for link in links {
                all.iter().try_for_each(|message| link.send(message, deadline))?;
            }
            Ok(all)
        })
    }

    /// Rank 0's message on every rank; the others' is ignored.
    pub fn broadcast(&mut self, message: &[u8]) -> Result<Vec<u8>> {
        let deadline = self.deadline();
        if self.rank != 0 {
            return self.links[0].receive(deadline);
        }
        self.as_root(|links| links.iter().try_for_each(|link| link.send(message, deadline)))?;
        Ok(message.to_vec())
    }

    /// Every rank's descriptor on every rank, by rank (its own too). An error where the ranks are not all on one host.
    pub fn exchange_fds(&mut self, mine: BorrowedFd<'_>) -> Result<Vec<OwnedFd>> {
        if !self.can_pass_fds()? {
            return Err(Error::usage(
                "shared memory was asked for, but the ranks do not share a host (or not its network namespace); \
                 set [parallel] transport = \"tcp\"",
            ));
        }
        let star = self.passing.as_deref().unwrap_or(self);
        let deadline = star.deadline();
        if star.rank != 0 {
            star.links[0].send_fd(mine, deadline)?;
            return (0..star.size).map(|_| star.links[0].receive_fd(deadline)).collect();
        }
        star.as_root(|links| {
            let own = mine.try_clone_to_owned().or_kind(Kind::Internal, "a second descriptor of shared memory")?;
            let mut all = vec![own];
            for link in links {
                all.push(link.receive_fd(deadline)?);
            }
            for link in links {
                all.iter().try_for_each(|fd| link.send_fd(fd.as_fd(), deadline))?;
            }
            Ok(all)
        })
    }

    /// Address of this rank on its link to rank 0; `None` if that is on the same host (or this is rank 0).
    pub fn own_ip(&self) -> Option<IpAddr> {
        if self.rank == 0 {
            return None;
        }
        let link = &self.links[0];
        link.local_ip().filter(|own| Some(*own) != link.peer_ip() && !own.is_loopback())
    }

    /// Address at which this rank reaches rank 0's host.
    pub fn root_ip(&self) -> IpAddr {
        match self.links.first().and_then(Link::peer_ip) {
            Some(remote) if self.rank != 0 => remote,
            Some(IpAddr::V6(_)) => IpAddr::V6(Ipv6Addr::LOCALHOST),
            _ => IpAddr::V4(Ipv4Addr::LOCALHOST),
        }
    }

    /// Makes, once, the Unix star beside a TCP star; the ranks vote on whether that worked for all.
    fn can_pass_fds(&mut self) -> Result<bool> {
        let unix = self.links.iter().all(Link::is_unix);
        if unix || self.passing.is_some() {
            return Ok(true);
        }
        let random = RandomState::new().hash_one(std::process::id());
        let name = self.broadcast(format!("lockstep-{random:016x}").as_bytes())?;
        let name = String::from_utf8_lossy(&name).into_owned();
        let star = Control::abstract_unix(self.rank, self.size, &name, Duration::from_secs(5));
        let votes = self.all_gather(&[u8::from(star.is_ok())])?;
        let all = votes.iter().all(|vote| vote[..] == [1]);
        if let (true, Ok(mut star)) = (all, star) {
            star.timeout = self.timeout;
            self.passing = Some(Box::new(star));
        }
        Ok(all)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + if self.rank == 0 { self.timeout } else { self.timeout + GRACE }
    }

    /// Rank 0's part of an operation; if it fails, the others hear why instead of blaming rank 0.
    fn as_root<T>(&self, part: impl FnOnce(&[Link]) -> Result<T>) -> Result<T> {
        part(&self.links).inspect_err(|error| self.links.iter().for_each(|link| link.send_failure(error)))
    }
}

const MAGIC: [u8; 8] = *b"lockstep";
const WELCOME: &[u8] = b"lockstep: all ranks are here";
const HEARD: [u8; 1] = [b'!'];
const RETRY: Duration = Duration::from_millis(50);

/// What a rank says when it connects: fixed size, so that a stranger's bytes are recognised before anything is believed.
#[derive(Debug, PartialEq, Eq)]
struct Hello {
    version: u32,
    rank: u32,
    size: u32,
}

impl Hello {
    const BYTES: usize = 20;

    fn new(rank: usize, size: usize) -> Hello {
        Hello { version: 1, rank: rank as u32, size: size as u32 }
    }
    fn to_bytes(&self) -> Vec<u8> {
        let numbers = [self.version, self.rank, self.size];
        MAGIC.into_iter().chain(numbers.into_iter().flat_map(u32::to_le_bytes)).collect()
    }
    fn from_bytes(bytes: &[u8; Self::BYTES]) -> Option<Hello> {
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        (bytes[..8] == MAGIC).then(|| Hello { version: number(8), rank: number(12), size: number(16) })
    }
}

/// Rank 0's side: accepts until every rank has said hello. Strangers are dropped; a rank that does not fit ends the start
/// for all, with the reason.
fn gather(size: usize, listener: Socket, place: &str, timeout: Duration) -> Result<Control> {
    let deadline = Instant::now() + timeout;
    let mut found: Vec<Option<Link>> = (1..size).map(|_| None).collect();
    let result = gather_into(&mut found, size, &listener, place, deadline);
    // Closed before anyone is welcomed: a second star at the same place must not meet this one's queue.
    drop(listener);
    let links: Vec<Link> = found.into_iter().flatten().collect();
    if let Err(error) = result {
        links.iter().for_each(|link| link.send_failure(&error));
        return Err(error);
    }
    let mut control = Control::new(0, size, links, timeout);
    control.broadcast(WELCOME)?;
    Ok(control)
}

fn gather_into(
    found: &mut [Option<Link>],
    size: usize,
    listener: &Socket,
    place: &str,
    deadline: Instant,
) -> Result<()> {
    while found.iter().any(Option::is_none) {
        let Some((link, hello)) = accept(listener, deadline)? else {
            let missing: Vec<usize> = (1..size).filter(|rank| found[rank - 1].is_none()).collect();
            return Err(Error::peer_lost(format!(
                "ranks {missing:?} of {size} did not come to {place} in time; did their processes start, and can they \
                 reach it?"
            )));
        };
        let (rank, expected) = (hello.rank as usize, Hello::new(hello.rank as usize, size));
        let wrong = match found.get_mut(rank.wrapping_sub(1)) {
            _ if hello.version != expected.version => {
                format!("speaks version {} of the protocol, rank 0 speaks {}", hello.version, expected.version)
            }
            _ if hello.size != expected.size => format!("was told of {} ranks, rank 0 of {size}", hello.size),
            None => format!("does not exist among {size} ranks"),
            Some(Some(_)) => "came twice; two processes were given the same rank".to_string(),
            Some(slot) => {
                *slot = Some(Link { peer: rank, ..link });
                continue;
            }
        };
        let error = Error::usage(format!("rank {rank} {wrong} (meeting at {place})"));
        link.send_failure(&error);
        return Err(error);
    }
    Ok(())
}

/// The next connection that says hello; `None` at the deadline.
fn accept(listener: &Socket, deadline: Instant) -> Result<Option<(Link, Hello)>> {
    while let Some(socket) = link::accept(listener, deadline)? {
        let link = Link::new(usize::MAX, socket);
        if link.is_unix() && !same_user(&link.socket) {
            continue;
        }
        let mut bytes = [0; Hello::BYTES];
        // A rank says hello at once; whoever is silent for two seconds is something else.
        let patience = deadline.min(Instant::now() + Duration::from_secs(2));
        match link.read(&mut bytes, patience).ok().and_then(|()| Hello::from_bytes(&bytes)) {
            Some(hello) if link.write(&HEARD, patience).is_ok() => {
                let _ = link.socket.set_tcp_nodelay(true);
                return Ok(Some((link, hello)));
            }
            _ => tracing::warn!("something that is no rank connected to rank 0's port; dropped"),
        }
    }
    Ok(None)
}

/// The other ranks' side: connects until it is let in.
fn join(
    rank: usize,
    size: usize,
    place: &str,
    timeout: Duration,
    connect: impl Fn(Instant) -> std::io::Result<Socket>,
) -> Result<Control> {
    let deadline = Instant::now() + timeout;
    loop {
        let failure = match connect(deadline) {
            Ok(socket) => {
                let link = Link::new(0, socket);
                let _ = link.socket.set_tcp_nodelay(true);
                match knock(&link, rank, size, deadline) {
                    Ok(()) => {
                        return match link.receive(deadline + GRACE)? {
                            message if message == WELCOME => Ok(Control::new(rank, size, vec![link], timeout)),
                            _ => Err(Error::peer_lost(format!("what listens at {place} is not rank 0"))),
                        };
                    }
                    // Possibly a listener that closed with us in its queue: the star before this one.
                    Err(error) => error.to_string(),
                }
            }
            Err(error) => error.to_string(),
        };
        if Instant::now() + RETRY > deadline {
            return Err(Error::peer_lost(format!(
                "rank {rank} could not reach rank 0 at {place} within {timeout:?}: {failure}"
            )));
        }
        std::thread::sleep(RETRY);
    }
}

/// Says hello and waits until it is heard.
fn knock(link: &Link, rank: usize, size: usize, deadline: Instant) -> Result<(), rustix::io::Errno> {
    link.write(&Hello::new(rank, size).to_bytes(), deadline)?;
    link.read(&mut [0; HEARD.len()], deadline)
}

fn listen_tcp(port: u16, ipv6: bool) -> std::io::Result<Socket> {
    let (domain, any) = match ipv6 {
        true => (Domain::IPV6, IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
        false => (Domain::IPV4, IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
    };
    let socket = Socket::new(domain, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::new(any, port).into())?;
    socket.listen(1024)?;
    Ok(socket)
}

fn connect_tcp(host: &str, port: u16, deadline: Instant) -> std::io::Result<Socket> {
    let mut last = std::io::Error::other("the name has no address");
    // Resolved anew each time: a cluster's name service may learn of a host late.
    for address in (host, port).to_socket_addrs()? {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        match socket.connect_timeout(&address.into(), left.min(Duration::from_secs(5))) {
            // A port of the ephemeral range may, while nobody listens, be connected to itself.
            Ok(()) if socket.local_addr()?.as_socket() == socket.peer_addr()?.as_socket() => {
                last = std::io::Error::other("nobody listens yet");
            }
            Ok(()) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn is_ipv6(host: &str) -> bool {
    (host, 0).to_socket_addrs().is_ok_and(|mut addresses| addresses.all(|address| address.is_ipv6()))
}

fn same_user(socket: &Socket) -> bool {
    socket_peercred(socket).is_ok_and(|peer| peer.uid == rustix::process::getuid())
}

#[cfg(test)]
mod tests;
