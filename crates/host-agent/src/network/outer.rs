//! The outer namespace and its one uplink into the host, on a range that nothing else on the machine uses.

use std::fs::File;
use std::net::Ipv4Addr;

use nix::fcntl::{Flock, FlockArg};

use super::{NetworkError, namespace, rules};
use crate::tool::{self, ip_batch};

/// Choosing a range and taking it is one step among all agents of the machine.
const LOCK: &str = "/run/wrenn-uplink.lock";
/// Ranges that are tried, from one that the tag decides on.
const TRIES: u32 = 512;

pub fn name(tag: &str) -> String {
    format!("wrn-{tag}")
}

/// Eleven letters at most go with a name of fifteen.
pub fn host_link(tag: &str) -> String {
    format!("wu{tag}")
}

/// Makes what is missing; what is there and whole stays, so that guests' traffic goes on. Blocks.
pub fn ensure(tag: &str, deny: &[String]) -> Result<(), NetworkError> {
    let tool = |what| move |cause| NetworkError::Tool { what, cause };
    let io = |what| move |cause| NetworkError::Io { what, cause };
    let (outer, link) = (name(tag), host_link(tag));
    if !namespace::exists(&outer) {
        let _ = std::fs::remove_file(namespace::path(&outer));
        ip_batch(None, &format!("netns add {outer}\n")).map_err(tool("make the outer namespace"))?;
    }
    let uplink = match present_uplink(&outer, &link) {
        Some(uplink) => uplink,
        None => make_uplink(tag, &outer, &link)?,
    };
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").map_err(io("let the host forward packets"))?;
    tool::run("nft", &["-f", "-"], &rules::host(tag, &link, uplink, deny)).map_err(tool("load the host's rules"))?;
    namespace::inside(&outer, || -> Result<(), NetworkError> {
        for at in ["all", "default"] {
            namespace::set_sysctl(&format!("ipv6/conf/{at}/disable_ipv6"), "1")
                .map_err(io("set up the outer namespace"))?;
            namespace::set_sysctl(&format!("ipv4/conf/{at}/rp_filter"), "0")
                .map_err(io("set up the outer namespace"))?;
        }
        namespace::set_sysctl("ipv4/ip_forward", "1").map_err(io("set up the outer namespace"))?;
        // One transaction: the old rules hold until the new ones do.
        let rules = format!("table inet wrenn {{}}\ndelete table inet wrenn\n{}", rules::outer(deny));
        tool::run("nft", &["-f", "-"], &rules).map_err(tool("load the outer namespace's rules"))?;
        Ok(())
    })
    .map_err(io("enter the outer namespace"))?
}

/// The host's rules as the kernel has them, without counters.
pub fn host_rules(tag: &str) -> Result<String, tool::ToolError> {
    tool::run("nft", &["-s", "list", "table", "inet", &format!("wrenn_{tag}")], "")
}

/// The outer end's address, when the uplink is whole.
fn present_uplink(outer: &str, link: &str) -> Option<Ipv4Addr> {
    let host_end = tool::run("ip", &["-4", "-o", "addr", "show", "dev", link], "").ok()?;
    let inner = tool::run("ip", &["-n", outer, "-4", "-o", "addr", "show", "dev", "uplink"], "").ok()?;
    let routes = tool::run("ip", &["-n", outer, "route", "show", "default"], "").ok()?;
    let address = |said: &str| said.split_whitespace().nth(3)?.split('/').next()?.parse::<Ipv4Addr>().ok();
    let (host_end, inner) = (address(&host_end)?, address(&inner)?);
    (routes.contains(&host_end.to_string()) && u32::from(inner) == u32::from(host_end) + 1).then_some(inner)
}

