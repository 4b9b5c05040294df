//! `wrenn key`: the API keys of the team.

use std::process::ExitCode;

use api::v1::keys::{ApiKey, CreateApiKey};
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
    },
    /// List the keys, without the keys themselves.
    #[command(visible_alias = "ls")]
    List,
    /// Take a key back: it stops working at once.
    Rm { id: String },
}

pub async fn run(command: Command, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_administrator(options).await?;
    match command {
        Command::Create { name } => {
            let key: ApiKey = client.post(client.url(&["v1", "api-keys"]), &CreateApiKey { name, ..CreateApiKey::default() }).await?;
            show(format, &key, |key| key.key.clone().unwrap_or_default())?;
        }
        Command::List => {
            let keys: Vec<ApiKey> = client.get(client.url(&["v1", "api-keys"])).await?;
            show(format, &keys, |keys| {
                let row = |key: &ApiKey| {
                    let used = key.last_used.map_or_else(|| "never".to_owned(), |used| format!("{} ago", age(used)));
                    vec![key.id.clone(), key.key_prefix.clone(), key.name.clone(), age(key.created_at), used]
                };
                table(&["ID", "PREFIX", "NAME", "AGE", "USED"], keys.iter().map(row).collect())
            })?;
        }
        Command::Rm { id } => {
            client.delete::<Value>(client.url(&["v1", "api-keys", &id])).await?;
            show(format, &json!({ "id": id, "removed": true }), |_| format!("removed {id}"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
