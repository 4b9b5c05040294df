//! The kernel's table of flows: what a slot had in it goes with the slot, so that no answer to its former user finds the next one.
//!
//! A slot's flows stand in three tables. That of its own namespace goes with the namespace. In the outer namespace they bear the slot's
//! addresses. On the host all slots' flows bear the uplink's, so they are found by what the outer namespace has made of them. Written by
//! hand, because the two messages that are needed are short, and a program for it (`conntrack`) is on few hosts.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with, sockopt,
};

// linux/netlink.h
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;
// linux/netfilter/nfnetlink_conntrack.h
const CT_GET: u16 = 1 << 8 | 1;
const CT_DELETE: u16 = 1 << 8 | 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_PROTO_ICMP_ID: u16 = 4;
const CTA_PROTO_ICMP_TYPE: u16 = 5;
const CTA_PROTO_ICMP_CODE: u16 = 6;

/// The kernel fills at most this with one answer to a dump.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// The kernel answers at once; this is so that nothing can wait for ever.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// One direction of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    from: Ipv4Addr,
    to: Ipv4Addr,
    protocol: u8,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ports { from: u16, to: u16 },
    Echo { id: u16, kind: u8, code: u8 },
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// As the first packet was, before its addresses were translated.
    asked: Way,
    /// As answers come.
    answered: Way,
}

impl Flow {
    pub fn touches(&self, address: Ipv4Addr) -> bool {
        [self.asked, self.answered].iter().any(|way| way.from == address || way.to == address)
    }

    pub fn asked(&self) -> Way {
        self.asked
    }

    /// How the first packet looked when it left the namespace.
    pub fn sent(&self) -> Way {
        let Way { from, to, protocol, kind } = self.answered;
        let kind = match kind {
            Kind::Ports { from, to } => Kind::Ports { from: to, to: from },
            Kind::Echo { id, .. } => match self.asked.kind {
                Kind::Echo { kind, code, .. } => Kind::Echo { id, kind, code },
                other => other,
            },
            Kind::Other => Kind::Other,
        };
        Way { from: to, to: from, protocol, kind }
    }
}

/// The IPv4 flows of the calling thread's namespace. Blocks.
pub fn flows() -> io::Result<Vec<Flow>> {
    let socket = open()?;
    send(&socket, &message(CT_GET, NLM_F_REQUEST | NLM_F_DUMP, &[]), SendFlags::empty())?;
    let mut flows = Vec::new();
    let mut buffer = vec![0; ANSWER_BYTES_MAX];
    loop {
        let (count, _) = recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        for (kind, body) in messages(&buffer[..count]) {
            match kind {
                NLMSG_DONE => return Ok(flows),
                NLMSG_ERROR => return refused(body).map(|()| flows),
                _ => flows.extend(flow(body)),
            }
        }
    }
}

/// Deletes those flows of the calling thread's namespace that are there; how many were. Blocks.
pub fn delete(ways: impl IntoIterator<Item = Way>) -> io::Result<usize> {
    let socket = open()?;
    let mut buffer = vec![0; ANSWER_BYTES_MAX];
    let mut deleted = 0;
    for way in ways {
        // Never without a flow in it: that would mean all of them.
        send(&socket, &message(CT_DELETE, NLM_F_REQUEST | NLM_F_ACK, &encode(way)), SendFlags::empty())?;
        let (count, _) = recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        for (kind, body) in messages(&buffer[..count]) {
            match if kind == NLMSG_ERROR { refused(body) } else { Ok(()) } {
                Ok(()) => deleted += 1,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(deleted)
}

fn open() -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::NETFILTER))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(ANSWER_LIMIT))?;
    Ok(socket)
}

fn message(kind: u16, flags: u16, attributes: &[u8]) -> Vec<u8> {
    // Header, then family, version and an unused number.
    let length = u32::try_from(20 + attributes.len()).expect("a message is short");
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([libc::AF_INET as u8, 0, 0, 0]);
    bytes.extend(attributes);
    bytes
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).expect("an attribute is short");
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn encode(way: Way) -> Vec<u8> {
    let ip = [attribute(CTA_IP_V4_SRC, &way.from.octets()), attribute(CTA_IP_V4_DST, &way.to.octets())].concat();
    let mut protocol = attribute(CTA_PROTO_NUM, &[way.protocol]);
    match way.kind {
        Kind::Ports { from, to } => {
            protocol.extend(attribute(CTA_PROTO_SRC_PORT, &from.to_be_bytes()));
            protocol.extend(attribute(CTA_PROTO_DST_PORT, &to.to_be_bytes()));
        }
        Kind::Echo { id, kind, code } => {
            protocol.extend(attribute(CTA_PROTO_ICMP_ID, &id.to_be_bytes()));
            protocol.extend(attribute(CTA_PROTO_ICMP_TYPE, &[kind]));
            protocol.extend(attribute(CTA_PROTO_ICMP_CODE, &[code]));
        }
        Kind::Other => {}
    }
    let tuple = [attribute(CTA_TUPLE_IP | NESTED, &ip), attribute(CTA_TUPLE_PROTO | NESTED, &protocol)].concat();
    attribute(CTA_TUPLE_ORIG | NESTED, &tuple)
}

