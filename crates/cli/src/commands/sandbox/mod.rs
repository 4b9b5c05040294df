//! `wrenn sandbox`: one file for each verb, and one for the two that turn a sandbox off and on.

pub mod cp;
pub mod create;
mod edit;
pub mod exec;
mod fork;
mod get;
pub mod kill;
mod list;
mod metrics;
mod ping;
mod ps;
mod signal;
mod stats;
mod timeline;
mod timeout;
mod turn;

use std::process::ExitCode;

use crate::commands::{logs, shell};
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::Format;

#[derive(clap::Subcommand)]
pub enum Command {
    /// Create a sandbox and wait until it runs.
    Create(create::Arguments),
    /// The sandboxes that there are.
    #[command(visible_alias = "ls")]
    List(list::Arguments),
    /// One sandbox, also one that was killed.
    Get(get::Arguments),
    /// Run a command in a sandbox; the exit code is the command's.
    Exec(exec::Arguments),
    /// As `wrenn shell`: a terminal in a sandbox.
    Shell(shell::Arguments),
    /// Copy a file into a sandbox or out of one: `cp LOCAL ID:PATH`, `cp ID:PATH LOCAL`; `-` is standard input or output.
    Cp(cp::Arguments),
    /// Save sandboxes, with their memory or their disk alone, and end their microVMs: they take disk and no memory until they are resumed.
    Pause(turn::PauseArguments),
    /// Let paused sandboxes run again: where they stood, or, of the disk alone, by a boot.
    Resume(turn::ResumeArguments),
    /// Make sandboxes that begin where this one stands now, with its memory, disk and processes; it goes on.
    Fork(fork::Arguments),
    /// Let a sandbox's time begin anew, that of running and that of being idle, with other lengths or another end.
    Timeout(timeout::Arguments),
    /// Change the metadata of a sandbox, by which it is found.
    #[command(visible_alias = "label")]
    Edit(edit::Arguments),
    /// Let the idle time of running sandboxes begin anew.
    Ping(ping::Arguments),
    /// What happened to a sandbox in the last seven days, and how long each step took.
    Timeline(timeline::Arguments),
    /// What was started in a sandbox through the API and still runs.
    Ps(ps::Arguments),
    /// End a process in a sandbox.
    #[command(visible_alias = "kill-process")]
    Signal(signal::Arguments),
    /// What a sandbox took of its host: processor, memory, disk.
    Metrics(metrics::Arguments),
    /// How much of the team runs, and ran at most.
    Stats(stats::Arguments),
    /// End sandboxes for good.
    Kill(kill::Arguments),
    /// As `wrenn logs`: what a process has said, or what the sandbox's console shows.
    #[command(visible_alias = "console")]
    Logs(logs::Arguments),
}

pub async fn run(command: Command, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    match command {
        Command::Create(arguments) => create::run(&arguments, options, format).await,
        Command::List(arguments) => list::run(&arguments, options, format).await,
        Command::Get(arguments) => get::run(&arguments, options, format).await,
        Command::Exec(arguments) => exec::run(arguments, options, format).await,
        Command::Shell(arguments) => shell::run(arguments, options, format).await,
        Command::Cp(arguments) => cp::run(&arguments, options, format).await,
        Command::Pause(arguments) => turn::pause(&arguments, options, format).await,
        Command::Resume(arguments) => turn::resume(&arguments, options, format).await,
        Command::Fork(arguments) => fork::run(&arguments, options, format).await,
        Command::Timeout(arguments) => timeout::run(&arguments, options, format).await,
        Command::Edit(arguments) => edit::run(&arguments, options, format).await,
        Command::Ps(arguments) => ps::run(&arguments, options, format).await,
        Command::Signal(arguments) => signal::run(&arguments, options, format).await,
        Command::Metrics(arguments) => metrics::run(&arguments, options, format).await,
        Command::Stats(arguments) => stats::run(&arguments, options, format).await,
        Command::Ping(arguments) => ping::run(&arguments, options, format).await,
        Command::Timeline(arguments) => timeline::run(&arguments, options, format).await,
        Command::Kill(arguments) => kill::run(&arguments, options, format).await,
        Command::Logs(arguments) => logs::run(&arguments, options, format).await,
    }
}