fn make_uplink(tag: &str, outer: &str, link: &str) -> Result<Ipv4Addr, NetworkError> {
    let tool = |what| move |cause| NetworkError::Tool { what, cause };
    let lock = File::create(LOCK).map_err(|cause| NetworkError::Io { what: "open the lock of the uplinks", cause })?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, e)| NetworkError::Io { what: "lock the uplinks", cause: e.into() })?;
    // Half an uplink of an interrupted start.
    let _ = ip_batch(None, &format!("link del {link}\n"));
    let taken = taken_ranges().map_err(tool("list the host's routes"))?;
    let range = choose(tag, &taken).ok_or(NetworkError::NoRange)?;
    let (host_end, inner) = (Ipv4Addr::from(range + 1), Ipv4Addr::from(range + 2));
    ip_batch(None, &format!("link add {link} type veth peer name uplink netns {outer}\naddr add {host_end}/30 dev {link}\nlink set {link} up\n"))
        .map_err(tool("make the uplink"))?;
    let lines = format!(
        "link set lo up\naddr add {inner}/30 dev uplink\nlink set uplink up\nroute replace default via {host_end}\n"
    );
    ip_batch(Some(outer), &lines).map_err(tool("set up the uplink"))?;
    Ok(inner)
}

/// First and last address of everything that the host routes or owns, the default route apart.
fn taken_ranges() -> Result<Vec<(u32, u32)>, tool::ToolError> {
    let routes = tool::run("ip", &["-4", "route", "show", "table", "all"], "")?;
    Ok(routes.lines().filter_map(parse_route).collect())
}

fn parse_route(line: &str) -> Option<(u32, u32)> {
    let mut words = line.split_whitespace();
    let mut word = words.next()?;
    // `local 10.0.0.1 dev ...`, `broadcast ...`, `unreachable ...`
    if word.parse::<Ipv4Addr>().is_err() && !word.contains('/') {
        word = words.next()?;
    }
    let (address, length) = match word.split_once('/') {
        Some((address, length)) => (address, length.parse::<u32>().ok().filter(|length| *length <= 32)?),
        None => (word, 32),
    };
    let first = u32::from(address.parse::<Ipv4Addr>().ok()?);
    if length == 0 {
        return None;
    }
    Some((first, first | u32::MAX.checked_shr(length).unwrap_or(0)))
}

/// A /30 in 172.31.0.0/16 or 10.199.0.0/16 that overlaps nothing.
fn choose(tag: &str, taken: &[(u32, u32)]) -> Option<u32> {
    let begin = u32::from_str_radix(tag, 16).unwrap_or(0);
    let pools = [u32::from(Ipv4Addr::new(172, 31, 0, 0)), u32::from(Ipv4Addr::new(10, 199, 0, 0))];
    pools.into_iter().flat_map(|pool| (0..TRIES).map(move |i| pool + (begin.wrapping_add(i) % 16_384) * 4)).find(
        |range| {
            let last = range + 3;
            !taken.iter().any(|(from, to)| from <= &last && range <= to)
        },
    )
}

/// Everything of the outer namespace; the slots must be gone. Also for what is not there.
pub fn remove(tag: &str) -> Result<(), NetworkError> {
    let tool = |what| move |cause| NetworkError::Tool { what, cause };
    let (outer, link) = (name(tag), host_link(tag));
    if namespace::path(&outer).exists() {
        ip_batch(None, &format!("netns del {outer}\n")).map_err(tool("remove the outer namespace"))?;
    }
    if std::path::Path::new(&format!("/proc/sys/net/ipv4/conf/{link}")).exists() {
        let _ = ip_batch(None, &format!("link del {link}\n"));
    }
    tool::run("nft", &["-f", "-"], &rules::remove_host(tag)).map_err(tool("remove the host's rules"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uplink_avoids_what_the_host_uses() {
        let taken: Vec<_> = [
            "default via 10.0.0.1 dev eth0",
            "172.31.0.0/16 dev docker0",
            "local 10.199.0.1 dev x table local",
            "10.0.0.0/24 dev eth0",
        ]
        .iter()
        .filter_map(|line| parse_route(line))
        .collect();
        assert_eq!(taken.len(), 3);
        let range = Ipv4Addr::from(choose("00000000", &taken).unwrap());
        assert_eq!(range, Ipv4Addr::new(10, 199, 0, 4));
        assert_eq!(choose("00000001", &[(0, u32::MAX)]), None);
        assert_ne!(choose("00000001", &[]), choose("00000002", &[]));
    }
}
