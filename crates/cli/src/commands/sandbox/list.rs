//! `wrenn sandbox list`.

use std::process::ExitCode;

use api::v1::sandboxes::Sandbox;

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, age, show, table};

#[derive(clap::Args)]
pub struct Arguments {}

pub async fn run(_: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let sandboxes: Vec<Sandbox> = client.get(client.url(&["v1", "sandboxes"])).await?;
    show(format, &sandboxes, |sandboxes| {
        table(
            &["ID", "STATUS", "TEMPLATE", "VCPUS", "MEMORY", "ISOLATION", "AGE", "REASON"],
            sandboxes.iter().map(row).collect(),
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

fn row(sandbox: &Sandbox) -> Vec<String> {
    vec![
        sandbox.id.clone(),
        sandbox.status.clone(),
        sandbox.template.clone(),
        sandbox.vcpus.to_string(),
        format!("{} MiB", sandbox.memory_mb),
        sandbox.isolation.clone().unwrap_or_default(),
        age(sandbox.created_at),
        sandbox.reason.clone().unwrap_or_default(),
    ]
}
