//! `wrenn`: the command line of Wrenn.
//!
//! It speaks only the public API. The exceptions are `up`, `down`, `demo` and `admin token`, which start and stop the programs that
//! lie beside this one, and `control-plane install` and `host install`, which make services of them. It runs on one thread: the kernel ties the life of a child to the thread that made it (`platform::programs`).

mod client;
mod commands;
mod credentials;
mod failure;
mod output;
mod password;
mod place;
mod platform;
mod printable;
mod session;
mod signals;
mod sse;
mod terminal;
mod transfer;
mod websocket;

use std::process::ExitCode;

use clap::Parser as _;

use crate::commands::Arguments;

/// `sysexits.h`: something was found in an unconfigured or misconfigured state.
const EXIT_CONFIG: u8 = 78;

fn main() -> ExitCode {
    // Before any thread exists and before the runtime: this one changes the process's namespace and user, and executes PostgreSQL.
    if let Some(outcome) = platform::postgres::confined::main() {
        return outcome;
    }
    // The one of the working directory, not of some folder above it. A broken one is said, because half of it may have been taken.
    if let Err(error) = dotenvy::from_path(".env")
        && !error.not_found()
    {
        eprintln!("wrenn: .env cannot be read: {error}");
        return ExitCode::from(EXIT_CONFIG);
    }
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let arguments = Arguments::parse();
    let format = arguments.format();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("wrenn: start the async runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(commands::run(arguments));
    // A blocked read of stdin must not hold up the end.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            failure.print(format);
            failure.exit_code()
        }
    }
}
