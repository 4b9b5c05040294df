//! `wrenn snapshot`: what sandboxes were, under names that others can begin with.

use std::process::ExitCode;

use api::v1::snapshots::{CreateSnapshot, MadeSnapshot, Template};
use indicatif::HumanBytes;
use serde_json::{Value, json};

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, age, show, spinner, table};

#[derive(clap::Subcommand)]
pub enum Command {
    /// Keep what a sandbox is now, with its memory. One that runs goes on, one that is paused stays so.
    Create {
        sandbox: String,
        /// [default: template- and eight digits]
        #[arg(long)]
        name: Option<String>,
    },
    /// What sandboxes can begin with: the team's snapshots and the platform's templates.
    #[command(visible_alias = "ls")]
    List {
        /// Only these.
        #[arg(long = "type", value_name = "base|snapshot")]
        kind: Option<String>,
    },
    /// Nothing begins with them any more. Sandboxes that did live on.
    #[command(visible_alias = "rm")]
    Delete {
        #[arg(required = true)]
        names: Vec<String>,
    },
}

pub async fn run(command: Command, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    match command {
        Command::Create { sandbox, name } => {
            let bar = spinner(format, "saving a snapshot");
            let mut url = client.url(&["v1", "snapshots"]);
            url.set_query(Some("wait_sec=120"));
            let made: MadeSnapshot = client.post(url, &CreateSnapshot { sandbox_id: sandbox, name }).await?;
            bar.finish_and_clear();
            show(format, &made, |made| made.template.name.clone())?;
        }
        Command::List { kind } => {
            let mut url = client.url(&["v1", "snapshots"]);
            if let Some(kind) = kind {
                url.query_pairs_mut().append_pair("type", &kind);
            }
            let templates: Vec<Template> = client.get(url).await?;
            show(format, &templates, |templates| {
                let head = ["NAME", "TYPE", "VCPUS", "MEMORY", "DISK", "SIZE", "AGE", "OF"];
                table(&head, templates.iter().map(row).collect())
            })?;
        }
        Command::Delete { names } => {
            return delete_all(&client, &["v1", "snapshots"], names, format).await;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Each by its name, below an address.
pub async fn delete_all(
    client: &Client,
    below: &[&str],
    names: Vec<String>,
    format: Format,
) -> Result<ExitCode, Failure> {
    let mut deleted = Vec::new();
    let mut first_failure = None;
    for name in names {
        match client.delete::<Value>(client.url(&[below, &[name.as_str()]].concat())).await {
            Ok(_) => deleted.push(name),
            // The others are deleted all the same; the first failure decides the exit code.
            Err(failure) if first_failure.is_none() => first_failure = Some(failure),
            Err(failure) => failure.print(format),
        }
    }
    if !deleted.is_empty() {
        show(format, &json!({ "deleted": deleted }), |_| deleted.join("\n"))?;
    }
    first_failure.map_or(Ok(ExitCode::SUCCESS), Err)
}

fn row(template: &Template) -> Vec<String> {
    let number = |value: Option<i64>| value.map(|value| value.to_string()).unwrap_or_default();
    let mib = |value: Option<i64>| value.map(|value| format!("{value} MiB")).unwrap_or_default();
    // What the platform's templates take is nobody's of a team.
    let size = match u64::try_from(template.size_bytes) {
        Ok(bytes) if !template.platform => HumanBytes(bytes).to_string(),
        _ => String::new(),
    };
    vec![
        template.name.clone(),
        template.kind.clone(),
        number(template.vcpus),
        mib(template.memory_mb),
        mib(template.disk_size_mb),
        size,
        template.created_at.map(age).unwrap_or_default(),
        template.sandbox_id.clone().unwrap_or_default(),
    ]
}
