//! Where hosts may be. A registered address is what the control plane connects to, so a stolen token must not point it at itself, at a
//! metadata service or at another machine of the operator's.

use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Network {
    first: u128,
    prefix: u8,
    is_v4: bool,
}

/// Networks in which addresses of hosts may lie.
#[derive(Debug, Clone, Default)]
pub struct Networks {
    /// Empty: everything but what is never another machine.
    given: Vec<Network>,
    allowed: Vec<IpAddr>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a network")]
pub struct NotANetwork(String);

impl Networks {
    pub fn allow(&mut self, address: IpAddr) {
        self.allowed.push(address);
    }

    pub fn has(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        if self.allowed.contains(&address) {
            return true;
        }
        if self.given.is_empty() { is_another_machine(address) } else { self.given.iter().any(|n| n.has(address)) }
    }
}

fn is_another_machine(address: IpAddr) -> bool {
    let is_link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4 == Ipv4Addr::BROADCAST || v4.octets()[0] == 0,
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(address.is_loopback() || address.is_multicast() || address.is_unspecified() || is_link_local)
}

impl Network {
    fn has(&self, address: IpAddr) -> bool {
        let (bits, is_v4, width) = bits(address);
        let shift = u32::from(width - self.prefix);
        let same = |value: u128| value.checked_shr(shift).unwrap_or(0);
        is_v4 == self.is_v4 && same(bits) == same(self.first)
    }
}

fn bits(address: IpAddr) -> (u128, bool, u8) {
    match address {
        IpAddr::V4(v4) => (u128::from(u32::from(v4)), true, 32),
        IpAddr::V6(v6) => (u128::from(v6), false, 128),
    }
}

impl FromStr for Networks {
    type Err = NotANetwork;

    fn from_str(text: &str) -> Result<Self, NotANetwork> {
        let given =
            text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(network).collect::<Result<_, _>>()?;
        Ok(Self { given, allowed: Vec::new() })
    }
}

fn network(text: &str) -> Result<Network, NotANetwork> {
    let wrong = || NotANetwork(text.chars().take(64).collect());
    let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let (first, is_v4, width) = bits(address.parse().map_err(|_| wrong())?);
    let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
    if prefix > width {
        return Err(wrong());
    }
    Ok(Network { first, prefix, is_v4 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_settings_every_address_but_this_machine_and_its_neighbours_is_fine() {
        let networks = Networks::default();
        for (address, fine) in [
            ("10.1.2.3", true),
            ("203.0.113.9", true),
            ("2001:db8::1", true),
            ("127.0.0.1", false),
            ("::1", false),
            ("::ffff:127.0.0.1", false),
            ("169.254.169.254", false),
            ("fe80::1", false),
            ("0.0.0.0", false),
            ("224.0.0.1", false),
        ] {
            assert_eq!(networks.has(address.parse().unwrap()), fine, "{address}");
        }
    }

    #[test]
    fn given_networks_replace_the_rule() {
        let networks: Networks = "127.0.0.0/8, fd00::/8".parse().unwrap();
        assert!(networks.has("127.9.9.9".parse().unwrap()));
        assert!(networks.has("fd12::1".parse().unwrap()));
        assert!(!networks.has("10.0.0.1".parse().unwrap()));
        assert!("0.0.0.0/0".parse::<Networks>().unwrap().has("10.0.0.1".parse().unwrap()));
        for wrong in ["10.0.0.0", "10.0.0.0/33", "x/8"] {
            assert!(wrong.parse::<Networks>().is_err(), "{wrong}");
        }
    }
}
