//! The ways in which ranks of several processes find rank 0: at a socket of their node, at ports that all know, or by a note
//! that rank 0 leaves in a shared folder or with the process manager.

use super::address::{self, Address};
use super::pmi;
use super::star::{self, Candidate, Party};
use super::{Control, host};
use crate::atomic_file;
use crate::error::{Context, Error, Kind, Result};
use socket2::{Domain, SockAddr, Socket, Type};
use std::fmt;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Ranks of one node meet at an abstract socket, which has no file that could stay behind. `name` must be the same for all
/// ranks of the job and no other job's.
pub fn at_socket(party: Party, name: &str) -> Result<Vec<Control>> {
    let address = SockAddr::unix(format!("\0{name}")).or_kind(Kind::Internal, format!("abstract socket {name}"))?;
    let place = format!("the abstract socket {name}");
    if party.rank == 0 {
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None)
            .and_then(|socket| socket.bind(&address).and_then(|()| socket.listen(1024)).map(|()| socket))
            .or_kind(Kind::Internal, format!("rank 0 listening at {place} for its peers"))?;
        return star::gather(party, 0, listener, &place);
    }
    star::join(party, &place, false, || Ok(vec![Candidate { address: address.clone(), from: None, token: 0 }]))
}

/// Rank 0 listens at the first of `ports` that is free on its host, `master`, and the others try each, by whatever way there
/// is: `master` may be in another network than the interface that was chosen for the data.
pub fn at_ports(party: Party, master: &str, ports: &[u16], job: &str, interface: &Interface) -> Result<Vec<Control>> {
    let [a, b, c, d, e, f, g, h, ..] = *blake3::hash(job.as_bytes()).as_bytes();
    let token = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    if party.rank == 0 {
        // At every interface: MASTER_ADDR may be a name that resolves to a loopback address on its own host.
        let ipv6 = (master, 0).to_socket_addrs().is_ok_and(|mut found| found.all(|address| address.is_ipv6()));
        let (listener, port) = listen_at_one_of(any(ipv6), ports)?;
        let place = format!("{master}:{port}");
        say_waiting(party, &place, interface);
        return star::gather(party, token, listener, &place);
    }
    let place = match ports {
        [port] => format!("{master}:{port}"),
        _ => format!("{master}, ports {ports:?}"),
    };
    star::join(party, &place, ports.len() == 1, || {
        // Resolved anew each time: a cluster's name service may learn of a host late.
        let resolved = (master, 0).to_socket_addrs().or_kind(
            Kind::Usage,
            format!("the name {master} does not resolve on {}; set MASTER_ADDR to rank 0's address", host()),
        )?;
        let ips: Vec<IpAddr> = resolved.map(|address| address.ip()).collect();
        let at = |port: u16| ips.iter().map(move |ip| SocketAddr::new(*ip, port));
        let candidates = ports.iter().flat_map(|port| at(*port));
        Ok(candidates.map(|address| Candidate { address: address.into(), from: None, token }).collect())
    })
}

fn listen_at_one_of(ip: IpAddr, ports: &[u16]) -> Result<(Socket, u16)> {
    let mut last = None;
    for port in ports {
        match listen(SocketAddr::new(ip, *port)) {
            Ok(listening) => return Ok(listening),
            Err(error) => last = Some(error),
        }
    }
    let why = last.map(|error| error.to_string()).unwrap_or_default();
    Err(Error::usage(match ports {
        [port] => format!(
            "rank 0 on {} cannot listen at port {port}, which MASTER_PORT names: {why}. `ss -ltnp` shows who has it; set \
             MASTER_PORT to a free one, on all ranks",
            host()
        ),
        _ => format!(
            "rank 0 on {} cannot listen at any of the ports {ports:?} that follow from the job: {why}; set MASTER_PORT to a \
             free one, on all ranks",
            host()
        ),
    }))
}

fn say_waiting(party: Party, place: &str, interface: &Interface) {
    let addresses: Vec<String> = interface.addresses.iter().map(Address::to_string).collect();
    let (addresses, what) = (addresses.join(", "), if interface.chosen { "data go over" } else { "this host has" });
    tracing::debug!("rank 0 on {} waits for {} peers at {place}; {what} {addresses}", host(), party.size - 1);
}

/// What stands for every address of this host.
pub fn any(ipv6: bool) -> IpAddr {
    if ipv6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) }
}

fn listen(address: SocketAddr) -> std::io::Result<(Socket, u16)> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(1024)?;
    let port = socket.local_addr()?.as_socket().map_or(0, |address| address.port());
    Ok((socket, port))
}

/// Rank 0 leaves a note in a folder that all hosts share, and takes it away once all have met. One of an earlier run, which
/// was killed, is recognised by nobody answering there with its token, and replaced.
pub fn through_folder(party: Party, folder: &Path, job: &str, interface: &Interface) -> Result<Vec<Control>> {
    if !folder.is_dir() {
        return Err(Error::usage(format!(
            "LOCKSTEP_RENDEZVOUS: there is no folder {} on {}; give one that all hosts share",
            folder.display(),
            host()
        )));
    }
    let job = if job.is_empty() { format!("{}-ranks", party.size) } else { job.to_string() };
    let safe = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let file = folder.join(format!("lockstep-{}.rendezvous", job.chars().map(safe).collect::<String>()));
    let place = file.display().to_string();
    if party.rank == 0 {
        if let Some(other) = fs::read_to_string(&file).ok().and_then(|text| Note::parse(&text))
            && other.candidates(None).iter().any(star::answers)
        {
            return Err(Error::usage(format!(
                "another run, on {}, is meeting in {place} at this moment; give each run a folder of its own",
                other.host
            )));
        }
        let (listener, note) = Note::of_listener(interface)?;
        let at = format!("{} ({place})", note.place());
        let what = format!("rank 0 on {} leaving its address in {place} (LOCKSTEP_RENDEZVOUS)", host());
        atomic_file::replace(&file, format!("{note}\n").as_bytes()).or_kind(Kind::Usage, what)?;
        let _left = Left { file, token: note.token };
        say_waiting(party, &at, interface);
        return star::gather(party, note.token, listener, &at);
    }
    star::join(party, &place, false, || {
        let unread = "reading it (is the folder shared by all hosts, and has rank 0 started?)";
        let text = fs::read_to_string(&file).or_kind(Kind::PeerLost, unread)?;
        let note = Note::parse(&text).ok_or_else(|| Error::peer_lost("there is another file of that name"))?;
        Ok(note.candidates(interface.chosen_ip()))
    })
}

