//! Whole-machine tests: the real programs, real PostgreSQL, real microVMs, driven through the CLI and the public API.
//!
//! The tests are in `tests/`; this library starts and ends a platform for them ([`platform`]) and counts what a machine holds, by
//! asking the kernel and the file system and never the programs under test ([`objects`]). Where it matters what a guest itself says,
//! it is asked directly ([`guest`]). The benchmarks judge by [`figures`]. It uses no crate that ships, but for [`jailed`]: what is seen of a
//! VMM that a driver has started, and what the driver costs, is to be that of the driver that ships.

pub mod bare_machine;
pub mod crash_points;
pub mod figures;
pub mod guest;
pub mod jailed;
pub mod objects;
pub mod platform;
pub mod standbys;
pub mod terminal;
pub mod wait;
