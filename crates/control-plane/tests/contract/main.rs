//! The API as a whole: events, lists, keys of repeated calls, rates, and what wrong requests are answered.

#[path = "../replica/mod.rs"]
mod replica;

mod error_table;
mod events;
mod idempotency;
mod listener;
mod lists;
mod rate_limits;
