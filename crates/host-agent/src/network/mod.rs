//! The networks of one agent's sandboxes.
//!
//! ```text
//!   host ── wu<tag> ═ uplink ── wrn-<tag> (outer namespace) ── s<n> ═ up0 ── wrn-<tag>-<n> (slot) ── tap0 ── guest 169.254.0.21
//!           /30 of a free range        10.11.x.y via 10.12.x.y/31                169.254.0.22
//! ```
//!
//! Everything bears the agent's tag, and only one link and one table of the host's own namespace are touched, so two agents on one machine
//! never meet. A slot's rules are loaded before its tap is up; what is not allowed is dropped, in the slot, again in the outer namespace,
//! and again on the host. A slot is never reused as it is: its namespace is removed with all flows that it had anywhere, its number rests
//! until no socket of its former user can be left, and it is made anew.
//!
//! Links are made by `ip -batch` and rules by `nft -f`: one short process each, atomic where it matters, and no netlink sockets in
//! namespaces that a runtime's worker would have to enter.

mod census;
mod conntrack;
mod doorway;
mod namespace;
mod outer;
mod pool;
mod rules;
mod slot;

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;

use microvm::Tap;
use tokio::net::TcpStream;

pub use crate::tool::ToolError;
pub use census::Census;
pub use doorway::Doorway;
pub use pool::{Network, remove_all};
pub use slot::SlotId;

pub const GUEST_IP: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
pub const GATEWAY_IP: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
pub const GUEST_MAC: &str = microvm::GUEST_MAC;
/// The same on every tap: a restored guest keeps its gateway's address in its ARP cache (another one costs 30 s of silence).
pub const TAP_MAC: &str = "02:fc:00:00:00:06";

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("no free network slot is left")]
    Exhausted,
    #[error("no free address range for the uplink was found")]
    NoRange,
    #[error("{what}")]
    Tool {
        what: &'static str,
        #[source]
        cause: ToolError,
    },
    #[error("{what}")]
    Io {
        what: &'static str,
        #[source]
        cause: io::Error,
    },
}

pub struct NetworkConfig {
    /// Eight hex digits of the agent's own.
    pub tag: String,
    /// Slots that are kept ready.
    pub premade: usize,
    /// Slots that journals name: left exactly as they are.
    pub in_use: BTreeSet<SlotId>,
    /// Ranges that guests must not reach, beside those that no guest ever may.
    pub deny: Vec<String>,
}

/// One slot's end on the host.
#[derive(Debug, Clone)]
pub struct Slot {
    pub id: SlotId,
    namespace: String,
}

impl Slot {
    /// The address by which the agent (and nobody else) reaches the guest.
    pub fn host_ip(&self) -> Ipv4Addr {
        self.id.host_ip()
    }

    /// For the VMM. Nobody owns it: whoever is in the slot's namespace may open it.
    pub fn tap(&self) -> Tap {
        Tap { namespace: namespace::path(&self.namespace), name: slot::TAP.to_owned() }
    }
}

impl Network {
    /// To a port of the slot's guest, from inside the outer namespace.
    pub async fn connect(self: &Arc<Self>, slot: SlotId, port: u16) -> io::Result<TcpStream> {
        self.doorway().connect((slot.host_ip(), port).into()).await
    }
}