/// The note in the folder; dropped, it is taken away, unless it is already another's.
struct Left {
    file: PathBuf,
    token: u64,
}

impl Drop for Left {
    fn drop(&mut self) {
        let is_ours = |text: String| Note::parse(&text).is_some_and(|note| note.token == self.token);
        if fs::read_to_string(&self.file).is_ok_and(is_ours) {
            let _ = fs::remove_file(&self.file);
        }
    }
}

/// By the process manager that started all ranks, at the other end of `fd`.
pub fn through_pmi(party: Party, fd: i32, one_node: bool, interface: &Interface) -> Result<Vec<Control>> {
    let broadcast = |text: &str, deadline| pmi::broadcast(fd, party.rank, text, deadline);
    through_broadcast(party, "PMI", one_node, interface, broadcast)
}

/// Rank 0's note, or on one node the name of its socket, goes to the others by `broadcast`, which gives every rank what rank 0
/// gives it, by the deadline. `by` names it in messages.
pub fn through_broadcast(
    party: Party,
    by: &str,
    one_node: bool,
    interface: &Interface,
    broadcast: impl FnOnce(&str, Instant) -> Result<String>,
) -> Result<Vec<Control>> {
    let deadline = Instant::now() + party.timeout;
    if one_node {
        let name = format!("lockstep-{:016x}", RandomState::new().hash_one(party.size));
        return at_socket(party, &broadcast(&name, deadline)?);
    }
    if party.rank == 0 {
        let (listener, note) = Note::of_listener(interface)?;
        broadcast(&note.to_string(), deadline)?;
        let at = format!("{} ({by})", note.place());
        say_waiting(party, &at, interface);
        return star::gather(party, note.token, listener, &at);
    }
    let text = broadcast("", deadline)?;
    let unknown = || Error::internal(format!("{by} passed on \"{text}\", which rank 0 did not say"));
    let note = Note::parse(&text).ok_or_else(unknown)?;
    let place = format!("the address that {by} passes on");
    star::join(party, &place, false, || Ok(note.candidates(interface.chosen_ip())))
}

/// The addresses of this host that may be used: one, if the user chose.
pub struct Interface {
    pub addresses: Vec<Address>,
    pub chosen: bool,
}

impl Interface {
    /// By its name or network, `[parallel] interface`; without, any.
    pub fn choose(choice: Option<&str>) -> Result<Interface> {
        let mut addresses = address::of_this_host(choice)?;
        addresses.truncate(if choice.is_some() { 1 } else { addresses.len() });
        Ok(Interface { addresses, chosen: choice.is_some() })
    }

    pub fn chosen_ip(&self) -> Option<IpAddr> {
        self.addresses.first().filter(|_| self.chosen).map(|address| address.ip)
    }
}

/// Where rank 0 listens, in a form that a file and a process manager can hold: `lockstep;2;TOKEN;HOST;ADDRESS;ADDRESS`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Note {
    token: u64,
    host: String,
    addresses: Vec<SocketAddr>,
}

impl Note {
    const HEAD: &str = "lockstep;2;";

    /// Of a listener at a port of the system's choice.
    fn of_listener(interface: &Interface) -> Result<(Socket, Note)> {
        let addresses = interface.addresses.iter();
        let ip = interface.chosen_ip().unwrap_or(any(addresses.clone().all(|address| address.ip.is_ipv6())));
        let (listener, port) = listen(SocketAddr::new(ip, 0)).or_kind(Kind::Internal, "listening for peers")?;
        let note = Note {
            token: RandomState::new().hash_one(port),
            host: host().to_string(),
            addresses: addresses.map(|address| SocketAddr::new(address.ip, port)).collect(),
        };
        Ok((listener, note))
    }

    fn place(&self) -> String {
        self.addresses.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(" or ")
    }

    fn parse(text: &str) -> Option<Note> {
        let mut parts = text.trim().strip_prefix(Note::HEAD)?.split(';');
        let token = u64::from_str_radix(parts.next()?, 16).ok()?;
        let host = parts.next()?.to_string();
        let addresses: Vec<SocketAddr> = parts.map(|part| part.parse().ok()).collect::<Option<_>>()?;
        Some(Note { token, host, addresses })
    }

    fn candidates(&self, from: Option<IpAddr>) -> Vec<Candidate> {
        let candidate = |address: &SocketAddr| Candidate { address: (*address).into(), from, token: self.token };
        self.addresses.iter().map(candidate).collect()
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:016x};{}", Note::HEAD, self.token, self.host)?;
        self.addresses.iter().try_for_each(|address| write!(f, ";{address}"))
    }
}
