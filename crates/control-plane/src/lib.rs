//! `wrenn-cp`, the control plane: decides where sandboxes run and whether, never how.
//!
//! Handlers write wishes; `reconcile` carries them out by calling host agents; PostgreSQL is the only shared truth, so that any number
//! of replicas may run. It refuses to hold state of its own that matters.

pub mod account_settings;
pub mod agents;
pub mod app;
pub mod authority;
pub mod builds;
pub mod capacity;
pub mod channels;
pub mod config;
pub mod events;
pub mod first_start;
pub mod hints;
pub mod http;
pub mod login;
pub mod mail;
pub mod measures;
pub mod networks;
pub mod oauth;
pub mod oauth_settings;
pub mod outbox;
pub mod outcomes;
pub mod passwords;
pub mod rate_settings;
pub mod reconcile;
pub mod roles;
pub mod run;
pub mod secrets;
pub mod templates;
pub mod tokens;
mod uploads;
pub mod wake;
