//! What tests stand on. A dev-dependency only: nothing that ships uses it. It refuses to decide what is right; tests assert.
//!
//! `xtask` uses [`postgres`] to prepare the store's queries, before the store itself can be compiled: what needs the store must not
//! come into this crate without a feature that `xtask` leaves off.

pub mod cut_proxy;
pub mod envd;
pub mod keeper;
pub mod metrics;
pub mod postgres;
pub mod sdk;
