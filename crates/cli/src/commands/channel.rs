//! `wrenn channel`: where the team is told of what happens, by webhooks and chats.

use std::collections::BTreeMap;
use std::process::ExitCode;

use api::v1::channels::{Channel, CreateChannel, EVENTS, SetConfig, TestChannel, Tested, UpdateChannel};
use serde_json::{Value, json};

use super::run::pair;
use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, age, facts, show, table};
use crate::printable::escaped;

#[derive(clap::Subcommand)]
pub enum Command {
    /// Make a channel. Of a webhook without a secret one is made, and shown this once.
    Create {
        name: String,
        /// webhook, discord, slack, teams, googlechat, telegram or matrix.
        #[arg(long)]
        provider: String,
        /// What the provider needs. webhook: url, secret. discord, slack, teams, googlechat: webhook_url. telegram: bot_token, chat_id. matrix:
        /// homeserver_url, access_token, room_id.
        #[arg(long = "set", value_name = "NAME=VALUE", value_parser = pair)]
        config: Vec<(String, String)>,
        /// Of what it is told, with commas [default: all].
        #[arg(long, value_name = "EVENTS", value_delimiter = ',')]
        events: Vec<String>,
    },
    /// The channels, and how the last message of each went.
    #[command(visible_alias = "ls")]
    List,
    /// One channel.
    Get { id: String },
    /// Give a channel another name, or other events.
    Edit {
        id: String,
        #[arg(long)]
        name: Option<String>,
        /// Of what it is told, with commas.
        #[arg(long, value_name = "EVENTS", value_delimiter = ',')]
        events: Option<Vec<String>>,
    },
    /// Give a channel other settings, all of them anew.
    Config {
        id: String,
        #[arg(long = "set", value_name = "NAME=VALUE", value_parser = pair, required = true)]
        config: Vec<(String, String)>,
    },
    /// Send a message of no importance by settings that are not a channel yet.
    Test {
        #[arg(long)]
        provider: String,
        #[arg(long = "set", value_name = "NAME=VALUE", value_parser = pair)]
        config: Vec<(String, String)>,
    },
    /// Take a channel away.
    Rm { id: String },
}

pub async fn run(command: Command, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let of = |id: &str| client.url(&["v1", "channels", id]);
    let settings = |pairs: Vec<(String, String)>| pairs.into_iter().collect::<BTreeMap<_, _>>();
    match command {
        Command::Create { name, provider, config, events } => {
            let events =
                if events.is_empty() { EVENTS.iter().map(|event| (*event).to_owned()).collect() } else { events };
            let body = CreateChannel { name, provider, config: settings(config), events };
            let channel: Channel = client.post(client.url(&["v1", "channels"]), &body).await?;
            show(format, &channel, described)?;
        }
        Command::List => {
            let channels: Vec<Channel> = client.get(client.url(&["v1", "channels"])).await?;
            show(format, &channels, |channels| {
                let head = ["ID", "NAME", "PROVIDER", "EVENTS", "TOLD", "PROBLEM"];
                table(&head, channels.iter().map(row).collect())
            })?;
        }
        Command::Get { id } => {
            let channel: Channel = client.get(of(&id)).await?;
            show(format, &channel, described)?;
        }
        Command::Edit { name: None, events: None, .. } => {
            return Err(Failure::usage("nothing to change: give --name or --events"));
        }
        Command::Edit { id, name, events } => {
            let channel: Channel = client.patch_for(of(&id), &UpdateChannel { name, events }).await?;
            show(format, &channel, described)?;
        }
        Command::Config { id, config } => {
            let url = client.url(&["v1", "channels", &id, "config"]);
            let channel: Channel = client.put(url, &SetConfig { config: settings(config) }).await?;
            show(format, &channel, described)?;
        }
        Command::Test { provider, config } => {
            let body = TestChannel { provider, config: settings(config) };
            let tested: Tested = client.post_once(client.url(&["v1", "channels", "test"]), &body).await?;
            show(format, &tested, |tested| tested.status.clone())?;
        }
        Command::Rm { id } => {
            client.delete::<Value>(of(&id)).await?;
            show(format, &json!({ "id": id, "removed": true }), |_| format!("removed {id}"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn row(channel: &Channel) -> Vec<String> {
    vec![
        channel.id.clone(),
        channel.name.clone(),
        channel.provider.clone(),
        if channel.events.len() == EVENTS.len() { "all".to_owned() } else { channel.events.join(",") },
        channel.delivered_at.map(|at| format!("{} ago", age(at))).unwrap_or_default(),
        // What the other side answered.
        channel.problem.as_deref().map(escaped).unwrap_or_default(),
    ]
}

fn described(channel: &Channel) -> String {
    facts(&[
        ("id", channel.id.clone()),
        ("name", channel.name.clone()),
        ("provider", channel.provider.clone()),
        ("events", channel.events.join(" ")),
        ("told", channel.delivered_at.map(|at| at.to_rfc3339()).unwrap_or_default()),
        ("problem", channel.problem.as_deref().map(escaped).unwrap_or_default()),
        ("secret", channel.secret.clone().unwrap_or_default()),
    ])
}
