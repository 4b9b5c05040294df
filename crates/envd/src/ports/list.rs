//! Who listens: `/proc/net/tcp` and `tcp6`, and whose sockets these are.

use std::collections::HashMap;
use std::fs;
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use api::guest::OpenPort;

/// Of one of the kernel's tables: 25,000 sockets. Listeners come first in it.
const TABLE_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Descriptors looked at for the owners of sockets.
const DESCRIPTORS_MAX: usize = 100_000;
const OWNERS_TIME_MAX: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listener {
    pub address: IpAddr,
    pub port: u16,
    pub inode: u64,
}

pub fn listeners() -> Vec<Listener> {
    let read = |path| {
        let mut table = String::new();
        // A table that cannot be read has nobody in it: a kernel without IPv6 has no tcp6.
        let file = fs::File::open(path).ok();
        file.and_then(|file| file.take(TABLE_BYTES_MAX).read_to_string(&mut table).ok());
        table
    };
    let mut all = parse(&read("/proc/net/tcp"));
    all.extend(parse(&read("/proc/net/tcp6")));
    all
}

/// Lines like `0: 0100007F:1F90 00000000:0000 0A ... uid timeout inode`, of which `0A` are listeners.
pub(crate) fn parse(table: &str) -> Vec<Listener> {
    let line = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().take(10).collect();
        let [_, local, _, "0A", .., inode] = fields[..] else { return None };
        let (address, port) = local.split_once(':')?;
        let address = match address.len() {
            8 => IpAddr::from(Ipv4Addr::from(u32::from_str_radix(address, 16).ok()?.to_ne_bytes())),
            32 => {
                let mut bytes = [0; 16];
                for (four, at) in bytes.chunks_exact_mut(4).zip((0..).step_by(8)) {
                    four.copy_from_slice(&u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
                }
                Ipv6Addr::from(bytes).to_canonical()
            }
            _ => return None,
        };
        Some(Listener { address, port: u16::from_str_radix(port, 16).ok()?, inode: inode.parse().ok()? })
    };
    table.lines().filter_map(line).collect()
}

/// All listeners but envd's own, with their processes as far as they can be found in time.
pub async fn open_ports(forwarded: Vec<u16>) -> Vec<OpenPort> {
    let own_pid = std::process::id();
    let all = listeners();
    let (answer, owners) = tokio::sync::oneshot::channel();
    let inodes: Vec<u64> = all.iter().map(|listener| listener.inode).collect();
    let thread = std::thread::Builder::new().name("owners".to_owned()).stack_size(256 * 1024).spawn(move || {
        let _ = answer.send(owners_of(&inodes));
    });
    let owners = match thread {
        Ok(_) => tokio::time::timeout(OWNERS_TIME_MAX, owners).await.ok().and_then(Result::ok).unwrap_or_default(),
        Err(_) => HashMap::new(),
    };
    let mut ports: Vec<OpenPort> = all
        .iter()
        .filter_map(|listener| {
            let (pid, process) = owners.get(&listener.inode).cloned().unzip();
            let (pid, process) = (pid.unwrap_or(0), process.unwrap_or_default());
            let is_forwarded = listener.address.is_loopback() && forwarded.contains(&listener.port);
            let (address, port) = (listener.address.to_string(), listener.port);
            (pid != own_pid).then_some(OpenPort { port, address, pid, process, is_forwarded })
        })
        .collect();
    ports.sort_by(|a, b| (a.port, &a.address).cmp(&(b.port, &b.address)));
    ports
}

/// The process that holds each socket, and its name.
fn owners_of(inodes: &[u64]) -> HashMap<u64, (u32, String)> {
    let wanted: HashMap<String, u64> = inodes.iter().map(|inode| (format!("socket:[{inode}]"), *inode)).collect();
    let mut owners = HashMap::new();
    let mut looked = 0;
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let process = entry.path();
        for descriptor in fs::read_dir(process.join("fd")).into_iter().flatten().flatten() {
            looked += 1;
            if looked > DESCRIPTORS_MAX || owners.len() == wanted.len() {
                return owners;
            }
            let target = fs::read_link(descriptor.path()).unwrap_or_default();
            if let Some(inode) = target.to_str().and_then(|target| wanted.get(target)) {
                // The first: a server's children hold its socket, too.
                owners.entry(*inode).or_insert_with(|| (pid, name_of(&process)));
            }
        }
    }
    owners
}

fn name_of(process: &Path) -> String {
    let name = fs::read(process.join("comm")).unwrap_or_default();
    String::from_utf8_lossy(&name).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_tables() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1 0 100 0 0 10 0
   1: 0100007F:1F91 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1000        0 4712 1 0 100 0 0 10 0
   2: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 12 1 0 100 0 0 10 0
   3: 0000000000000000FFFF00000100007F:0051 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 13 1 0 100 0 0 10 0
   4: xyz:0051 00000000:0000 0A 0:0 00:0 0 0 0 13
   5: 0100007F";
        let seen: Vec<_> = parse(table).iter().map(|it| (it.address.to_string(), it.port, it.inode)).collect();
        let expected = [("127.0.0.1", 8080, 4711), ("::1", 80, 12), ("127.0.0.1", 81, 13)];
        assert_eq!(seen, expected.map(|(address, port, inode)| (address.to_owned(), port, inode)));
    }

    #[tokio::test]
    async fn an_open_port_has_its_process() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = listeners().into_iter().find(|it| it.port == port && it.address.is_loopback()).unwrap();
        assert_eq!(owners_of(&[seen.inode])[&seen.inode].0, std::process::id());
        // It is envd's own here, so that it is no open port of the guest.
        assert!(open_ports(Vec::new()).await.iter().all(|open| open.port != port));
    }
}
