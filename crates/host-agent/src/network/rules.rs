//! The rule sets: of a slot, of the outer namespace, of the host. Each is one atomic transaction that replaces what was there.

use std::net::Ipv4Addr;

use super::{GATEWAY_IP, GUEST_IP, GUEST_MAC, SlotId};

/// What no guest may ever reach: private, shared, link-local, metadata, documentation, benchmark, multicast and reserved ranges
/// (IANA special-purpose registry).
pub const NEVER: [&str; 16] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "255.255.255.255/32",
];

/// Flows of one guest at a time. Every one of them stands in the host's table of flows too, which holds 65536 on a small machine and drops
/// everybody's packets when it is full.
const FLOWS_MAX: u32 = 2048;

fn deny_set(more: &[String]) -> String {
    let ranges: Vec<&str> = NEVER.iter().copied().chain(more.iter().map(String::as_str)).collect();
    format!("set deny {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {} }} }}", ranges.join(", "))
}

/// In a slot's namespace. The guest sends as itself only, to the internet only; to it comes only what the agent sends to the slot's own
/// address, and answers. A VMM that stands in here to open its tap has no network of its own, also when its guest has taken it over.
pub fn slot(slot: SlotId, deny: &[String]) -> String {
    let (host_ip, deny) = (slot.host_ip(), deny_set(deny));
    format!(
        "table inet wrenn {{
  {deny}
  chain from_guest {{
    type filter hook prerouting priority raw; policy accept;
    iifname \"tap0\" ether saddr != {GUEST_MAC} counter drop
    iifname \"tap0\" meta nfproto != ipv4 counter drop
    iifname \"tap0\" ip saddr != {GUEST_IP} counter drop
  }}
  chain to_guest {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname \"up0\" ip daddr {host_ip} dnat ip to {GUEST_IP}
  }}
  chain leaving {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname \"tap0\" snat ip to {GATEWAY_IP}
    oifname \"up0\" ip saddr {GUEST_IP} masquerade
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname \"tap0\" counter drop
    ct state established,related accept
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state invalid counter drop
    iifname \"up0\" oifname \"tap0\" ct status dnat accept
    iifname \"up0\" oifname \"tap0\" ct state established,related accept
    iifname \"tap0\" oifname \"up0\" ct state established,related accept
    iifname \"tap0\" oifname \"up0\" ip daddr @deny counter reject with icmp admin-prohibited
    iifname \"tap0\" oifname \"up0\" ct state new ct count over {FLOWS_MAX} counter drop
    iifname \"tap0\" oifname \"up0\" accept
  }}
  chain output {{
    type filter hook output priority filter; policy accept;
    meta skuid != 0 counter drop
  }}
}}
"
    )
}

/// In the outer namespace: from a slot to the uplink and back, never from one slot to another, never to the agent's own end.
pub fn outer(deny: &[String]) -> String {
    let deny = deny_set(deny);
    format!(
        "table inet wrenn {{
  {deny}
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname \"lo\" accept
    ct state established,related accept
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state invalid counter drop
    iifname \"s*\" oifname \"uplink\" ip daddr @deny counter drop
    iifname \"s*\" oifname \"uplink\" accept
    iifname \"uplink\" oifname \"s*\" ct state established,related accept
  }}
  chain leaving {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname \"uplink\" masquerade
  }}
}}
"
    )
}

/// On the host, in a table of the agent's own: the uplink reaches no address of the host and nothing private behind it.
pub fn host(tag: &str, link: &str, uplink: Ipv4Addr, deny: &[String]) -> String {
    let deny = deny_set(deny);
    // Before other tables' filters, so that their accepts come after our drops; a drop anywhere is final, an accept is not.
    format!(
        "table inet wrenn_{tag} {{}}
delete table inet wrenn_{tag}
table inet wrenn_{tag} {{
  {deny}
  chain input {{
    type filter hook input priority -10; policy accept;
    iifname \"{link}\" counter drop
  }}
  chain forward {{
    type filter hook forward priority -10; policy accept;
    iifname \"{link}\" ip saddr != {uplink} counter drop
    iifname \"{link}\" meta nfproto != ipv4 counter drop
    iifname \"{link}\" ip daddr @deny counter drop
    oifname \"{link}\" ct state established,related accept
    oifname \"{link}\" counter drop
  }}
  chain leaving {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {uplink} oifname != \"{link}\" masquerade
  }}
}}
"
    )
}

pub fn remove_host(tag: &str) -> String {
    // Made first, so that removing is no error where there is none.
    format!("table inet wrenn_{tag} {{}}\ndelete table inet wrenn_{tag}\n")
}
