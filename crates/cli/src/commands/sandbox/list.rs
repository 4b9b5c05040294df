//! `wrenn sandbox list`.

use std::process::ExitCode;

use api::v1::sandboxes::Sandbox;
use chrono::{DateTime, Utc};
use url::Url;

use crate::client::Client;
use crate::commands::run::pair;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, age, show, table};

/// Of one call of the API: an answer stays small, and a long list comes in a few of them.
const PAGE: usize = 1000;

#[derive(clap::Args)]
pub struct Arguments {
    /// Only those that are running, paused, ...; with commas.
    #[arg(long, value_name = "STATUS", value_delimiter = ',')]
    status: Vec<String>,
    /// Only those that began with this template or snapshot.
    #[arg(long, value_name = "NAME")]
    template: Option<String>,
    /// Only those that have this pair; may be repeated, and then they have all of them.
    #[arg(long = "metadata", short, value_name = "NAME=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// Only those from after this instant: 2026-01-31T12:00:00Z.
    #[arg(long, value_name = "INSTANT")]
    created_after: Option<DateTime<Utc>>,
    /// Only those from before this instant.
    #[arg(long, value_name = "INSTANT")]
    created_before: Option<DateTime<Utc>>,
    /// At most so many, the newest first [default: all].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Only their ids.
    #[arg(long, short)]
    quiet: bool,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let limit = arguments.limit.map_or(usize::MAX, |limit| limit as usize);
    let mut sandboxes: Vec<Sandbox> = Vec::new();
    let mut next = Some(arguments.url(&client, limit.min(PAGE)));
    while let Some(url) = next.filter(|_| sandboxes.len() < limit) {
        let (page, after): (Vec<Sandbox>, _) = client.get_page(url).await?;
        sandboxes.extend(page);
        next = after;
    }
    sandboxes.truncate(limit);
    show(format, &sandboxes, |sandboxes| {
        if arguments.quiet {
            return sandboxes.iter().map(|sandbox| sandbox.id.as_str()).collect::<Vec<_>>().join("\n");
        }
        table(
            &["ID", "STATUS", "TEMPLATE", "VCPUS", "MEMORY", "ISOLATION", "AGE", "REASON"],
            sandboxes.iter().map(row).collect(),
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

impl Arguments {
    fn url(&self, client: &Client, limit: usize) -> Url {
        let mut url = client.url(&["v1", "sandboxes"]);
        let mut query = url.query_pairs_mut();
        query.append_pair("limit", &limit.to_string());
        if !self.status.is_empty() {
            query.append_pair("status", &self.status.join(","));
        }
        if let Some(template) = &self.template {
            query.append_pair("template", template);
        }
        for (name, value) in &self.metadata {
            query.append_pair(&format!("metadata.{name}"), value);
        }
        for (name, at) in [("created_after", self.created_after), ("created_before", self.created_before)] {
            if let Some(at) = at {
                query.append_pair(name, &at.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true));
            }
        }
        drop(query);
        url
    }
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
