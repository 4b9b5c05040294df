//! One slot: its number, its addresses, its namespace with veth, rules and tap.

use std::fmt;
use std::io;
use std::net::Ipv4Addr;

use tracing::warn;

use super::conntrack::{self, Flow};
use super::{GATEWAY_IP, GUEST_IP, GUEST_MAC, NetworkError, TAP_MAC, namespace, rules};
use crate::tool::{self, ip_batch};

/// The guest's card on this side, in the slot's namespace.
pub const TAP: &str = "tap0";

/// 1 to 32767: what fits into a /16 of /31s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(u16);

impl SlotId {
    pub const MAX: u16 = 32767;

    pub fn new(number: u16) -> Option<Self> {
        (1..=Self::MAX).contains(&number).then_some(Self(number))
    }

    pub fn number(self) -> u16 {
        self.0
    }

    /// 10.11.0.0/16: by it the agent addresses the guest.
    pub fn host_ip(self) -> Ipv4Addr {
        let [high, low] = self.0.to_be_bytes();
        Ipv4Addr::new(10, 11, high, low)
    }

    /// 10.12.0.0/16: the outer and the inner end of the veth, a /31.
    fn link_ips(self) -> (Ipv4Addr, Ipv4Addr) {
        let [high, low] = (self.0 * 2).to_be_bytes();
        (Ipv4Addr::new(10, 12, high, low), Ipv4Addr::new(10, 12, high, low + 1))
    }

    pub fn namespace(self, tag: &str) -> String {
        format!("wrn-{tag}-{}", self.0)
    }

    fn outer_link(self) -> String {
        format!("s{}", self.0)
    }
}

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Makes the slot from nothing: what is left of an earlier attempt goes first. Blocks for some tens of milliseconds.
pub fn make(tag: &str, outer: &str, slot: SlotId, deny: &[String]) -> Result<(), NetworkError> {
    let tool = |what| move |cause| NetworkError::Tool { what, cause };
    remove(tag, outer, slot)?;
    let name = slot.namespace(tag);
    let (link, (outer_ip, inner_ip), host_ip) = (slot.outer_link(), slot.link_ips(), slot.host_ip());
    ip_batch(None, &format!("netns add {name}\n")).map_err(tool("make the slot's namespace"))?;
    let lines = format!(
        "link add {link} type veth peer name up0 netns {name}
addr add {outer_ip}/31 dev {link}
link set {link} up
"
    );
    ip_batch(Some(outer), &lines).map_err(tool("make the slot's link"))?;
    // Closed before it is connected: the rules are in force before anything inside is up.
    namespace::inside(&name, || -> Result<(), NetworkError> {
        let sysctl = |cause| NetworkError::Io { what: "set up the slot's kernel settings", cause };
        for at in ["all", "default"] {
            namespace::set_sysctl(&format!("ipv6/conf/{at}/disable_ipv6"), "1").map_err(sysctl)?;
            namespace::set_sysctl(&format!("ipv4/conf/{at}/rp_filter"), "0").map_err(sysctl)?;
            // Answers for the gateway's address only, and asks in no other's name.
            namespace::set_sysctl(&format!("ipv4/conf/{at}/arp_ignore"), "1").map_err(sysctl)?;
            namespace::set_sysctl(&format!("ipv4/conf/{at}/send_redirects"), "0").map_err(sysctl)?;
        }
        namespace::set_sysctl("ipv4/ip_forward", "1").map_err(sysctl)?;
        tool::run("nft", &["-f", "-"], &rules::slot(slot, deny)).map_err(tool("load the slot's rules"))?;
        let lines = format!(
            "link set lo up
addr add {inner_ip}/31 dev up0
link set up0 up
route add default via {outer_ip}
tuntap add dev tap0 mode tap
link set tap0 address {TAP_MAC}
addr add {GATEWAY_IP}/30 dev tap0
link set tap0 up
neigh replace {GUEST_IP} lladdr {GUEST_MAC} dev tap0 nud permanent
"
        );
        ip_batch(None, &lines).map_err(tool("set up the slot's links"))
    })
    .map_err(|cause| NetworkError::Io { what: "enter the slot's namespace", cause })??;
    ip_batch(Some(outer), &format!("route replace {host_ip}/32 via {inner_ip}\n"))
        .map_err(tool("route to the slot"))?;
    Ok(())
}

