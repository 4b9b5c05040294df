//! `wrenn admin template`: what sandboxes can begin with, of all teams, and what the platform offers.

use std::process::ExitCode;

use api::v1::snapshots::{AnyTemplate, MadeSnapshot, PublishSnapshot};
use indicatif::HumanBytes;

use super::super::snapshot::delete_all;
use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, age, show, spinner, table};

#[derive(clap::Subcommand)]
pub enum Command {
    /// The templates of the platform, the images of its hosts, and the snapshots of all teams.
    #[command(visible_alias = "ls")]
    List,
    /// Nothing begins with these templates of the platform any more. Sandboxes that did live on.
    #[command(visible_alias = "rm")]
    Delete {
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Make a sandbox of the platform's team a template for all teams. It ends; a template that has the name gives way.
    Publish {
        sandbox: String,
        /// [default: template- and eight digits]
        #[arg(long)]
        name: Option<String>,
    },
}

pub async fn run(command: Command, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_person(options).await?;
    match command {
        Command::List => {
            let templates: Vec<AnyTemplate> = client.get(client.url(&["v1", "admin", "templates"])).await?;
            show(format, &templates, |templates| {
                let head = ["NAME", "TYPE", "VCPUS", "MEMORY", "SIZE", "OF", "AGE"];
                table(&head, templates.iter().map(row).collect())
            })?;
        }
        Command::Delete { names } => {
            return delete_all(&client, &["v1", "admin", "templates"], names, format).await;
        }
        Command::Publish { sandbox, name } => {
            let bar = spinner(format, "making the template");
            let mut url = client.url(&["v1", "admin", "capsules", &sandbox, "snapshot"]);
            url.set_query(Some("wait_sec=120"));
            let made: MadeSnapshot = client.post(url, &PublishSnapshot { name }).await?;
            bar.finish_and_clear();
            show(format, &made, |made| made.template.name.clone())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn row(template: &AnyTemplate) -> Vec<String> {
    let AnyTemplate { template, team_id } = template;
    let number = |value: Option<i64>| value.map(|value| value.to_string()).unwrap_or_default();
    vec![
        template.name.clone(),
        template.kind.clone(),
        number(template.vcpus),
        template.memory_mb.map(|memory| format!("{memory} MiB")).unwrap_or_default(),
        // How large an image is, its hosts know.
        u64::try_from(template.size_bytes)
            .ok()
            .filter(|bytes| *bytes > 0)
            .map(|b| HumanBytes(b).to_string())
            .unwrap_or_default(),
        if template.platform { "platform".to_owned() } else { team_id.clone() },
        template.created_at.map(age).unwrap_or_default(),
    ]
}
