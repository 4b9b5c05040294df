//! `wrenn files mkdir SANDBOX:PATH...`.

use std::process::ExitCode;

use super::As;
use super::remote::{Remote, is_directory};
use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show};
use crate::place::InSandbox;
use crate::printable::escaped;
use api::v1::files::FileEntry;

#[derive(clap::Args)]
pub struct Arguments {
    /// SANDBOX:PATH.
    #[arg(required = true)]
    places: Vec<String>,
    /// One that is there already is fine.
    #[arg(long, short)]
    parents: bool,
    #[command(flatten)]
    who: As,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let remote = Remote { client: &client, user: arguments.who.user.as_deref() };
    let mut made: Vec<FileEntry> = Vec::new();
    for place in &arguments.places {
        let place = InSandbox::parse(place)?;
        match remote.mkdir(&place).await {
            Ok(entry) => made.push(entry),
            Err(failure) if arguments.parents && failure.code() == Some("conflict") => {
                let entry = remote.stat(&place).await?;
                if !is_directory(&entry) {
                    return Err(failure);
                }
                made.push(entry);
            }
            Err(failure) => return Err(failure),
        }
    }
    show(format, &made, |made| made.iter().map(|entry| escaped(&entry.path)).collect::<Vec<_>>().join("\n"))?;
    Ok(ExitCode::SUCCESS)
}
