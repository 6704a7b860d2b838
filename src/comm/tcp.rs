//! Connections over TCP, under the ring schedule.
//!
//! Every rank listens at a port that the system chooses and tells the others through the control star. Of two ranks the
//! higher connects. Where `[parallel] interface` chose an address of the host, they listen at and connect from that one,
//! whatever network the ranks have met in. The sockets never block; one edge-triggered epoll knows which of them are ready.

use super::ring::Mesh;
use crate::error::{Context, Error, Kind, Result};
use crate::launch::link::{self, Link};
use crate::launch::rendezvous::{Control, host, ways::any};
use crate::launch::watch::{Health, round_trip};
use rustix::event::epoll::{self, EventFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags, sockopt};
use rustix::time::Timespec;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};
use std::hash::{BuildHasher, RandomState};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long connecting to a peer that has announced itself may take.
const CONNECT: Duration = Duration::from_secs(30);

/// How long a wait looks before it sleeps: about what sleeping and waking cost, and what a piece takes on a fast network.
const SPIN: Duration = Duration::from_micros(50);

/// BBR, which some systems choose for the sake of long ways that lose packets, lets them go by timers. On a short way the
/// acknowledgements set the pace as well, for a fifth less processor time; there reno, which every system grants, stands in.
/// After a loss reno is back at its rate in as many round trips as half a window has packets: at 10 Gb/s and this round trip
/// in less than half a second, while on a long way it would take minutes.
const SHORT: Duration = Duration::from_millis(1);

/// The connected sockets of one rank.
pub struct Sockets {
    /// By rank; none where there is nothing to say.
    peers: Vec<Option<Peer>>,
    epoll: OwnedFd,
    health: Arc<Health>,
}

struct Peer {
    socket: Arc<Socket>,
    /// Whether the next call may succeed: set by epoll, cleared when a call says no.
    readable: bool,
    writable: bool,
}

/// Where a rank listens, as it tells the others.
#[derive(Serialize, Deserialize)]
struct Announcement {
    host: String,
    /// `None`: on rank 0's host.
    ip: Option<IpAddr>,
    /// By `[parallel] interface`: the rank connects from this address too.
    chosen: bool,
    port: u16,
    /// Rank 0's, drawn at random: what a connection must show to be let in.
    token: u64,
}

impl Sockets {
    /// Connects with `peers`, who all do. Collective over the world.
    pub fn connect(mut control: Control, peers: &[usize], health: Arc<Health>) -> Result<Sockets> {
        let (rank, size) = (control.rank(), control.size());
        let own = control.data_ip();
        let (listener, port) = listen(own.unwrap_or(any(control.root_ip().is_ipv6())), size)
            .or_kind(Kind::Internal, "listening for peers")?;
        let token = RandomState::new().hash_one(port);
        let ip = control.own_ip();
        let mine = Announcement { host: host().to_string(), ip, chosen: own.is_some(), port, token };
        let all = control.all_gather(&serde_json::to_vec(&mine).expect("plain data"))?;
        let all: Vec<Announcement> = all
            .iter()
            .map(|bytes| serde_json::from_slice(bytes))
            .collect::<Result<_, _>>()
            .or_kind(Kind::Internal, "the addresses of the ranks")?;
        check_families(&all, rank, peers, control.root_ip())?;

        let token = all[0].token;
        let deadline = Instant::now() + CONNECT;
        let mut links = Vec::with_capacity(peers.len());
        for &peer in peers.iter().filter(|&&peer| peer < rank) {
            let Announcement { ref host, ip, port, .. } = all[peer];
            let address = SocketAddr::new(ip.unwrap_or(control.root_ip()), port);
            let link = introduce((rank, own), (peer, address), token, deadline);
            links.push(link.map_err(|error| unconnected(error, rank, peer, host))?);
        }
        while links.len() < peers.len() {
            let peer = admit(&listener, token, deadline)?;
            let missing = |rank: &usize| !links.iter().any(|link: &Link| link.peer == *rank);
            match peer {
                Some(link) if link.peer > rank && peers.contains(&link.peer) && missing(&link.peer) => links.push(link),
                Some(link) => return Err(Error::internal(format!("an unexpected connection from rank {}", link.peer))),
                None => {
                    let missing = peers.iter().find(|&&peer| peer > rank && missing(&peer));
                    let peer = *missing.expect("one is missing while there are fewer links than peers");
                    let silent = Error::peer_lost(format!("it did not come within {CONNECT:?}"));
                    return Err(unconnected(silent, rank, peer, &all[peer].host));
                }
            }
        }
        Sockets::new(size, links, health).or_kind(Kind::Internal, "setting up the connections")
    }

