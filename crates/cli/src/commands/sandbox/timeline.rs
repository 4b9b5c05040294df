//! `wrenn sandbox timeline ID`.

use std::process::ExitCode;

use api::v1::sandboxes::TimelineEntry;

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show, table};

#[derive(clap::Args)]
pub struct Arguments {
    id: String,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let url = client.url(&["v1", "sandboxes", &arguments.id, "timeline"]);
    let entries: Vec<TimelineEntry> = client.get(url).await?;
    show(format, &entries, |entries| {
        table(&["AT", "WHAT", "OUTCOME", "MS", "STEPS"], entries.iter().map(row).collect())
    })?;
    Ok(ExitCode::SUCCESS)
}

fn row(entry: &TimelineEntry) -> Vec<String> {
    let steps: Vec<String> = entry.steps.iter().map(|step| format!("{} {:.0}", step.name, step.ms)).collect();
    let outcome = match &entry.reason {
        Some(reason) => format!("{}: {reason}", entry.outcome),
        None => entry.outcome.clone(),
    };
    vec![
        entry.began_at.format("%Y-%m-%d %H:%M:%S").to_string(),
        entry.kind.clone(),
        outcome,
        entry.ms.map(|ms| format!("{ms:.0}")).unwrap_or_default(),
        steps.join(", "),
    ]
}
