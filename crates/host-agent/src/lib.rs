//! The host agent: runs the sandboxes of one host. Decides how, never where.
//!
//! Crash-only: whatever happens to this program, the microVMs go on, and the next start takes up what the journals say. Used by the
//! binary `wrenn-agent`, and by tests that run it with other microVMs below.

pub mod admission;
mod admittance;
pub mod agent;
pub mod cgroup;
pub mod config;
pub mod control_plane;
pub mod credentials;
mod denied;
pub mod disk;
pub mod durable;
pub mod gauges;
pub mod ground;
pub mod guest;
pub mod heartbeat;
pub mod identity;
pub mod idleness;
mod leaks;
pub mod machines;
pub mod measures;
pub mod network;
mod orphans;
mod preflight;
mod real_ground;
pub mod registration;
pub mod rpc;
mod run;
pub mod sandbox;
mod sealed;
pub mod standby;
mod stop_all;
pub mod sweep;
pub mod template;
pub mod ticket;
mod tool;
pub mod vmm;

pub use run::{RunError, run};
pub use stop_all::stop_all;
