//! Channels: what happens to a team's sandboxes, snapshots and hosts, told where the team wants it.
//!
//! ```text
//!   event -> row of the outbox, in its transaction -> deliver -> guarded client -> webhook, chat
//! ```

pub mod deliver;
pub mod guard;
pub mod provider;
