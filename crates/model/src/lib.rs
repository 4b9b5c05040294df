//! The nouns of Wrenn and what may happen to them: typed ids, sizes, lifecycle states and transitions.
//!
//! Pure: no I/O, no async, no clock, no randomness (both are arguments), no serialisation (the wire has its own types in `api`).
//! Used by the control plane, the store and the host agent.

pub mod access;
pub mod ids;
pub mod sandbox;
pub mod shape;
