//! How stars come to be: rank 0 listens, the others connect and say who they are, and when all are there they are welcomed.
//!
//! A rank opens with 32 bytes: a magic word, the protocol's version, its star, rank and size, and the token of its job. Rank 0
//! answers with the token's complement, which nobody sends by chance, and after the last one with a welcome. So a rank
//! that comes upon another job's listener, or upon any other program's, notices and looks on; and a stranger at rank 0's port
//! is dropped before anything it says is believed. Rank 0 of another start of this job may ask whether anybody is here: it
//! is answered, and not counted.

use super::{Control, GRACE};
use crate::error::{Error, Kind, Result};
use crate::launch::link::{self, Link};
use rustix::net::sockopt::socket_peercred;
use socket2::{Domain, SockAddr, Socket, Type};
use std::fmt::Display;
use std::net::IpAddr;
use std::time::{Duration, Instant};

const MAGIC: [u8; 8] = *b"lockstep";
const VERSION: u32 = 2;
const WELCOME: &[u8] = b"lockstep: all ranks are here";
const RETRY: Duration = Duration::from_millis(50);
/// A rank says hello at once. One that was slower, on a crowded machine, comes again.
const HELLO: Duration = Duration::from_secs(1);
/// Rank 0 answers as soon as it is that rank's turn.
const ANSWER: Duration = Duration::from_secs(5);
/// So long another program may be at a place that is rank 0's: it may be about to leave.
const STRANGER: Duration = Duration::from_secs(3);

/// This rank among those that are to meet.
#[derive(Clone, Copy, Debug)]
pub struct Party {
    pub rank: usize,
    pub size: usize,
    /// How many stars they make.
    pub stars: usize,
    pub timeout: Duration,
}

/// Where rank 0 may be.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub address: SockAddr,
    /// This host's address from which to go there, where it matters.
    pub from: Option<IpAddr>,
    pub token: u64,
}

/// Rank 0's side: accepts until every rank has said hello, in every star. A rank that does not fit ends the start for all,
/// with the reason.
pub fn gather(party: Party, token: u64, listener: Socket, place: &str) -> Result<Vec<Control>> {
    let Party { size, stars, timeout, .. } = party;
    let deadline = Instant::now() + timeout;
    let mut found: Vec<Vec<Option<Link>>> = (0..stars).map(|_| (1..size).map(|_| None).collect()).collect();
    let result = gather_into(&mut found, size, (&listener, token), place, deadline);
    drop(listener);
    let links = |star: Vec<Option<Link>>| star.into_iter().flatten().collect::<Vec<Link>>();
    let stars: Vec<Vec<Link>> = found.into_iter().map(links).collect();
    if let Err(error) = result {
        stars.iter().flatten().for_each(|link| link.send_failure(&error));
        return Err(error);
    }
    let mut stars: Vec<Control> = stars.into_iter().map(|links| Control::new(0, size, links, timeout)).collect();
    stars.iter_mut().try_for_each(|star| star.broadcast(WELCOME).map(drop))?;
    Ok(stars)
}

fn gather_into(
    found: &mut [Vec<Option<Link>>],
    size: usize,
    (listener, token): (&Socket, u64),
    place: &str,
    deadline: Instant,
) -> Result<()> {
    while found.iter().flatten().any(Option::is_none) {
        let Some((link, hello)) = accept(listener, token, deadline)? else {
            let missing: Vec<usize> =
                (1..size).filter(|rank| found.iter().any(|star| star[rank - 1].is_none())).collect();
            return Err(Error::peer_lost(format!(
                "ranks {missing:?} of {size} did not come to rank 0 on {} at {place} in time; did their processes start, \
                 and can they reach it?",
                host()
            )));
        };
        let Hello { version, star, rank, size: told, .. } = hello;
        let slot = found.get_mut(star as usize).and_then(|star| star.get_mut((rank as usize).wrapping_sub(1)));
        let wrong = match slot {
            _ if version != VERSION => format!("speaks version {version} of the protocol, rank 0 speaks {VERSION}"),
            _ if told as usize != size => format!("was told of {told} ranks, rank 0 of {size}"),
            None => format!("does not exist among {size} ranks"),
            Some(Some(first)) if !first.has_ended() => {
                format!("came twice, {}; two processes were given the same rank", origins(first, &link))
            }
            Some(slot) => {
                *slot = Some(Link { peer: rank as usize, ..link });
                continue;
            }
        };
        let error = Error::usage(format!("rank {rank} {wrong} (meeting at {place})"));
        link.send_failure(&error);
        return Err(error);
    }
    Ok(())
}

