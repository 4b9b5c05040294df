//! Channels: where a team is told of what happens to its sandboxes, snapshots and hosts.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a channel can be told of. `channel.test` comes of `POST /v1/channels/test` alone.
pub const EVENTS: [&str; 8] = [
    "capsule.created",
    "capsule.running",
    "capsule.paused",
    "capsule.destroyed",
    "template.snapshot.created",
    "template.snapshot.deleted",
    "host.up",
    "host.down",
];

/// `POST /v1/channels`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CreateChannel {
    /// 1 to 64 letters, digits, dots, dashes or underscores; written in lower case, blanks as dashes.
    pub name: String,
    /// `webhook`, `discord`, `slack`, `teams`, `googlechat`, `telegram` or `matrix`.
    pub provider: String,
    /// What the provider needs. webhook: `url`, and `secret`, which is made when absent. discord, slack, teams, googlechat: `webhook_url`.
    /// telegram: `bot_token`, `chat_id`. matrix: `homeserver_url`, `access_token`, `room_id`.
    #[serde(default)]
    pub config: BTreeMap<String, String>,
    /// Of which events it is told: `capsule.created`, `capsule.running` (resumed), `capsule.paused`, `capsule.destroyed`,
    /// `template.snapshot.created`, `template.snapshot.deleted`, `host.up`, `host.down`.
    #[serde(default)]
    pub events: Vec<String>,
}

/// `PATCH /v1/channels/{id}`; what is absent stays.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct UpdateChannel {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub events: Option<Vec<String>>,
}

/// `PUT /v1/channels/{id}/config`: all of it anew.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SetConfig {
    #[serde(default)]
    pub config: BTreeMap<String, String>,
}

/// `POST /v1/channels/test`: tells `channel.test` there, without a channel.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TestChannel {
    pub provider: String,
    #[serde(default)]
    pub config: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Tested {
    /// `ok`
    pub status: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Channel {
    pub id: String,
    pub team_id: String,
    pub name: String,
    pub provider: String,
    pub events: Vec<String>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
    /// When it was last told of something; up to a minute old.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delivered_at: Option<DateTime<Utc>>,
    /// Why that last failed; absent when it went well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem_at: Option<DateTime<Utc>>,
    /// Of a webhook, by which it knows that it is us: only in the answer to the call that made or changed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
}

/// What a webhook is told, and what the other providers' texts are made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct News {
    pub event: String,
    pub timestamp: DateTime<Utc>,
    pub team_id: String,
    pub actor: NewsActor,
    pub resource: NewsResource,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NewsActor {
    /// `user`, `api_key` or `system`.
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NewsResource {
    pub id: String,
    /// `sandbox`, `snapshot` or `host`.
    #[serde(rename = "type")]
    pub kind: String,
}
