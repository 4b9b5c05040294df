//! envd: the guest agent. It runs in every sandbox and does there what users ask for: processes, files, and what the host needs to give
//! a sandbox its identity.
//!
//! It speaks plain HTTP/1.1 on one port (`api::guest`): Connect services and a few HTTP routes. It trusts the host and nobody else: not
//! the processes beside it (which know neither token), not the network. It keeps no state on disk.
//!
//! ```text
//!  server/   accept loop and the registry of connections, routing, tokens
//!  identity  /init: who this guest is; clock, entropy, host name
//!  process/  process.Process: spawn as a user, output without loss, signals
//!  ports/    who listens, and a way to those on loopback
//!  filesystem/, files/   filesystem.Filesystem and GET/POST /files, as the target user
//! ```

pub mod access;
mod console;
pub mod files;
pub mod filesystem;
pub mod freezer;
#[doc(hidden)]
pub mod fuzzing;
pub mod identity;
pub mod metrics;
pub mod ports;
pub mod process;
pub mod server;
pub mod session;
pub mod users;
