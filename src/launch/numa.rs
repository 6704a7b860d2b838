//! The NUMA node next to a GPU, and how a rank gets there. A machine of several nodes has each GPU at one of them; what a rank
//! on another node launches and copies crosses the link between the two. So a rank's threads are bound to the cores of its
//! GPU's node. Memory that is first written after that follows them: Linux gives a page from the node of the core that writes
//! it first, unless the launcher wants it otherwise (`numactl`, `srun --mem-bind`), and then that holds.

use super::cores;
use crate::error::Result;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{env, fmt, fs};

/// Names the folder that is read in place of /sys.
const SYSFS: &str = "LOCKSTEP_SYSFS";

/// A NUMA node that has cores.
#[derive(Debug, PartialEq)]
pub struct Node {
    number: usize,
    cores: BTreeSet<usize>,
    /// The same as Linux writes it: `0-15,32-47`.
    list: String,
}

/// Binds this process, with all its threads, to the cores of the node next to the device at this place of the PCI bus. Says
/// what was done, or why nothing, behind "rank 0".
pub fn bind_near(bus_id: &str) -> Result<String> {
    let Some(node) = Node::next_to(bus_id) else {
        return Ok("keeps its cores: the system does not tell which NUMA node its GPU is next to".to_owned());
    };
    match node.near(&cores::of_this_process()?) {
        Ok(near) => {
            cores::bind(&near)?;
            Ok(format!("is bound to {node}, next to its GPU"))
        }
        Err(why) => Ok(format!("keeps its cores: {why}")),
    }
}

impl Node {
    /// The one next to the device at this place of the PCI bus, `0000:3b:00.0`. None where Linux does not know, as in many a
    /// virtual machine.
    pub fn next_to(bus_id: &str) -> Option<Node> {
        let sysfs = env::var_os(SYSFS).map_or_else(|| PathBuf::from("/sys"), PathBuf::from);
        Node::read(&sysfs, bus_id)
    }

    fn read(sysfs: &Path, bus_id: &str) -> Option<Node> {
        let read = |path: String| fs::read_to_string(sysfs.join(path)).ok();
        // -1 where it is not known.
        let number = read(format!("bus/pci/devices/{bus_id}/numa_node"))?.trim().parse().ok()?;
        let list = read(format!("devices/system/node/node{number}/cpulist"))?.trim().to_owned();
        Some(Node { number, cores: cores::parse(&list)?, list })
    }

    /// The cores for a process that may use `allowed`; an error says why it is to keep these.
    fn near(&self, allowed: &BTreeSet<usize>) -> Result<BTreeSet<usize>, String> {
        let near = &self.cores & allowed;
        if near.is_empty() {
            return Err(format!("none of them is of {self}, next to its GPU"));
        }
        if near.len() == allowed.len() {
            return Err(format!("all of them are of {self}, next to its GPU"));
        }
        if allowed.len() <= self.cores.len() {
            return Err(format!("they are {}, no more than those of {self}, next to its GPU", allowed.len()));
        }
        if 2 * near.len() < self.cores.len() {
            return Err(format!("only {} of them are of {self}, next to its GPU", near.len()));
        }
        Ok(near)
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NUMA node {} (cores {})", self.number, self.list)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine of two nodes with four cores each, and what it says of its devices.
    fn machine(devices: &[(&str, &str)]) -> tempfile::TempDir {
        let sysfs = tempfile::tempdir().unwrap();
        let write = |path: String, text: &str| {
            let path = sysfs.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        };
        for (number, list) in ["0-1,4-5", "2-3,6-7", ""].into_iter().enumerate() {
            write(format!("devices/system/node/node{number}/cpulist"), list);
        }
        for (bus_id, node) in devices {
            write(format!("bus/pci/devices/{bus_id}/numa_node"), node);
        }
        sysfs
    }

    #[test]
    fn a_device_is_next_to_the_node_that_linux_says() {
        let devices = [("0000:3b:00.0", "1"), ("0000:3c:00.0", "-1"), ("0000:3d:00.0", "2"), ("0000:3e:00.0", "9")];
        let sysfs = machine(&devices);
        let node = |bus_id| Node::read(sysfs.path(), bus_id);
        let one = node("0000:3b:00.0").unwrap();
        assert_eq!((one.number, &one.cores), (1, &BTreeSet::from([2, 3, 6, 7])));
        assert_eq!(one.to_string(), "NUMA node 1 (cores 2-3,6-7)");
        for unknown in ["0000:3c:00.0", "0000:3d:00.0", "0000:3e:00.0", "0000:3f:00.0"] {
            assert_eq!(node(unknown), None, "{unknown}: not known, without cores, not there");
        }
    }

    #[test]
    fn only_who_may_use_more_than_a_node_is_bound() {
        let sysfs = machine(&[("gpu", "0")]);
        let node = Node::read(sysfs.path(), "gpu").unwrap();
        let near = |allowed: &[usize]| node.near(&allowed.iter().copied().collect());
        assert_eq!(near(&[0, 1, 2, 3, 4, 5, 6, 7]), Ok(BTreeSet::from([0, 1, 4, 5])));
        assert_eq!(near(&[0, 1, 2, 3, 4, 6, 7]), Ok(BTreeSet::from([0, 1, 4])), "a core is reserved for the system");
        for (allowed, why) in [
            (&[2, 3, 6, 7][..], "none of them is of NUMA node 0 (cores 0-1,4-5)"),
            (&[0, 1, 4, 5], "all of them are of NUMA node 0"),
            (&[1, 4], "all of them are"),
            (&[1, 2, 3], "they are 3, no more than those of NUMA node 0"),
            (&[0, 1, 2, 3], "they are 4, no more than"),
            (&[1, 2, 3, 6, 7], "only 1 of them are of NUMA node 0"),
        ] {
            let error = near(allowed).unwrap_err();
            assert!(error.contains(why), "{allowed:?}: {error}");
        }
    }
}
