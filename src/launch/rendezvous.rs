//! How ranks find each other: a star of streams with rank 0 in the middle, over which they agree on what is needed to
//! build everything else (addresses, descriptors, digests). The launcher of `-n` makes socket pairs that its children inherit;
//! ranks that another launcher started find rank 0 in one of several `ways`, and what is made is the same.
//!
//! Messages go 2 (N - 1) times over a link an operation: enough for a start-up, not meant for gradients.

mod address;
mod hosts;
mod pmi;
mod star;
pub mod ways;

pub use star::{Party, host, machine};

use super::link::{self, Link};
use crate::error::{Context, Error, Kind, Result};
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
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
    /// The address of this host by which data are to go, if one was chosen.
    data_ip: Option<IpAddr>,
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

    /// A star of ranks of one node, which meet at an abstract socket. `name` must be the same for all of them and no others'.
    pub fn abstract_unix(rank: usize, size: usize, name: &str, timeout: Duration) -> Result<Control> {
        Ok(ways::at_socket(Party { rank, size, stars: 1, timeout }, name)?.remove(0))
    }

    fn new(rank: usize, size: usize, links: Vec<Link>, timeout: Duration) -> Control {
        Control { rank, size, links, timeout, data_ip: None, passing: None }
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
    /// Connections for data are to use this address of this host, if any, whatever the network in which the ranks have met.
    pub fn choose_data_ip(&mut self, ip: Option<IpAddr>) {
        self.data_ip = ip;
    }
    pub fn data_ip(&self) -> Option<IpAddr> {
        self.data_ip
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

    /// Address at which other ranks reach this one: the one that was chosen, else that of its link to rank 0; `None` if
    /// rank 0 is on the same host (or this is rank 0).
    pub fn own_ip(&self) -> Option<IpAddr> {
        if self.data_ip.is_some() || self.rank == 0 {
            return self.data_ip;
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

#[cfg(test)]
mod tests;
