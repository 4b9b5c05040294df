//! The public API v1: what REST, WebSocket and SSE clients send and get.
//!
//! Times are RFC 3339 in UTC. On routes that published clients use, unknown request fields are ignored. Absent optional fields are
//! left out of answers. Status words are those of `model::sandbox::Status`.

pub mod accounts;
pub mod audit;
pub mod builds;
pub mod channels;
pub mod errors;
pub mod events;
pub mod exec;
pub mod files;
pub mod fleet;
pub mod hosts;
pub mod keys;
pub mod metrics;
pub mod pty;
pub mod quotas;
pub mod sandboxes;
pub mod snapshots;
pub mod teams;
