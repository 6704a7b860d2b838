//! Hosts that are network namespaces: each has an address, a name and a cable to a common switch, whose speed can be set and
//! which can be cut. All are on this machine, so files and processes are shared; the network, its ports and the abstract
//! Unix sockets are not.
//!
//! ```text
//! host a: eth0 10.99.0.1 --- port0 \
//! host b: eth0 10.99.0.2 --- port1  > bridge, in a namespace of its own
//! host c: eth0 10.99.0.3 --- port2 /
//! ```

// Every test program that includes this file uses a part of it.
#![allow(dead_code)]

use crate::common::Launched;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Where rank 0 is met: nobody else is in its host.
pub const PORT: u16 = 29500;

/// Hosts and the switch between them. Dropped, they are removed; what runs in them should have ended before.
pub struct Hosts {
    name: String,
    count: usize,
}

impl Hosts {
    /// None, with the reason on stderr, where this machine does not let us make them.
    pub fn new(count: usize) -> Option<Hosts> {
        static SERIAL: AtomicUsize = AtomicUsize::new(0);
        remove_left_behind();
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let hosts = Hosts { name: format!("{PREFIX}{}-{serial}", std::process::id()), count };
        if let Err(reason) = run(&["ip", "netns", "add", &hosts.switch()]) {
            eprintln!("skipped: no network namespaces (root and iproute2 make them): {reason}");
            return None;
        }
        hosts.build().unwrap_or_else(|reason| panic!("{reason}"));
        Some(hosts)
    }

    fn build(&self) -> Result<(), String> {
        let switch = &self.switch();
        run(&["ip", "-n", switch, "link", "add", "bridge", "type", "bridge"])?;
        run(&["ip", "-n", switch, "link", "set", "bridge", "up"])?;
        for host in 0..self.count {
            let (space, port) = (&self.namespace(host), &format!("port{host}"));
            run(&["ip", "netns", "add", space])?;
            run(&["ip", "link", "add", "eth0", "netns", space, "type", "veth", "peer", port, "netns", switch])?;
            run(&["ip", "-n", switch, "link", "set", port, "master", "bridge", "up"])?;
            run(&["ip", "-n", space, "address", "add", &format!("{}/24", address(host)), "dev", "eth0"])?;
            for link in ["lo", "eth0"] {
                run(&["ip", "-n", space, "link", "set", link, "up"])?;
            }
        }
        Ok(())
    }

    /// Every host sends at most `mbit` Mb/s (10^6) from now on, and with `delay_ms` so much later. False where this
    /// kernel cannot delay (netem); the rate holds all the same.
    pub fn shape(&self, mbit: u64, delay_ms: f64) -> bool {
        // The burst is what comes at once: a few of the largest packets that the kernel hands down, 64 KiB each.
        let (rate, burst) = (format!("{mbit}mbit"), "256kb");
        (0..self.count).all(|host| {
            let tc = |arguments: &[&str]| {
                run(&[&["tc", "-n", &self.namespace(host), "qdisc", "replace", "dev", "eth0"], arguments].concat())
            };
            tc(&["root", "handle", "1:", "tbf", "rate", &rate, "burst", burst, "latency", "10ms"]).unwrap();
            let delay = format!("{delay_ms}ms");
            delay_ms == 0.0 || tc(&["parent", "1:", "netem", "delay", &delay, "limit", "100000"]).is_ok()
        })
    }

    /// From now on packets between two hosts vanish, both ways and without a word: each knows a wrong hardware address of
    /// the other, so nobody takes them. The links stay up.
    pub fn cut(&self, one: usize, other: usize) {
        for (from, to) in [(one, other), (other, one)] {
            self.neighbour(from, to, &["replace", "lladdr", "02:00:00:00:00:ff", "nud", "permanent"]);
        }
    }

    /// Cuts a host off from all others.
    pub fn cut_off(&self, host: usize) {
        (0..self.count).filter(|other| *other != host).for_each(|other| self.cut(host, other));
    }

    /// Ends what `cut` began.
    pub fn mend(&self, one: usize, other: usize) {
        for (from, to) in [(one, other), (other, one)] {
            self.neighbour(from, to, &["delete"]);
        }
    }

    fn neighbour(&self, from: usize, to: usize, change: &[&str]) {
        let (space, to) = (&self.namespace(from), &address(to));
        let command = ["ip", "-n", space, "neighbour", change[0], to, "dev", "eth0"];
        run(&[&command, &change[1..]].concat()).unwrap();
    }

    /// A program in a host, which sees that host's name and network. The process is the program itself from its start, so
    /// signals to it reach it. Its environment is empty but for PATH.
    pub fn command(&self, host: usize, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("ip");
        command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        let rename = "hostname \"$0\" && exec \"$@\"";
        command.args(["netns", "exec", &self.namespace(host), "unshare", "--uts", "sh", "-c", rename, &name(host)]);
        command.arg(program.as_ref());
        command
    }

    /// `per_host` ranks of the program on every host, as torchrun would start them; `arguments` are those of each.
    pub fn start_ranks(&self, per_host: usize, arguments: &[&str]) -> Vec<Launched> {
        let size = self.count * per_host;
        let start = |rank: usize| {
            let variables = [
                ("RANK", rank.to_string()),
                ("WORLD_SIZE", size.to_string()),
                ("LOCAL_RANK", (rank % per_host).to_string()),
                ("LOCAL_WORLD_SIZE", per_host.to_string()),
                ("MASTER_ADDR", address(0)),
                ("MASTER_PORT", PORT.to_string()),
                // All hosts share this machine's cores.
                ("RAYON_NUM_THREADS", "1".to_string()),
            ];
            let mut command = self.command(rank / per_host, env!("CARGO_BIN_EXE_trainer"));
            Launched::start(command.envs(variables).args(arguments))
        };
        (0..size).map(start).collect()
    }

    /// For `ip -n` and `ip netns exec`.
    pub fn namespace(&self, host: usize) -> String {
        format!("{}-{}", self.name, name(host))
    }

    fn switch(&self) -> String {
        format!("{}-switch", self.name)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        // The cables go with the namespaces. What `new` did not come to make cannot be removed.
        let spaces = (0..self.count).map(|host| self.namespace(host)).chain([self.switch()]);
        spaces.filter(|space| Path::new(NAMESPACES).join(space).exists()).for_each(|space| remove(&space));
    }
}

/// `a`, `b`, and so on.
pub fn name(host: usize) -> String {
    char::from(b'a' + host as u8).to_string()
}

/// Of a host's `eth0`.
pub fn address(host: usize) -> String {
    format!("10.99.0.{}", host + 1)
}

const PREFIX: &str = "lockstep-test-";
const NAMESPACES: &str = "/run/netns";

/// What tests that were killed could not remove.
fn remove_left_behind() {
    for entry in fs::read_dir(NAMESPACES).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            remove(&name);
        }
    }
}

fn remove(space: &str) {
    // Another test may be removing what was left behind, too.
    let _ = run(&["ip", "netns", "delete", space]);
}

/// Its error is what the command said.
fn run(command: &[&str]) -> Result<(), String> {
    let said = |reason: &dyn std::fmt::Display| format!("`{}`: {reason}", command.join(" "));
    let output = Command::new(command[0]).args(&command[1..]).output().map_err(|error| said(&error))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(said(&String::from_utf8_lossy(&output.stderr).trim())),
    }
}
