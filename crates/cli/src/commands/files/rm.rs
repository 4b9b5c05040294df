//! `wrenn files rm SANDBOX:PATH...`.

use std::process::ExitCode;

use serde_json::json;

use super::As;
use super::remote::{Remote, is_directory};
use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show};
use crate::place::InSandbox;

#[derive(clap::Args)]
pub struct Arguments {
    /// SANDBOX:PATH.
    #[arg(required = true)]
    places: Vec<String>,
    /// Directories too, with all that is in them.
    #[arg(long, short)]
    recursive: bool,
    /// What is not there is fine.
    #[arg(long, short)]
    force: bool,
    #[command(flatten)]
    who: As,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let remote = Remote { client: &client, user: arguments.who.user.as_deref() };
    let mut removed = Vec::new();
    let mut first_failure = None;
    for place in &arguments.places {
        match one(arguments, &remote, &InSandbox::parse(place)?).await {
            Ok(true) => removed.push(place.clone()),
            Ok(false) => {}
            // The others are removed all the same; the first failure decides the exit code.
            Err(failure) if first_failure.is_none() => first_failure = Some(failure),
            Err(failure) => failure.print(format),
        }
    }
    if !removed.is_empty() {
        show(format, &json!({ "removed": removed }), |_| removed.join("\n"))?;
    }
    first_failure.map_or(Ok(ExitCode::SUCCESS), Err)
}

/// False: there was nothing to remove.
async fn one(arguments: &Arguments, remote: &Remote<'_>, place: &InSandbox) -> Result<bool, Failure> {
    match remote.find(place).await? {
        None if arguments.force => return Ok(false),
        None => return Err(Failure::new(format!("there is no {:?} in {}", place.path, place.id))),
        Some(entry) if is_directory(&entry) && !arguments.recursive => {
            return Err(Failure::usage(format!("{:?} is a directory: remove it with -r", place.path)));
        }
        Some(_) => {}
    }
    remote.remove(place).await.map(|()| true)
}
