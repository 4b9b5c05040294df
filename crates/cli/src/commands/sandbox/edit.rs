//! `wrenn sandbox edit ID`: its metadata, which is what it is found by.

use std::process::ExitCode;

use api::v1::sandboxes::{ChangeSandbox, Sandbox};

use crate::client::Client;
use crate::commands::run::pair;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show};

#[derive(clap::Args)]
pub struct Arguments {
    id: String,
    /// A pair that it gets, or another value for a name that it has; may be repeated.
    #[arg(long = "metadata", short, value_name = "NAME=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// A name that it loses; may be repeated.
    #[arg(long = "remove", value_name = "NAME")]
    removed: Vec<String>,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    if arguments.metadata.is_empty() && arguments.removed.is_empty() {
        return Err(Failure::usage("nothing to change: give --metadata NAME=VALUE or --remove NAME"));
    }
    let client = Client::of_user(options)?;
    let taken = arguments.removed.iter().map(|name| (name.clone(), None));
    let given = arguments.metadata.iter().map(|(name, value)| (name.clone(), Some(value.clone())));
    let change = ChangeSandbox { metadata: taken.chain(given).collect() };
    let sandbox: Sandbox = client.patch_for(client.url(&["v1", "sandboxes", &arguments.id]), &change).await?;
    show(format, &sandbox, |sandbox| {
        let pairs = sandbox.metadata.iter().map(|(name, value)| format!("{name}={value}"));
        pairs.collect::<Vec<_>>().join("\n")
    })?;
    Ok(ExitCode::SUCCESS)
}
