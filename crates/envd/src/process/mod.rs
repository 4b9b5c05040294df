//! Processes that users start: spawned as their user in a session and control group of their own, their output carried without loss.

pub mod child;
pub mod input;
pub mod output;
pub mod service;
pub mod spawn;
pub mod starter;
pub mod table;