/// Removing the namespace takes links, rules, routes and connections with it. Also for what is not there.
pub fn remove(tag: &str, outer: &str, slot: SlotId) -> Result<(), NetworkError> {
    let was_there = remove_namespace(tag, slot)?;
    remove_ends(outer, slot, was_there);
    Ok(())
}

/// The first part of it, after which nothing can use the slot any more; whether there was one.
pub fn remove_namespace(tag: &str, slot: SlotId) -> Result<bool, NetworkError> {
    let name = slot.namespace(tag);
    let was_there = namespace::path(&name).exists();
    namespace::remove(&name).map_err(|cause| NetworkError::Io { what: "remove the slot's namespace", cause })?;
    Ok(was_there)
}

/// The rest of it: what there is outside of the namespace. The kernel takes some tens of milliseconds for it.
pub fn remove_ends(outer: &str, slot: SlotId, was_there: bool) {
    // A namespace that a process still holds dies later; its end in the outer namespace would be in the way of the next one.
    if namespace::exists(outer) {
        let link = slot.outer_link();
        let there =
            namespace::inside(outer, || std::path::Path::new(&format!("/proc/sys/net/ipv4/conf/{link}")).exists());
        if there.unwrap_or(false) {
            // It may vanish by itself meanwhile, which is as good.
            let _ = ip_batch(Some(outer), &format!("link del {link}\n"));
        }
        // Now that nothing can make new ones.
        if was_there && let Err(error) = forget_flows(outer, slot) {
            warn!(slot = slot.0, "flows of the network slot {slot} stay until the kernel forgets them: {error}");
        }
    }
}

/// In the outer namespace and on the host.
fn forget_flows(outer: &str, slot: SlotId) -> io::Result<()> {
    let addresses = [slot.link_ips().1, slot.host_ip()];
    let flows = namespace::inside(outer, || -> io::Result<Vec<Flow>> {
        let mut flows = conntrack::flows()?;
        flows.retain(|flow| addresses.iter().any(|address| flow.touches(*address)));
        conntrack::delete(flows.iter().map(Flow::asked))?;
        Ok(flows)
    })??;
    conntrack::delete(flows.iter().map(Flow::sent))?;
    Ok(())
}

/// Whether there is anything of it.
pub fn exists(tag: &str, slot: SlotId) -> bool {
    namespace::exists(&slot.namespace(tag))
}

/// Whether the slot is whole: an interrupted `make` is not.
pub fn is_whole(tag: &str, slot: SlotId) -> bool {
    let name = slot.namespace(tag);
    namespace::exists(&name)
        && namespace::inside(&name, || {
            tool::run("ip", &["neigh", "show", "dev", "tap0"], "").is_ok_and(|said| said.contains("PERMANENT"))
        })
        .unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_slots_do_not_meet() {
        let ips = |n| {
            let slot = SlotId::new(n).unwrap();
            (slot.host_ip().to_string(), slot.link_ips().0.to_string(), slot.link_ips().1.to_string())
        };
        assert_eq!(ips(1), ("10.11.0.1".into(), "10.12.0.2".into(), "10.12.0.3".into()));
        assert_eq!(ips(128), ("10.11.0.128".into(), "10.12.1.0".into(), "10.12.1.1".into()));
        assert_eq!(ips(32767), ("10.11.127.255".into(), "10.12.255.254".into(), "10.12.255.255".into()));
        assert_eq!((SlotId::new(0), SlotId::new(32768)), (None, None));
    }
}
