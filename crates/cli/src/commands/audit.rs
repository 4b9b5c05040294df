//! `wrenn audit`: who did what in the team, or, for administrators, on the platform.

use std::process::ExitCode;

use api::v1::audit::{AuditEntry, AuditLog};
use chrono::{DateTime, Utc};
use url::Url;

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show, table};

/// Of one call of the API.
const PAGE: usize = 200;

#[derive(clap::Args)]
pub struct Arguments {
    /// What was done with the platform: its hosts and people (administrators).
    #[arg(long)]
    platform: bool,
    /// What was done in this team (administrators).
    #[arg(long, value_name = "ID", conflicts_with = "platform")]
    team: Option<String>,
    /// Only of these: sandbox, snapshot, team, api_key, member, invitation, session, host, user. With commas.
    #[arg(long, value_name = "KINDS", value_delimiter = ',')]
    kind: Vec<String>,
    /// Only these: create, kill, delete, ..., or sandbox.create. With commas.
    #[arg(long, value_name = "ACTIONS", value_delimiter = ',')]
    action: Vec<String>,
    /// Only from before this instant: 2026-01-31T12:00:00Z.
    #[arg(long, value_name = "INSTANT")]
    before: Option<DateTime<Utc>>,
    /// At most so many, the newest first.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_person(options).await?;
    let limit = arguments.limit as usize;
    let mut entries: Vec<AuditEntry> = Vec::new();
    let mut before_id: Option<String> = None;
    while entries.len() < limit {
        let wanted = PAGE.min(limit - entries.len());
        let page: AuditLog = client.get(arguments.url(&client, before_id.as_deref(), wanted)).await?;
        let is_last = page.items.len() < wanted;
        entries.extend(page.items);
        before_id = page.next_before_id;
        if is_last || before_id.is_none() {
            break;
        }
    }
    show(format, &entries, |entries| {
        table(&["AT", "WHO", "ACTION", "OF", "REQUEST"], entries.iter().map(row).collect())
    })?;
    Ok(ExitCode::SUCCESS)
}

impl Arguments {
    fn url(&self, client: &Client, before_id: Option<&str>, limit: usize) -> Url {
        let of_administrator = self.platform || self.team.is_some();
        let mut url = match of_administrator {
            true => client.url(&["v1", "admin", "audit-logs"]),
            false => client.url(&["v1", "audit-logs"]),
        };
        let mut query = url.query_pairs_mut();
        query.append_pair("limit", &limit.to_string());
        for (name, words) in [("resource_type", &self.kind), ("action", &self.action)] {
            if !words.is_empty() {
                query.append_pair(name, &words.join(","));
            }
        }
        for (name, value) in [("team_id", self.team.as_deref()), ("before_id", before_id)] {
            if let Some(value) = value {
                query.append_pair(name, value);
            }
        }
        if let Some(before) = self.before {
            query.append_pair("before", &before.to_rfc3339());
        }
        drop(query);
        url
    }
}

fn row(entry: &AuditEntry) -> Vec<String> {
    let who = if entry.actor_name.is_empty() { &entry.actor_id } else { &entry.actor_name };
    vec![
        entry.created_at.format("%Y-%m-%d %H:%M:%S").to_string(),
        who.clone(),
        format!("{}.{}", entry.resource_type, entry.action),
        entry.resource_id.clone(),
        entry.request_id.clone(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Credential;

    fn arguments() -> Arguments {
        Arguments { platform: false, team: None, kind: Vec::new(), action: Vec::new(), before: None, limit: 50 }
    }

    #[test]
    fn what_is_asked_for_is_in_the_address() {
        let client = Client::new(Url::parse("http://h:1/api").unwrap(), Credential::None).unwrap();
        let of = |arguments: Arguments, before_id| arguments.url(&client, before_id, 7).to_string();
        assert_eq!(of(arguments(), None), "http://h:1/api/v1/audit-logs?limit=7");
        let platforms = Arguments { platform: true, kind: vec!["host".into(), "user".into()], ..arguments() };
        assert_eq!(
            of(platforms, Some("log-9")),
            "http://h:1/api/v1/admin/audit-logs?limit=7&resource_type=host%2Cuser&before_id=log-9"
        );
        let before = Some("2026-01-31T12:00:00Z".parse().unwrap());
        let of_team = Arguments { team: Some("team-x".into()), before, ..arguments() };
        assert_eq!(
            of(of_team, None),
            "http://h:1/api/v1/admin/audit-logs?limit=7&team_id=team-x&before=2026-01-31T12%3A00%3A00%2B00%3A00"
        );
    }
}
