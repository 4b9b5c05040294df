//! The commands, one file each; each takes its own options and those that all take.

mod account;
pub mod admin;
mod audit;
mod channel;
mod completion;
mod control_plane;
#[cfg(test)]
mod coverage;
mod demo;
mod doctor;
mod down;
mod events;
mod exec_stream;
mod files;
mod fleet;
mod host;
mod key;
mod login;
mod logs;
mod quota;
mod run;
mod sandbox;
mod shell;
mod snapshot;
mod team;
mod up;
mod usage;
mod version;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::Format;

const LONG: &str = "\
A first sandbox, where a platform runs (`wrenn up` starts one on this machine):

  id=$(wrenn sandbox create)
  wrenn sandbox exec $id -- uname -a
  wrenn shell $id
  wrenn files put ./notes.txt $id:notes.txt
  wrenn sandbox kill $id

Exit codes: 0 done; 1 refused or failed; 2 wrong usage; 125 when `run`, `exec` or `shell` failed by themselves, whose other codes are those of what \
ran in the sandbox; 129, 130, 143 ended by a signal.

Settings come from options, the environment (WRENN_API_URL, WRENN_API_KEY, ...), a file .env in the working directory, the session of `wrenn \
login`, and what `wrenn up` left in its directory, in this order.";

#[derive(Parser)]
#[command(
    name = "wrenn",
    version,
    about = "Sandboxes for code you do not trust, on your own machines",
    after_long_help = LONG,
    propagate_version = true
)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    options: Options,
}

#[derive(Subcommand)]
enum Command {
    /// Start the platform on this machine and keep it running until Ctrl-C; sandboxes outlive it.
    Up(up::Arguments),
    /// Stop the platform of a directory with all its sandboxes.
    Down(down::Arguments),
    /// Say what this machine can do as a host, and what is in its way; or how the platform as a whole is.
    Doctor(doctor::Arguments),
    /// Show that all of it works here: start a platform of its own, use a sandbox, take everything down, count what is left.
    Demo(demo::Arguments),
    /// Run one command in a sandbox of its own, and kill the sandbox afterwards.
    Run(run::Arguments),
    /// A terminal in a sandbox: bash, or another program.
    #[command(visible_alias = "sh")]
    Shell(shell::Arguments),
    /// Create, use and kill sandboxes.
    #[command(subcommand, visible_alias = "sb")]
    Sandbox(sandbox::Command),
    /// What a process in a sandbox has said, or what a sandbox's console shows; with -f also what comes.
    Logs(logs::Arguments),
    /// The files of sandboxes: list, fetch, put, remove.
    #[command(subcommand, visible_alias = "file", after_long_help = files::LONG)]
    Files(files::Command),
    /// Keep what sandboxes are, under names that others can begin with.
    #[command(subcommand, visible_alias = "template")]
    Snapshot(snapshot::Command),
    /// What happened to the team's sandboxes, snapshots and hosts; with -f also what happens.
    Events(events::Arguments),
    /// What the team's sandboxes have used, by days.
    Usage(usage::Arguments),
    /// Where the team is told of what happens: webhooks and chats.
    #[command(subcommand)]
    Channel(channel::Command),
    /// The control plane as a service of this machine.
    #[command(subcommand)]
    ControlPlane(control_plane::Command),
    /// Hosts of the platform (administrators), and of a team's own.
    #[command(subcommand)]
    Host(host::Command),
    /// Log in, for the commands of a person: keys, teams.
    Login(login::Arguments),
    /// End the session of `wrenn login`.
    Logout,
    /// The person who is logged in, and how one becomes one.
    #[command(subcommand)]
    Account(account::Command),
    /// API keys.
    #[command(subcommand)]
    Key(key::Command),
    /// What a team may have and has.
    #[command(subcommand)]
    Quota(quota::Command),
    /// Teams and who is in them.
    #[command(subcommand)]
    Team(team::Command),
    /// Who did what in the team, or on the platform.
    Audit(audit::Arguments),
    /// For administrators of the platform: its people and teams, and a token on its machine.
    #[command(subcommand)]
    Admin(admin::Command),
    /// A script by which a shell completes commands and options.
    Completion(completion::Arguments),
    /// The versions of this program and of the control plane it talks to.
    Version(version::Arguments),
}

impl Arguments {
    pub fn format(&self) -> Format {
        if self.options.json { Format::Json } else { Format::Human }
    }
}

pub async fn run(arguments: Arguments) -> Result<ExitCode, Failure> {
    let format = arguments.format();
    let options = arguments.options;
    match arguments.command {
        Command::Up(arguments) => up::run(arguments, &options, format).await,
        Command::Down(arguments) => down::run(&arguments, &options, format).await,
        Command::Doctor(arguments) => doctor::run(&arguments, &options, format).await,
        Command::Demo(arguments) => demo::run(arguments, &options, format).await,
        Command::Run(arguments) => run::run(arguments, &options, format).await,
        Command::Shell(arguments) => shell::run(arguments, &options, format).await,
        Command::Sandbox(command) => sandbox::run(command, &options, format).await,
        Command::Logs(arguments) => logs::run(&arguments, &options, format).await,
        Command::Events(arguments) => events::run(&arguments, &options, format).await,
        Command::Usage(arguments) => usage::run(&arguments, &options, format).await,
        Command::Channel(command) => channel::run(command, &options, format).await,
        Command::Completion(arguments) => completion::run(&arguments),
        Command::Files(command) => files::run(command, &options, format).await,
        Command::Snapshot(command) => snapshot::run(command, &options, format).await,
        Command::ControlPlane(command) => control_plane::run(command, &options, format).await,
        Command::Host(command) => host::run(command, &options, format).await,
        Command::Login(arguments) => login::login(arguments, &options, format).await,
        Command::Logout => login::logout(&options, format).await,
        Command::Team(command) => team::run(command, &options, format).await,
        Command::Account(command) => account::run(command, &options, format).await,
        Command::Audit(arguments) => audit::run(&arguments, &options, format).await,
        Command::Key(command) => key::run(command, &options, format).await,
        Command::Quota(command) => quota::run(command, &options, format).await,
        Command::Admin(command) => admin::run(command, &options, format).await,
        Command::Version(arguments) => version::run(&arguments, &options, format).await,
    }
}