    fn new(size: usize, links: Vec<Link>, health: Arc<Health>) -> std::io::Result<Sockets> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut peers: Vec<Option<Peer>> = (0..size).map(|_| None).collect();
        for Link { peer, socket } in links {
            socket.set_tcp_nodelay(true)?;
            link::keep_alive(&socket)?;
            if round_trip(&socket).is_some_and(|time| time < SHORT) {
                leave_bbr(&socket)?;
            }
            let flags = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
            epoll::add(&epoll, &socket, epoll::EventData::new_u64(peer as u64), flags)?;
            let socket = Arc::new(socket);
            health.look_after(peer, &socket);
            peers[peer] = Some(Peer { socket, readable: true, writable: true });
        }
        Ok(Sockets { peers, epoll, health })
    }

    /// Notes which connections have become ready; says whether one has, at the latest after `limit`.
    fn poll(&mut self, limit: Duration) -> Result<bool> {
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        let mut space = [MaybeUninit::uninit(); 64];
        let events = match epoll::wait(&self.epoll, &mut space, Some(&limit)) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return Ok(false),
            Err(error) => return Err(Error::internal(format!("waiting for the network: {error}"))),
        };
        for &mut epoll::Event { flags, data } in &mut *events {
            let peer = self.peers[data.u64() as usize].as_mut().expect("only peers are registered");
            // An error or a hang-up shows in the next call, whichever it is.
            let broken = flags.intersects(EventFlags::ERR | EventFlags::HUP);
            peer.readable |= broken || flags.contains(EventFlags::IN);
            peer.writable |= broken || flags.contains(EventFlags::OUT);
        }
        Ok(!events.is_empty())
    }

    fn peer(&mut self, peer: usize) -> &mut Peer {
        self.peers[peer].as_mut().expect("connected to all peers")
    }
}

