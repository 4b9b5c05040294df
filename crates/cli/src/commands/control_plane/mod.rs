//! `wrenn control-plane`: the control plane as a service of this machine.

pub mod install;

use std::process::ExitCode;

use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::Format;

#[derive(clap::Subcommand)]
pub enum Command {
    /// Make this machine the control plane: settings, database, service; hosts join it by `wrenn host add`.
    Install(Box<install::Arguments>),
}

pub async fn run(command: Command, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    match command {
        Command::Install(arguments) => install::run(&arguments, options, format).await,
    }
}
