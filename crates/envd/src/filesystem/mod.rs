//! Directories and entries of the guest's file system, looked at and changed as the user who asks.

pub mod entry;
pub mod metadata;
pub mod open;
pub mod path;
pub mod service;
pub mod temporary;
mod transfer;
mod watch;