fn refused(body: &[u8]) -> io::Result<()> {
    let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code.saturating_neg())) }
}

/// Kinds and contents of the messages of one answer.
fn messages(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut all = Vec::new();
    while let (Some(length), Some(kind)) = (bytes.first_chunk(), bytes.get(4..6)) {
        let length = usize::try_from(u32::from_ne_bytes(*length)).unwrap_or(usize::MAX);
        let Some(body) = bytes.get(16..length) else { break };
        all.push((u16::from_ne_bytes([kind[0], kind[1]]), body));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    all
}

/// None when there is no such attribute.
fn find(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]) & TYPE_MASK;
        let value = bytes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

fn flow(body: &[u8]) -> Option<Flow> {
    let attributes = body.get(4..)?;
    Some(Flow { asked: way(find(attributes, CTA_TUPLE_ORIG)?)?, answered: way(find(attributes, CTA_TUPLE_REPLY)?)? })
}

fn way(tuple: &[u8]) -> Option<Way> {
    let (ip, protocol) = (find(tuple, CTA_TUPLE_IP)?, find(tuple, CTA_TUPLE_PROTO)?);
    let address = |kind| find(ip, kind)?.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets));
    let number = |kind| find(protocol, kind)?.first_chunk::<2>().map(|bytes| u16::from_be_bytes(*bytes));
    let byte = |kind| find(protocol, kind)?.first().copied();
    let kind = match (number(CTA_PROTO_SRC_PORT), number(CTA_PROTO_DST_PORT), number(CTA_PROTO_ICMP_ID)) {
        (Some(from), Some(to), _) => Kind::Ports { from, to },
        (_, _, Some(id)) => Kind::Echo { id, kind: byte(CTA_PROTO_ICMP_TYPE)?, code: byte(CTA_PROTO_ICMP_CODE)? },
        _ => Kind::Other,
    };
    Some(Way { from: address(CTA_IP_V4_SRC)?, to: address(CTA_IP_V4_DST)?, protocol: byte(CTA_PROTO_NUM)?, kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way_of(from: [u8; 4], to: [u8; 4], kind: Kind) -> Way {
        let protocol = if matches!(kind, Kind::Echo { .. }) { 1 } else { 6 };
        Way { from: from.into(), to: to.into(), protocol, kind }
    }

    #[test]
    fn a_flow_is_read_as_it_is_written_and_rubbish_is_none() {
        let asked = way_of([10, 12, 0, 3], [1, 1, 1, 1], Kind::Ports { from: 40_000, to: 443 });
        let answered = way_of([1, 1, 1, 1], [172, 31, 0, 2], Kind::Ports { from: 443, to: 1024 });
        let mut bytes = vec![2, 0, 0, 0];
        bytes.extend(encode(asked));
        let mut reply = encode(answered);
        reply[2..4].copy_from_slice(&(CTA_TUPLE_REPLY | NESTED).to_ne_bytes());
        bytes.extend(reply);
        let read = flow(&bytes).unwrap();
        assert_eq!(read, Flow { asked, answered });
        assert!(read.touches([10, 12, 0, 3].into()) && !read.touches([10, 12, 0, 5].into()));
        assert_eq!(read.sent(), way_of([172, 31, 0, 2], [1, 1, 1, 1], Kind::Ports { from: 1024, to: 443 }));
        for length in 0..bytes.len() {
            assert_eq!(flow(&bytes[..length]), None);
        }
        let ping = Flow {
            asked: way_of([10, 12, 0, 3], [1, 1, 1, 1], Kind::Echo { id: 7, kind: 8, code: 0 }),
            answered: way_of([1, 1, 1, 1], [172, 31, 0, 2], Kind::Echo { id: 9, kind: 0, code: 0 }),
        };
        assert_eq!(ping.sent(), way_of([172, 31, 0, 2], [1, 1, 1, 1], Kind::Echo { id: 9, kind: 8, code: 0 }));
    }
}
