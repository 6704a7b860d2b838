//! The addresses of this host by which other hosts may reach it.

use crate::error::{Context, Error, Kind, Result};
use if_addrs::{IfOperStatus, get_if_addrs};
use std::fmt;
use std::net::IpAddr;
use std::path::Path;

/// An address of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    pub interface: String,
    pub ip: IpAddr,
    /// Whether a device is behind the interface, and not a bridge or a tunnel.
    pub hardware: bool,
}

/// The addresses on the chosen interface, by its name (`eth0`) or its network (`10.0.0.0/8`). Without a choice, all but
/// those of the loopback, devices before bridges and tunnels; the loopback's where there is no other. They are of one
/// family, IPv4 where there is any. An unknown choice is of kind Usage and lists what there is.
pub fn of_this_host(choice: Option<&str>) -> Result<Vec<Address>> {
    let interfaces = get_if_addrs().or_kind(Kind::Internal, "listing the addresses of this host")?;
    let up =
        |interface: &if_addrs::Interface| interface.oper_status != IfOperStatus::Down && !interface.is_link_local();
    let all = interfaces.into_iter().filter(up).map(|interface| Address {
        hardware: Path::new("/sys/class/net").join(&interface.name).join("device").exists(),
        ip: interface.ip(),
        interface: interface.name,
    });
    select(all.collect(), choice)
}

fn select(all: Vec<Address>, choice: Option<&str>) -> Result<Vec<Address>> {
    let chosen: Vec<Address> = match choice {
        Some(choice) => all.iter().filter(|address| address.is_on(choice)).cloned().collect(),
        None => {
            let mut outward: Vec<Address> = all.iter().filter(|address| !address.ip.is_loopback()).cloned().collect();
            outward.sort_by_key(|address| !address.hardware);
            if outward.is_empty() { all.clone() } else { outward }
        }
    };
    if let (Some(choice), true) = (choice, chosen.is_empty()) {
        let known: Vec<String> = all.iter().map(Address::to_string).collect();
        return Err(Error::usage(format!(
            "[parallel] interface = \"{choice}\" is none of the interfaces of {}, nor a network of theirs; there are {}",
            super::host(),
            known.join(", ")
        )));
    }
    let ipv4 = chosen.iter().any(|address| address.ip.is_ipv4());
    Ok(chosen.into_iter().filter(|address| address.ip.is_ipv4() == ipv4).collect())
}

impl Address {
    fn is_on(&self, choice: &str) -> bool {
        self.interface == choice || network(choice).is_some_and(|network| network.holds(self.ip))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.interface, self.ip)
    }
}

/// `10.0.0.0/8`
struct Network {
    base: IpAddr,
    prefix: u32,
}

fn network(text: &str) -> Option<Network> {
    let (base, prefix) = text.split_once('/')?;
    let (base, prefix): (IpAddr, u32) = (base.parse().ok()?, prefix.parse().ok()?);
    (prefix <= if base.is_ipv4() { 32 } else { 128 }).then_some(Network { base, prefix })
}

impl Network {
    fn holds(&self, ip: IpAddr) -> bool {
        // Both as 128 bits, the significant ones on top.
        let bits = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => u128::from(ip.to_bits()) << 96,
            IpAddr::V6(ip) => ip.to_bits(),
        };
        let differing = bits(self.base) ^ bits(ip);
        self.base.is_ipv4() == ip.is_ipv4() && differing.leading_zeros() >= self.prefix
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Vec<Address> {
        [
            ("lo", "127.0.0.1", false),
            ("br0", "172.17.0.1", false),
            ("eth0", "10.1.2.3", true),
            ("eth0", "fd00::3", true),
        ]
        .map(|(name, ip, hardware)| Address { interface: name.into(), ip: ip.parse().unwrap(), hardware })
        .to_vec()
    }

    fn ips(choice: Option<&str>) -> Vec<String> {
        select(host(), choice).unwrap().iter().map(|address| address.ip.to_string()).collect()
    }

    #[test]
    fn addresses_are_chosen_by_name_by_network_or_by_what_others_reach_most_likely() {
        assert_eq!(ips(None), ["10.1.2.3", "172.17.0.1"], "devices first");
        assert_eq!(ips(Some("eth0")), ["10.1.2.3"]);
        assert_eq!(ips(Some("lo")), ["127.0.0.1"]);
        assert_eq!(ips(Some("10.0.0.0/8")), ["10.1.2.3"]);
        assert_eq!(ips(Some("172.17.0.1/32")), ["172.17.0.1"]);
        assert_eq!(ips(Some("fd00::/16")), ["fd00::3"]);
        let lonely = select(host()[..1].to_vec(), None).unwrap();
        assert_eq!(lonely[0].ip.to_string(), "127.0.0.1", "a host without a network");
    }

    #[test]
    fn an_unknown_interface_is_refused_with_those_that_there_are() {
        for choice in ["ib0", "10.2.0.0/16", "10.0.0.0/40", "10.0.0/8", "/", ""] {
            let error = select(host(), Some(choice)).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage);
            let text = error.to_string();
            assert!(text.contains(&format!("interface = \"{choice}\"")), "{text}");
            assert!(text.contains("lo (127.0.0.1), br0 (172.17.0.1), eth0 (10.1.2.3)"), "{text}");
        }
    }
}
