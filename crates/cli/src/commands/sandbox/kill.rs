//! `wrenn sandbox kill ID...`.

use std::process::ExitCode;
use std::time::Duration;

use api::v1::sandboxes::Sandbox;
use serde_json::json;

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show};

const STOPPED_MAX: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(100);

#[derive(clap::Args)]
pub struct Arguments {
    #[arg(required = true)]
    ids: Vec<String>,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let mut killed = Vec::new();
    let mut first_failure = None;
    for id in &arguments.ids {
        match and_wait(&client, id).await {
            Ok(()) => killed.push(id.clone()),
            // The others are killed all the same; the first failure decides the exit code.
            Err(failure) if first_failure.is_none() => first_failure = Some(failure),
            Err(failure) => failure.print(format),
        }
    }
    if !killed.is_empty() {
        show(format, &json!({ "killed": killed }), |_| killed.join("\n"))?;
    }
    first_failure.map_or(Ok(ExitCode::SUCCESS), Err)
}

/// Back when the host has confirmed that nothing of it is left.
pub async fn and_wait(client: &Client, id: &str) -> Result<(), Failure> {
    let url = client.url(&["v1", "sandboxes", id]);
    let Some(mut sandbox) = client.delete::<Sandbox>(url.clone()).await? else { return Ok(()) };
    let waited = tokio::time::timeout(STOPPED_MAX, async {
        while sandbox.status != "stopped" {
            tokio::time::sleep(LOOK_EVERY).await;
            sandbox = client.get(url.clone()).await?;
        }
        Ok(())
    });
    match waited.await {
        Ok(outcome) => outcome,
        Err(_) => Err(Failure::new(format!(
            "sandbox {id} is to be killed, but its host has not confirmed it yet: it will be killed when the host answers"
        ))),
    }
}
