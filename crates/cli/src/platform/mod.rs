//! The platform of one machine, as `wrenn up`, `down`, `demo` and `doctor` see it: its directory, its programs, its private PostgreSQL,
//! its way from nothing to a host that is online. Nothing here decides about sandboxes.

pub mod advice;
pub mod artifacts;
pub mod bootstrap;
pub mod control_plane;
pub mod layout;
pub mod logs;
pub mod objects;
pub mod postgres;
pub mod preflight;
pub mod process;
pub mod programs;
pub mod service;
pub mod state;
