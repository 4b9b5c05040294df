//! `jailer-simulator`: the jail that Firecracker's jailer builds, with the same arguments, checks and left-overs. For tests.
//!
//! In the order of the real one: copy the program, join the network namespace, set limits, enter the cgroup, pivot into the jail, make
//! devices, become the jail's user, and the program. It removes nothing: whoever started it removes the jail.

mod arguments;
mod cgroup;
mod jail;
mod process;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use vmm_simulator::release::Release;

use crate::arguments::Arguments;
use crate::jail::Jail;
use crate::process::Clocks;

fn main() -> ExitCode {
    let clocks = Clocks::now();
    if Arguments::only_version() {
        let name = std::env::args_os().next().unwrap_or_default();
        println!("Jailer v{}", Release::of_program(Path::new(&name)));
        return ExitCode::SUCCESS;
    }
    let outcome = Arguments::try_parse()
        .map_err(|refused| {
            let first = refused.to_string().lines().next().unwrap_or_default().to_owned();
            anyhow::anyhow!("Failed to parse arguments: {first}")
        })
        .and_then(|arguments| run(&arguments, &clocks));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns without an error in a parent whose child became the program.
fn run(arguments: &Arguments, clocks: &Clocks) -> anyhow::Result<()> {
    process::close_inherited()?;
    let jail = Jail::plan(arguments)?;
    let limits = arguments.limits()?;
    jail.create()?;
    if let Some(path) = &arguments.netns {
        process::join_netns(path)?;
    }
    process::set_limits(&limits)?;
    cgroup::enter(arguments, &jail.program)?;
    let null = arguments.daemonize.then(|| std::fs::File::options().read(true).write(true).open("/dev/null"));
    let null = null.transpose().context("Failed to open /dev/null")?;
    jail.enter()?;
    if let Some(null) = null
        && process::daemonize(null)?
    {
        return Ok(());
    }
    process::become_program(arguments, &jail, clocks)
}
