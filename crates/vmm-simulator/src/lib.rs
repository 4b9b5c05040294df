//! Programs that answer as Firecracker and its jailer do, without hardware virtualisation and without a guest: for tests alone.
//!
//! `firecracker-simulator` speaks the API with its state rules, effects on files and refusals; `jailer-simulator` builds the same jail.
//! `tests/table` holds both to what the real programs were seen to do, and runs against a real one when the environment names it.
//! They refuse to be useful: nothing of a guest but its memory exists, and that memory is made so that a wrong file of it is found out.
//!
//! This library only says where the two programs are. Called by tests of whatever drives a VMM.

pub mod release;

use std::path::PathBuf;

/// The two built programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs {
    pub firecracker: PathBuf,
    pub jailer: PathBuf,
}

/// Finds them beside the running test: `<target>/<profile>/deps/<test>` has them in `<target>/<profile>`.
///
/// # Panics
/// When they were not built: cargo builds another crate's programs only when asked for them.
pub fn programs() -> Programs {
    let test = std::env::current_exe().expect("a running program has a path");
    let profile = test.ancestors().skip(1).find(|dir| dir.file_name().is_some_and(|name| name != "deps"));
    let found = |name: &str| {
        let program = profile.map(|dir| dir.join(name)).unwrap_or_default();
        assert!(
            program.is_file(),
            "{} is not there: build it with `cargo build --workspace --all-targets`",
            program.display()
        );
        program
    };
    Programs { firecracker: found("firecracker-simulator"), jailer: found("jailer-simulator") }
}