fn origins(first: &Link, second: &Link) -> String {
    let ip = |link: &Link| link.peer_ip().map_or("this host".to_string(), |ip| ip.to_string());
    format!("from {} and from {}", ip(first), ip(second))
}

/// The next connection that says this job's hello; `None` at the deadline.
fn accept(listener: &Socket, token: u64, deadline: Instant) -> Result<Option<(Link, Hello)>> {
    while let Some(socket) = link::accept(listener, deadline)? {
        let link = Link::new(usize::MAX, socket);
        if link.is_unix() && !same_user(&link.socket) {
            continue;
        }
        prepare(&link);
        let mut bytes = [0; Hello::BYTES];
        let patience = deadline.min(Instant::now() + HELLO);
        match link.read(&mut bytes, patience).ok().and_then(|()| Hello::from_bytes(&bytes)) {
            Some(hello) if hello.token != token => tracing::debug!("a rank of another job came to rank 0; sent away"),
            Some(hello) => {
                let answered = link.write(&answer(token), patience).is_ok();
                if answered && hello.rank != 0 {
                    return Ok(Some((link, hello)));
                }
            }
            None => tracing::warn!("something that is no rank connected to rank 0's port; dropped"),
        }
    }
    Ok(None)
}

/// The other ranks' side: tries all `candidates` in turn, again and again, until rank 0 lets it in. The place is `fixed` where
/// only rank 0 can rightly be: whoever else is there ends the start.
pub fn join(
    party: Party,
    place: &str,
    fixed: bool,
    mut candidates: impl FnMut() -> Result<Vec<Candidate>>,
) -> Result<Vec<Control>> {
    let Party { rank, size, stars, timeout } = party;
    let deadline = Instant::now() + timeout;
    let (candidate, first) = find(party, place, fixed, &mut candidates, deadline)?;
    let mut links = vec![first];
    for star in 1..stars {
        match knock(&candidate, party, star, deadline) {
            Ok(link) => links.push(link),
            // Where rank 0 has ended the start, it has said why over the first link.
            Err(failure) => {
                let told = links[0].receive(Instant::now() + HELLO).err();
                let text = || format!("{}: {}", unreached(rank, place), failure.text(&candidate));
                return Err(told.unwrap_or_else(|| Error::peer_lost(text())));
            }
        }
    }
    let welcomed = |link: Link| match link.receive(deadline + GRACE)? {
        message if message == WELCOME => Ok(Control::new(rank, size, vec![link], timeout)),
        _ => Err(Error::peer_lost(format!("what listens at {place} is not rank 0"))),
    };
    let stars = links.into_iter().map(welcomed).collect::<Result<Vec<Control>>>()?;
    if let Some(from) = stars.first().and_then(|star| star.links[0].local_ip()) {
        tracing::debug!("rank {rank} on {} ({from}) met rank 0 at {}", host(), name(&candidate.address));
    }
    Ok(stars)
}

fn find(
    party: Party,
    place: &str,
    fixed: bool,
    candidates: &mut impl FnMut() -> Result<Vec<Candidate>>,
    deadline: Instant,
) -> Result<(Candidate, Link)> {
    let mut strange_since = None;
    loop {
        let (mut kind, mut why) = (Kind::PeerLost, "nobody is there".to_string());
        let mut strange = false;
        match candidates() {
            Err(error) => (kind, why) = (error.kind(), error.to_string()),
            Ok(candidates) => {
                for candidate in candidates {
                    let failure = match knock(&candidate, party, 0, deadline) {
                        Ok(link) => return Ok((candidate, link)),
                        Err(failure) => failure,
                    };
                    // Of a dozen ports at which nobody is, the one at which there is somebody tells most.
                    if !strange {
                        why = failure.text(&candidate);
                    }
                    strange |= matches!(failure, Failure::Stranger(_));
                }
            }
        }
        let now = Instant::now();
        strange_since = if strange { strange_since.or(Some(now)) } else { None };
        if fixed && strange_since.is_some_and(|since| now - since > STRANGER) {
            return Err(Error::usage(format!(
                "{}: {why}. Another program has that port: set MASTER_PORT to one that is free on rank 0's host, on all ranks",
                unreached(party.rank, place)
            )));
        }
        if now + RETRY > deadline {
            let reached = unreached(party.rank, place);
            return Err(Error::new(kind, format!("{reached} within {:?}: {why}", party.timeout)));
        }
        std::thread::sleep(RETRY);
    }
}

