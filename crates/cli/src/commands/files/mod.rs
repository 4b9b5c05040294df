//! `wrenn files`: the files of a sandbox, named as `SANDBOX:PATH`. Paths are absolute, or relative to the home of the user in the sandbox.
//!
//! What the sandbox says of its files is not trusted: names are shown with escapes, and a listing that would lead out of the wanted directory is
//! refused.

mod cat;
mod content;
mod get;
mod ls;
mod mkdir;
mod mv;
mod put;
mod remote;
mod rm;
mod stat;

use std::process::ExitCode;

use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::Format;

/// Shown by `--help`.
pub const LONG: &str = "\
Places in a sandbox are written SANDBOX:PATH. A path is absolute, or relative to the home of the user, as `~/x` is too.

  wrenn files ls SANDBOX:/etc --depth 2
  wrenn files get SANDBOX:data.tar .
  wrenn files put -r ./site SANDBOX:site
  tar c . | wrenn files put - SANDBOX:/tmp/all.tar

Names that come out of a sandbox are shown with escapes: a\\u{1b}[2J is a name with a control character in it.";

#[derive(clap::Subcommand)]
pub enum Command {
    /// What is in a directory, or what a file is.
    Ls(ls::Arguments),
    /// Files' contents on standard output, one after the other.
    Cat(cat::Arguments),
    /// Fetch a file, or a directory with all that is in it. What broke off goes on where it stopped when the same is asked for again.
    Get(get::Arguments),
    /// Put a file, or a directory with all that is in it, into a sandbox. A file is there whole, or as it was before.
    Put(put::Arguments),
    /// Make directories, and those above them.
    Mkdir(mkdir::Arguments),
    /// Remove files, or directories with all that is in them.
    Rm(rm::Arguments),
    /// Give a file or a directory another name within its sandbox.
    Mv(mv::Arguments),
    /// All that is known about files.
    Stat(stat::Arguments),
}

/// As whom, in the sandbox.
#[derive(clap::Args)]
pub struct As {
    /// Whose rights and whose home it is [default: the sandbox's default user].
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
}

pub async fn run(command: Command, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    match command {
        Command::Ls(arguments) => ls::run(&arguments, options, format).await,
        Command::Cat(arguments) => cat::run(&arguments, options, format).await,
        Command::Get(arguments) => get::run(&arguments, options, format).await,
        Command::Put(arguments) => put::run(&arguments, options, format).await,
        Command::Mkdir(arguments) => mkdir::run(&arguments, options, format).await,
        Command::Rm(arguments) => rm::run(&arguments, options, format).await,
        Command::Mv(arguments) => mv::run(&arguments, options, format).await,
        Command::Stat(arguments) => stat::run(&arguments, options, format).await,
    }
}
