//! `wrenn sandbox ping ID...`.

use std::process::ExitCode;

use serde_json::json;

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show};

#[derive(clap::Args)]
pub struct Arguments {
    #[arg(required = true)]
    ids: Vec<String>,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let mut pinged = Vec::new();
    let mut first_failure = None;
    for id in &arguments.ids {
        match client.post_only(client.url(&["v1", "sandboxes", id, "ping"])).await {
            Ok(()) => pinged.push(id.clone()),
            // The others are pinged all the same; the first failure decides the exit code.
            Err(failure) if first_failure.is_none() => first_failure = Some(failure),
            Err(failure) => failure.print(format),
        }
    }
    if !pinged.is_empty() {
        show(format, &json!({ "pinged": pinged }), |_| pinged.join("\n"))?;
    }
    first_failure.map_or(Ok(ExitCode::SUCCESS), Err)
}