fn unreached(rank: usize, place: &str) -> String {
    format!("rank {rank} on {} could not reach rank 0 at {place}", host())
}

/// Why a candidate is not rank 0.
enum Failure {
    Unreachable(String),
    /// Somebody is there, and not rank 0 of this job.
    Stranger(String),
}

impl Failure {
    fn text(&self, candidate: &Candidate) -> String {
        let at = name(&candidate.address);
        match self {
            Failure::Unreachable(why) => format!("{at}: {why}"),
            Failure::Stranger(why) => format!("what listens at {at} is not rank 0 of this job: {why}"),
        }
    }
}

/// Connects, says hello and waits until it is heard.
fn knock(candidate: &Candidate, party: Party, star: usize, deadline: Instant) -> Result<Link, Failure> {
    let socket = connect(candidate, deadline).map_err(|error| Failure::Unreachable(error.to_string()))?;
    let link = Link::new(0, socket);
    prepare(&link);
    let patience = deadline.min(Instant::now() + ANSWER);
    let mut heard = [0; 16];
    let Party { rank, size, .. } = party;
    let hello =
        Hello { version: VERSION, star: star as u32, rank: rank as u32, size: size as u32, token: candidate.token };
    link.write(&hello.to_bytes(), patience)
        .and_then(|()| link.read(&mut heard, patience))
        .map_err(|error| Failure::Stranger(format!("it gave no answer ({error})")))?;
    match heard == answer(candidate.token) {
        true => Ok(link),
        false => Err(Failure::Stranger(format!("it said \"{}\"", heard.escape_ascii()))),
    }
}

/// Whether rank 0 of this token is there and waits for its peers.
pub fn answers(candidate: &Candidate) -> bool {
    let party = Party { rank: 0, size: 0, stars: 0, timeout: ANSWER };
    knock(candidate, party, 0, Instant::now() + ANSWER).is_ok()
}

fn connect(candidate: &Candidate, deadline: Instant) -> std::io::Result<Socket> {
    let Candidate { address, from, .. } = candidate;
    let socket = Socket::new(address.domain(), Type::STREAM, None)?;
    if let Some(ip) = from {
        socket.bind(&std::net::SocketAddr::new(*ip, 0).into())?;
    }
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    socket.connect_timeout(address, left.min(ANSWER))?;
    // A port of the ephemeral range may, while nobody listens, be connected to itself.
    if address.domain() != Domain::UNIX && socket.local_addr()?.as_socket() == socket.peer_addr()?.as_socket() {
        return Err(std::io::Error::other("nobody listens yet"));
    }
    Ok(socket)
}

/// Little messages go at once, and a cut is noticed. Only TCP has these options, so a Unix socket's refusal means nothing.
fn prepare(link: &Link) {
    let _ = link.socket.set_tcp_nodelay(true);
    let _ = link::end_when_cut(&link.socket);
}

/// An address in words: `10.0.0.1:29500`.
fn name(address: &SockAddr) -> String {
    address.as_socket().map_or("the socket of this node".to_string(), |address| address.to_string())
}

/// This host's name.
pub fn host() -> impl Display {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// What tells machines apart that call themselves the same: the running kernel's boot id, where it is to be had.
pub fn machine() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_else(|_| host().to_string())
}

fn same_user(socket: &Socket) -> bool {
    socket_peercred(socket).is_ok_and(|peer| peer.uid == rustix::process::getuid())
}

fn answer(token: u64) -> [u8; 16] {
    let mut answer = [0; 16];
    answer[..8].copy_from_slice(&MAGIC);
    answer[8..].copy_from_slice(&(!token).to_le_bytes());
    answer
}

/// What a rank says when it connects, of fixed size.
#[derive(Debug, PartialEq, Eq)]
struct Hello {
    version: u32,
    star: u32,
    rank: u32,
    size: u32,
    token: u64,
}

impl Hello {
    const BYTES: usize = 32;

    fn to_bytes(&self) -> Vec<u8> {
        let numbers = [self.version, self.star, self.rank, self.size];
        let numbers = numbers.into_iter().flat_map(u32::to_le_bytes);
        MAGIC.into_iter().chain(numbers).chain(self.token.to_le_bytes()).collect()
    }

    fn from_bytes(bytes: &[u8; Self::BYTES]) -> Option<Hello> {
        let (head, token) = bytes.split_at(24);
        let [version, star, rank, size] =
            [8, 12, 16, 20].map(|at| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]));
        let token = u64::from_le_bytes(token.try_into().ok()?);
        (head[..8] == MAGIC).then_some(Hello { version, star, rank, size, token })
    }
}
