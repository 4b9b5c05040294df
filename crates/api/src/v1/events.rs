//! Events: what happened to a team's things, as a stream and in pages.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};

use super::sandboxes::Sandbox;

/// The kinds of the published stream, beside `connected`. Published clients refuse any other.
pub const PUBLISHED: [&str; 9] = [
    "capsule.create",
    "capsule.pause",
    "capsule.resume",
    "capsule.destroy",
    "capsule.state.changed",
    "template.snapshot.create",
    "template.snapshot.delete",
    "host.up",
    "host.down",
];

/// What `/v1/events` and `/v1/events/all/stream` tell as well.
pub const MORE: [&str; 4] = ["snapshot.began", "sandbox.forked", "sandbox.timeout.changed", "sandbox.metadata.changed"];

/// The first one of a stream.
pub const CONNECTED: &str = "connected";
/// Of the stream of all kinds: events that came after the one that was named are not kept any more.
pub const GAP: &str = "gap";

/// One event: the `data` of one message of a stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Where it stands in the order of the team's events; it grows. Absent in the published stream, where the message's `id` says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// connected, capsule.create, capsule.pause, capsule.resume, capsule.destroy, capsule.state.changed, template.snapshot.create,
    /// template.snapshot.delete, host.up, host.down; and, where all kinds are told, snapshot.began, sandbox.forked,
    /// sandbox.timeout.changed, sandbox.metadata.changed, gap
    pub event: String,
    /// `success` or `error`, of what somebody wished: create, pause, resume, destroy and both of snapshots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource: Option<EventResource>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actor: Option<EventActor>,
    /// Words: `from` and `to` of a change of state, `reason` (ttl_expired, idle, auto_resume, host_failure, team_deleted, ...), and
    /// `sandbox_id` of a snapshot and of what a fork was made of.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// A sentence, of an outcome `error`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What a `capsule.*` event is of, as it is when the event is read; null when it is gone, and in other events.
    pub sandbox: Option<Sandbox>,
    /// When it happened.
    pub timestamp: DateTime<Utc>,
    /// Where all kinds are told: `operation`, `attempts`, `code`, `ms` and `steps` (name and milliseconds) of what was carried out.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub details: Map<String, Value>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EventResource {
    pub id: String,
    /// capsule, template, host
    #[serde(rename = "type")]
    pub kind: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EventActor {
    /// user, api_key, system
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A part of a team's events, oldest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EventPage {
    pub events: Vec<Event>,
    /// What to ask for as `after` for those that come next.
    pub next_after: String,
    /// Events before this one are not kept any more.
    pub oldest: String,
}

/// Where a stream begins.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct StreamFrom {
    /// As the header `Last-Event-ID`, which goes before it: what came after that event is told first. Without, the stream begins now.
    #[param(max_length = 20, pattern = "^[0-9]+$")]
    pub last_event_id: Option<String>,
}

/// Which events of a stream.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct StreamOf {
    /// Of this sandbox alone.
    pub sandbox_id: Option<String>,
    /// Of these kinds, with commas.
    pub kinds: Option<String>,
}

/// Which events.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct EventsAsked {
    /// Those after this one; from the oldest that is kept when absent.
    #[param(max_length = 20, pattern = "^[0-9]+$")]
    pub after: Option<String>,
    /// 1 to 1000; 100 when absent.
    #[param(minimum = 1, maximum = 1000)]
    pub limit: Option<i64>,
    /// Of this sandbox alone.
    pub sandbox_id: Option<String>,
    /// Of these kinds, with commas.
    pub kinds: Option<String>,
}
