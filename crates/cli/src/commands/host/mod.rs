//! `wrenn host`: the machines that run sandboxes. For administrators.

pub mod install;

use std::process::ExitCode;

use api::v1::hosts::{CreateHost, Host, HostWithToken};
use serde_json::{Value, json};

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, age, facts, show, table};

#[derive(clap::Subcommand)]
pub enum Command {
    /// Make a host record and a registration token for the machine that is to become it.
    Add {
        /// Where the machine comes from, for people.
        #[arg(long)]
        provider: Option<String>,
        #[arg(long)]
        availability_zone: Option<String>,
    },
    #[command(visible_alias = "ls")]
    List,
    /// Remove a host. Its credentials stop working at once.
    Rm { id: String },
    /// Make this machine a host: look whether it can be one, put the service into place, join by a registration token.
    Install(Box<install::Arguments>),
    /// What the host agent itself says: VMM, templates, what it holds in the kernel.
    Inspect { id: String },
}

pub async fn run(command: Command, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    if let Command::Install(arguments) = command {
        // Of this machine, and nobody is asked.
        return install::run(&arguments, options, format).await;
    }
    let client = Client::of_administrator(options).await?;
    match command {
        Command::Install(_) => {}
        Command::Add { provider, availability_zone } => {
            let wanted = CreateHost { kind: "regular".to_owned(), provider, availability_zone };
            let made: HostWithToken = client.post(client.url(&["v1", "hosts"]), &wanted).await?;
            show(format, &made, |made| how_to_register(&client, made))?;
        }
        Command::List => {
            let hosts: Vec<Host> = client.get(client.url(&["v1", "hosts"])).await?;
            show(format, &hosts, |hosts| {
                table(
                    &["ID", "STATUS", "ISOLATION", "ADDRESS", "CPUS", "MEMORY", "HEARTBEAT"],
                    hosts.iter().map(row).collect(),
                )
            })?;
        }
        Command::Rm { id } => {
            client.delete::<Value>(client.url(&["v1", "hosts", &id])).await?;
            show(format, &json!({ "id": id, "removed": true }), |_| format!("removed {id}"))?;
        }
        Command::Inspect { id } => {
            let host: Value = client.get(client.url(&["v1", "hosts", &id, "inspect"])).await?;
            show(format, &host, inspected)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn how_to_register(client: &Client, made: &HostWithToken) -> String {
    // The control plane's address as seen from here may be a loopback one, which is of no use on another machine.
    let url = match client.base().host_str() {
        Some("127.0.0.1" | "localhost" | "[::1]") | None => {
            format!("http://CONTROL-PLANE:{}", client.base().port_or_known_default().unwrap_or_default())
        }
        Some(_) => client.base().to_string(),
    };
    format!(
        "host {}\n\nOn the new machine, within the hour (the token works once):\n\n  \
         WRENN_CP_URL={url} WRENN_REGISTRATION_TOKEN={} \\\n    wrenn host install --address ADDRESS-OF-THAT-MACHINE:50051",
        made.host.id, made.registration_token
    )
}

fn row(host: &Host) -> Vec<String> {
    let number = |value: Option<i64>| value.map(|value| value.to_string()).unwrap_or_default();
    vec![
        host.id.clone(),
        host.status.clone(),
        host.isolation.clone().unwrap_or_default(),
        host.address.clone().unwrap_or_default(),
        number(host.cpu_cores),
        host.memory_mb.map(|mib| format!("{mib} MiB")).unwrap_or_default(),
        host.last_heartbeat_at.map(|at| format!("{} ago", age(at))).unwrap_or_default(),
    ]
}

/// The fields are the agent's, which may be newer than this program: all of them are shown.
fn inspected(host: &Value) -> String {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items
            .iter()
            .map(|item| item.as_str().map_or_else(|| item.to_string(), str::to_owned))
            .collect::<Vec<_>>()
            .join("\n  "),
        Value::Object(map) => map.iter().map(|(key, value)| format!("{key} {value}")).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    };
    let rows: Vec<(String, String)> = host
        .as_object()
        .map(|fields| fields.iter().map(|(name, value)| (name.clone(), text(value))).collect())
        .unwrap_or_default();
    let rows: Vec<(&str, String)> = rows.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    facts(&rows)
}
