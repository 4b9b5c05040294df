//! `wrenn files stat SANDBOX:PATH...`.

use std::process::ExitCode;

use super::As;
use super::ls::time;
use super::remote::Remote;
use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, facts, show};
use crate::place::InSandbox;
use crate::printable::escaped;
use api::v1::files::FileEntry;

#[derive(clap::Args)]
pub struct Arguments {
    /// SANDBOX:PATH.
    #[arg(required = true)]
    places: Vec<String>,
    #[command(flatten)]
    who: As,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let remote = Remote { client: &client, user: arguments.who.user.as_deref() };
    let mut entries = Vec::new();
    for place in &arguments.places {
        entries.push(remote.stat(&InSandbox::parse(place)?).await?);
    }
    show(format, &entries, |entries| entries.iter().map(described).collect::<Vec<_>>().join("\n\n"))?;
    Ok(ExitCode::SUCCESS)
}

fn described(entry: &FileEntry) -> String {
    facts(&[
        ("path", escaped(&entry.path)),
        ("type", escaped(&entry.kind)),
        ("size", entry.size.to_string()),
        ("mode", format!("{:04o} {}", entry.mode & 0o7777, escaped(&entry.permissions))),
        ("owner", escaped(&entry.owner)),
        ("group", escaped(&entry.group)),
        ("modified", time(entry.modified_at)),
        ("leads to", entry.symlink_target.as_deref().map(escaped).unwrap_or_default()),
    ])
}