impl Mesh for Sockets {
    fn send(&mut self, to: usize, bytes: &[u8], more: bool) -> Result<usize> {
        let peer = self.peer(to);
        if !peer.writable {
            return Ok(0);
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT | if more { SendFlags::MORE } else { SendFlags::empty() };
        // Only "again" clears `writable`: epoll tells of the change from full to free, and of nothing else.
        match retry_on_intr(|| rustix::net::send(&peer.socket, bytes, flags)) {
            Ok(count) => Ok(count),
            Err(Errno::AGAIN) => {
                peer.writable = false;
                Ok(0)
            }
            Err(error) => Err(self.health.account(lost(to, error))),
        }
    }

    fn receive(&mut self, from: usize, buffer: &mut [u8]) -> Result<usize> {
        let peer = self.peer(from);
        if !peer.readable {
            return Ok(0);
        }
        match retry_on_intr(|| rustix::net::recv(&peer.socket, &mut *buffer, RecvFlags::DONTWAIT)) {
            Ok((_, 0)) => Err(self.health.account(lost(from, Errno::CONNRESET))),
            Ok((_, count)) => Ok(count),
            Err(Errno::AGAIN) => {
                peer.readable = false;
                Ok(0)
            }
            Err(error) => Err(self.health.account(lost(from, error))),
        }
    }

    fn wait(&mut self, what: &str, for_peer: usize) -> Result<()> {
        // The training thread has nothing else to do; the communication thread would take the core from backward.
        if rayon::current_thread_index().is_some() {
            let start = Instant::now();
            while start.elapsed() < SPIN {
                if self.poll(Duration::ZERO)? {
                    return Ok(());
                }
            }
        }
        let health = self.health.clone();
        let poll = |limit: Duration| self.poll(limit);
        health.wait(what, poll).map(drop).map_err(|error| match health.check() {
            // The watch has its own, better account.
            Err(_) => error,
            Ok(()) => error.context(format!("rank {for_peer} has not come or not answered")),
        })
    }
}

fn lost(peer: usize, error: Errno) -> Error {
    Error::peer_lost(match error {
        Errno::CONNRESET | Errno::PIPE => format!("rank {peer} closed its connection; its own message says why"),
        error => format!("the connection to rank {peer} failed: {error}"),
    })
}

/// Of two ranks the higher connects, and from an address of one family none of the other can be reached. Both see it.
/// Errors are of kind Usage.
fn check_families(all: &[Announcement], rank: usize, peers: &[usize], root_ip: IpAddr) -> Result<()> {
    let ip = |rank: usize| all[rank].ip.unwrap_or(root_ip);
    for &peer in peers {
        let (lower, higher) = (rank.min(peer), rank.max(peer));
        if all[higher].chosen && ip(higher).is_ipv4() != ip(lower).is_ipv4() {
            let end = |rank: usize| format!("rank {rank} on {} has {}", all[rank].host, ip(rank));
            return Err(Error::usage(format!(
                "{}, but {}, and from IPv4 to IPv6 there is no way: with [parallel] interface name a network of one kind on \
                 all ranks",
                end(lower),
                end(higher)
            )));
        }
    }
    Ok(())
}

fn listen(ip: IpAddr, backlog: usize) -> std::io::Result<(Socket, u16)> {
    let address = SocketAddr::new(ip, 0);
    let listener = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    listener.bind(&address.into())?;
    listener.listen(backlog as i32)?;
    let port = listener.local_addr()?.as_socket().map_or(0, |address| address.port());
    Ok((listener, port))
}

/// Connects to `peer`, from the address that was chosen, and says who comes.
fn introduce(
    (rank, own): (usize, Option<IpAddr>),
    (peer, address): (usize, SocketAddr),
    token: u64,
    deadline: Instant,
) -> Result<Link> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).or_kind(Kind::Internal, address)?;
    let way = own.map_or(address.to_string(), |own| format!("from {own} to {address}"));
    if let Some(own) = own {
        socket.bind(&SocketAddr::new(own, 0).into()).or_kind(Kind::PeerLost, &way)?;
    }
    socket.connect_timeout(&address.into(), CONNECT).or_kind(Kind::PeerLost, &way)?;
    let link = Link::new(peer, socket);
    let mut hello = [0; 12];
    hello[..8].copy_from_slice(&token.to_le_bytes());
    hello[8..].copy_from_slice(&(rank as u32).to_le_bytes());
    link.write(&hello, deadline).or_kind(Kind::PeerLost, &way)?;
    Ok(link)
}

/// Any other way to control congestion is the system's choice, and stays.
fn leave_bbr(socket: &Socket) -> std::io::Result<()> {
    if sockopt::tcp_congestion(socket)? == "bbr" {
        sockopt::set_tcp_congestion(socket, "reno")?;
    }
    Ok(())
}

/// Both met rank 0, so it is the network between the two, or each has chosen another.
fn unconnected(error: Error, rank: usize, peer: usize, peers_host: &str) -> Error {
    let what = format!("rank {rank} on {} and rank {peer} on {peers_host} cannot connect", host());
    let remedy = "if no firewall is between them, the hosts share another network: name it with [parallel] interface";
    Error::new(error.kind(), format!("{what}: {error}; {remedy}"))
}

/// The next connection that shows the token; `None` at the deadline. Where a peer has failed instead, the watch ends this.
fn admit(listener: &Socket, token: u64, deadline: Instant) -> Result<Option<Link>> {
    while let Some(socket) = link::accept(listener, deadline)? {
        let stranger = Link::new(usize::MAX, socket);
        let mut hello = [0; 12];
        let patience = deadline.min(Instant::now() + Duration::from_secs(2));
        if stranger.read(&mut hello, patience).is_ok() && hello[..8] == token.to_le_bytes() {
            let peer = u32::from_le_bytes([hello[8], hello[9], hello[10], hello[11]]) as usize;
            return Ok(Some(Link { peer, ..stranger }));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn only_bbr_is_left_for_reno() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        for congestion in ["bbr", "cubic", "reno"] {
            let socket = Socket::from(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
            if sockopt::set_tcp_congestion(&socket, congestion).is_err() {
                eprintln!("skipped: this system does not grant {congestion}");
                continue;
            }
            leave_bbr(&socket).unwrap();
            let expected = if congestion == "bbr" { "reno" } else { congestion };
            assert_eq!(sockopt::tcp_congestion(&socket).unwrap(), expected);
            assert!(round_trip(&socket).is_some_and(|time| !time.is_zero()), "the handshake has a time");
        }
    }
}
