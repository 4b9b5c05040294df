//! `wrenn files mv SANDBOX:FROM SANDBOX:TO`.

use std::process::ExitCode;

use super::As;
use super::remote::{Remote, is_directory};
use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show};
use crate::place::{InSandbox, Place};
use crate::printable::escaped;

#[derive(clap::Args)]
pub struct Arguments {
    /// SANDBOX:PATH.
    from: String,
    /// SANDBOX:PATH of the same sandbox, or the path alone. Into a directory when it is one.
    to: String,
    #[command(flatten)]
    who: As,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let remote = Remote { client: &client, user: arguments.who.user.as_deref() };
    let from = InSandbox::parse(&arguments.from)?;
    let to = match Place::parse(&arguments.to)? {
        Place::Sandbox(to) if to.id == from.id => to,
        Place::Sandbox(_) => {
            return Err(Failure::usage(
                "from one sandbox into another: `wrenn files get` there, `wrenn files put` here",
            ));
        }
        Place::Local(_) => InSandbox { id: from.id.clone(), path: arguments.to.clone() },
        Place::Standard => return Err(Failure::usage("standard output is no place in a sandbox")),
    };
    // As `mv`: into a directory, under its own name.
    let to = match remote.find(&to).await? {
        Some(entry) if is_directory(&entry) => to.join(from.file_name()?),
        _ => to,
    };
    let entry = remote.rename(&from, &to.path).await?;
    show(format, &entry, |entry| escaped(&entry.path))?;
    Ok(ExitCode::SUCCESS)
}
