//! Which ranks share a host, and a star of their own for those that do.

use super::{Control, Party, ways};
use crate::error::{Error, Result};
use std::hash::{BuildHasher, RandomState};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

/// Ranks of one host have all been met before.
const MEETING: Duration = Duration::from_secs(10);

impl Control {
    /// What ranks that can share memory have in common, by rank and equal on all: the running kernel, and the network
    /// namespace, in which the sockets live that pass descriptors. Collective.
    pub fn hosts(&mut self) -> Result<Vec<Vec<u8>>> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        let network = std::fs::metadata("/proc/self/ns/net");
        let key = match boot.ok().zip(network.ok()) {
            Some((boot, network)) => format!("{} {} {}", boot.trim(), network.dev(), network.ino()),
            // Without these nothing is known to be shared.
            None => format!("rank {}", self.rank),
        };
        self.all_gather(key.as_bytes())
    }

    /// A star among `members`, the ranks of this rank's host in order; `None` for one alone. Their errors name them by their
    /// ranks in the world. Collective over the world.
    pub fn star_of(&mut self, members: &[usize]) -> Result<Option<Control>> {
        let random = RandomState::new().hash_one(std::process::id());
        let token = self.broadcast(format!("lockstep-{random:016x}").as_bytes())?;
        if members.len() < 2 {
            return Ok(None);
        }
        let name = format!("{}-{}", String::from_utf8_lossy(&token), members[0]);
        let position = members.iter().position(|&rank| rank == self.rank);
        let position = position.ok_or_else(|| Error::internal("this rank is not among the ranks of its host"))?;
        let party = Party { rank: position, size: members.len(), stars: 1, timeout: MEETING };
        let mut star = ways::at_socket(party, &name)
            .map(|mut stars| stars.remove(0))
            .map_err(|e| e.context("the ranks of a host meeting (`[parallel] transport = \"tcp\"` does without)"))?;
        star.timeout = self.timeout;
        star.links.iter_mut().for_each(|link| link.peer = members[link.peer]);
        Ok(Some(star))
    }
}
