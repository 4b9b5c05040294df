//! `wrenn key`: the API keys of the team.

use std::process::ExitCode;

use api::v1::keys::{ApiKey, CreateApiKey};
use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, age, show, table};

#[derive(clap::Subcommand)]
pub enum Command {
    /// Make a key. It is shown once and is kept nowhere.
    Create {
        /// What it is for.
        #[arg(long)]
        name: Option<String>,
        /// What it opens; may be given several times. Default: all but api-keys.
        #[arg(long, value_name = "SCOPE", value_delimiter = ',')]
        scope: Vec<String>,
        /// From when on it opens nothing: an instant (2027-01-31T00:00:00Z), or days from now (90d).
        #[arg(long, value_name = "WHEN", value_parser = instant)]
        expires: Option<DateTime<Utc>>,
    },
    /// List the keys, without the keys themselves.
    #[command(visible_alias = "ls")]
    List,
    /// Take a key back: it stops working at once.
    Rm { id: String },
}

pub async fn run(command: Command, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_person(options).await?;
    match command {
        Command::Create { name, scope, expires } => {
            let scopes = (!scope.is_empty()).then_some(scope);
            let body = CreateApiKey { name, scopes, expires_at: expires };
            let key: ApiKey = client.post(client.url(&["v1", "api-keys"]), &body).await?;
            show(format, &key, |key| key.key.clone().unwrap_or_default())?;
        }
        Command::List => {
            let keys: Vec<ApiKey> = client.get(client.url(&["v1", "api-keys"])).await?;
            show(format, &keys, |keys| {
                let row = |key: &ApiKey| {
                    let used = key.last_used.map_or_else(|| "never".to_owned(), |used| format!("{} ago", age(used)));
                    let until = key.expires_at.map(|at| at.to_rfc3339()).unwrap_or_default();
                    let scopes = key.scopes.join(",");
                    let (id, prefix, name) = (key.id.clone(), key.key_prefix.clone(), key.name.clone());
                    vec![id, prefix, name, age(key.created_at), used, until, scopes]
                };
                table(&["ID", "PREFIX", "NAME", "AGE", "USED", "UNTIL", "SCOPES"], keys.iter().map(row).collect())
            })?;
        }
        Command::Rm { id } => {
            client.delete::<Value>(client.url(&["v1", "api-keys", &id])).await?;
            show(format, &json!({ "id": id, "removed": true }), |_| format!("removed {id}"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn instant(text: &str) -> Result<DateTime<Utc>, String> {
    let days = text.strip_suffix('d').and_then(|days| days.parse::<u32>().ok());
    match days.and_then(|days| TimeDelta::try_days(days.into())).and_then(|life| Utc::now().checked_add_signed(life)) {
        Some(at) => Ok(at),
        None => text.parse().map_err(|_| "give it as 2027-01-31T00:00:00Z or 90d".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_an_instant_or_a_number_of_days() {
        assert_eq!(instant("2027-01-31T00:00:00Z").unwrap().timestamp(), 1_801_353_600);
        let ninety = instant("90d").unwrap() - Utc::now();
        assert!((ninety.num_hours() - 90 * 24).abs() <= 1);
        for wrong in ["", "d", "90", "-1d", "tomorrow", "99999999999d", "4294967295d"] {
            assert!(instant(wrong).is_err(), "{wrong}");
        }
    }
}
