//! `wrenn host`: the machines that run sandboxes. For administrators, and for those who decide in a team that has hosts of its own.

pub mod install;

use std::process::ExitCode;

use api::v1::hosts::{AddTag, CreateHost, DeletePreview, Host, HostWithToken, Silence};
use serde_json::{Value, json};

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, age, facts, show, table};

#[derive(clap::Subcommand)]
pub enum Command {
    /// Make a host record and a registration token for the machine that is to become it.
    Add {
        /// A host of this team's own, which takes its sandboxes alone.
        #[arg(long, value_name = "ID")]
        team: Option<String>,
        /// Where the machine comes from, for people.
        #[arg(long)]
        provider: Option<String>,
        #[arg(long)]
        availability_zone: Option<String>,
        /// A word (gpu) or a pair (zone=a) that creates can ask for; may be repeated.
        #[arg(long = "tag", value_name = "TAG")]
        tags: Vec<String>,
    },
    /// Make another registration token for a host that has not joined. Those before it open nothing any more.
    Token { id: String },
    #[command(visible_alias = "ls")]
    List,
    /// One host.
    Get { id: String },
    /// Take nothing new onto a host. What is on it goes on; the answer says what is left.
    Drain { id: String },
    /// Take new sandboxes onto it again.
    Undrain { id: String },
    /// Believe a host again of which two machines spoke, once the other one is stopped.
    Unfence { id: String },
    /// Say what a host is, for creates that ask for it; show its tags.
    Tag {
        id: String,
        /// Tags that it gets.
        tags: Vec<String>,
        /// Tags that it loses.
        #[arg(long = "remove", value_name = "TAG")]
        removed: Vec<String>,
    },
    /// Remove a host. Its credentials stop working at once. One with sandboxes or snapshots stays, unless it is forced.
    Rm {
        id: String,
        /// Only show what would be lost.
        #[arg(long)]
        preview: bool,
        /// Also with what is on it, which counts as killed and deleted.
        #[arg(long, conflicts_with = "preview")]
        force: bool,
    },
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
    let client = Client::of_person(options).await?;
    match command {
        Command::Install(_) => {}
        Command::Add { team, provider, availability_zone, tags } => {
            let tags = (!tags.is_empty()).then_some(tags);
            let kind = if team.is_some() { "byoc" } else { "regular" }.to_owned();
            let wanted = CreateHost { kind, team_id: team, provider, availability_zone, tags };
            let made: HostWithToken = client.post(client.url(&["v1", "hosts"]), &wanted).await?;
            show(format, &made, |made| how_to_register(&client, made))?;
        }
        Command::Token { id } => {
            let url = client.url(&["v1", "hosts", &id, "token"]);
            let made: HostWithToken = client.post(url, &json!({})).await?;
            show(format, &made, |made| how_to_register(&client, made))?;
        }
        Command::List => {
            let hosts: Vec<Host> = client.get(client.url(&["v1", "hosts"])).await?;
            show(format, &hosts, |hosts| {
                table(
                    &[
                        "ID",
                        "TYPE",
                        "TEAM",
                        "STATUS",
                        "ISOLATION",
                        "ADDRESS",
                        "CPUS",
                        "MEMORY",
                        "HELD",
                        "TAGS",
                        "HEARTBEAT",
                    ],
                    hosts.iter().map(row).collect(),
                )
            })?;
            warn_of_silence(&client, format).await;
        }
        Command::Get { id } => {
            let host: Value = client.get(client.url(&["v1", "hosts", &id])).await?;
            show(format, &host, inspected)?;
        }
        Command::Drain { id } => turn(&client, format, &id, "drain").await?,
        Command::Undrain { id } => turn(&client, format, &id, "undrain").await?,
        Command::Unfence { id } => turn(&client, format, &id, "unfence").await?,
        Command::Tag { id, tags, removed } => {
            for tag in tags {
                client.post_for_nothing(client.url(&["v1", "hosts", &id, "tags"]), &AddTag { tag }).await?;
            }
            for tag in &removed {
                client.delete::<Value>(client.url(&["v1", "hosts", &id, "tags", tag])).await?;
            }
            let tags: Vec<String> = client.get(client.url(&["v1", "hosts", &id, "tags"])).await?;
            show(format, &tags, |tags| tags.join("\n"))?;
        }
        Command::Rm { id, preview: true, .. } => {
            let preview: DeletePreview = client.get(client.url(&["v1", "hosts", &id, "delete-preview"])).await?;
            show(format, &preview, would_be_lost)?;
        }
        Command::Rm { id, force, .. } => {
            let mut url = client.url(&["v1", "hosts", &id]);
            url.set_query(force.then_some("force=true"));
            client.delete::<Value>(url).await?;
            show(format, &json!({ "id": id, "removed": true }), |_| format!("removed {id}"))?;
        }
        Command::Inspect { id } => {
            let host: Value = client.get(client.url(&["v1", "hosts", &id, "inspect"])).await?;
            show(format, &host, inspected)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn turn(client: &Client, format: Format, id: &str, verb: &str) -> Result<(), Failure> {
    let host: Host = client.post(client.url(&["v1", "hosts", id, verb]), &json!({})).await?;
    show(format, &host, |host| {
        let held = &host.held;
        format!(
            "{} is {}; on it: {} running, {} paused, {} failed, {} snapshots",
            host.id, host.status, held.running, held.paused, held.failed, held.snapshots
        )
    })
}

/// For people only, and no reason to fail: a control plane of before does not know the route.
async fn warn_of_silence(client: &Client, format: Format) {
    let silence = client.get::<Silence>(client.url(&["v1", "hosts", "silence"])).await;
    if let (Format::Human, Ok(Silence { hosts, silent, brake_since: Some(_) })) = (format, silence) {
        eprintln!(
            "{silent} of {hosts} hosts fell silent together: nothing is concluded from that until half of them are back"
        );
    }
}

fn would_be_lost(preview: &DeletePreview) -> String {
    let held = &preview.host.held;
    let sandboxes = preview.sandboxes.iter().map(|on| format!("sandbox {} ({})", on.id, on.status));
    let snapshots = preview.snapshots.iter().map(|name| format!("snapshot {name}"));
    let unclaimed = preview.unclaimed.iter().map(|id| format!("unknown sandbox {id}"));
    let lines: Vec<String> = sandboxes.chain(snapshots).chain(unclaimed).collect();
    let count = held.running + held.paused + held.failed + held.snapshots;
    format!("{}\n{count} in all; nothing was removed", lines.join("\n")).trim_start().to_owned()
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
        host.kind.clone(),
        host.team_name.clone().unwrap_or_default(),
        if host.copy_heard_at.is_some() { format!("{}, copied", host.status) } else { host.status.clone() },
        host.isolation.clone().unwrap_or_default(),
        host.address.clone().unwrap_or_default(),
        number(host.cpu_cores),
        host.memory_mb.map(|mib| format!("{mib} MiB")).unwrap_or_default(),
        format!("{}+{}", host.held.running, host.held.paused + host.held.failed),
        host.tags.join(" "),
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
