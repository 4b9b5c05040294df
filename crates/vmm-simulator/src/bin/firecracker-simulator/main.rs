//! `firecracker-simulator`: Firecracker's API, and of a guest only its memory. For tests: it runs nothing.

mod api;
mod arguments;
mod calls;
mod config;
mod devices;
mod fault;
mod guest;
mod hooks;
mod machine;
mod memory;
mod output;
mod server;
mod setup;
mod snapshot;
mod state_file;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use nix::sys::signal::{SigHandler, Signal};
use vmm_simulator::release::Release;

use crate::arguments::Arguments;
use crate::config::Logger;
use crate::machine::Machine;

/// The real program's code for arguments that it does not know.
const ARGUMENTS_REFUSED: u8 = 153;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(refused) => {
            eprintln!("Arguments parsing error: {}", refused.to_string().lines().next().unwrap_or_default());
            return ExitCode::from(ARGUMENTS_REFUSED);
        }
    };
    match run(&arguments) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<u8> {
    let name = std::env::args_os().next().unwrap_or_default();
    let release = Release::of_program(Path::new(&name));
    if arguments.version {
        println!("Firecracker v{release}");
        return Ok(0);
    }
    if arguments.snapshot_version {
        println!("v{}.0.0", release.snapshot_format());
        return Ok(0);
    }
    if let Some(file) = &arguments.describe_snapshot {
        println!("v{}.0.0", state_file::format_of(file)?);
        return Ok(0);
    }
    arguments.check_id()?;
    // Writing more than a limit allows is an error of that write.
    // SAFETY: ignoring a signal runs no handler.
    unsafe { nix::sys::signal::signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.context("ignore SIGXFSZ")?;

    let payload_bytes_max = arguments.http_api_max_payload_size;
    let mmds_bytes_max = arguments.mmds_size_limit.unwrap_or(payload_bytes_max);
    let mut machine = Machine::new(arguments.id.clone(), release, arguments.enable_pci, mmds_bytes_max);
    if arguments.log_path.is_some() || arguments.level.is_some() {
        let logger = Logger { log_path: arguments.log_path.clone(), level: arguments.level()?, ..Logger::default() };
        machine.put_logger(logger).map_err(|fault| anyhow::anyhow!(fault.message))?;
    }
    machine.log.info(&format!("Running Firecracker v{release}"));

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let code = runtime.block_on(async {
        let listener = tokio::net::UnixListener::bind(&arguments.api_sock).with_context(|| {
            let path = arguments.api_sock.display();
            format!("Failed to open the API socket at: {path}. Check that it is not already used.")
        })?;
        server::serve(listener, machine, payload_bytes_max).await.context("serve the API")
    })?;
    // A connection that is silent on purpose is not waited for.
    runtime.shutdown_background();
    Ok(code)
}
