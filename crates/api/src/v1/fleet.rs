//! The platform as a whole, for whoever runs it.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `GET /v1/admin/fleet`: what one replica sees in one moment. Durations are in seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Fleet {
    /// Of the replica that answers.
    pub version: String,
    pub schema: Schema,
    /// By this replica's clock.
    pub now: DateTime<Utc>,
    /// By the database's, in the same moment but for the way there and back.
    pub database_now: DateTime<Utc>,
    /// Replicas that carry wishes out and live.
    pub workers: i64,
    /// Whether mail is sent. Without, links go to the log.
    pub sends_mail: bool,
    pub outbox: Waiting,
    /// Operations under way, by kind.
    pub operations: Vec<OpenOperations>,
    pub hosts: Vec<FleetHost>,
    /// By what was last observed.
    pub sandboxes: Vec<Counted>,
    /// Since when nothing is concluded from what is not heard, because most hosts fell silent together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub brake_since: Option<DateTime<Utc>>,
}

/// The newest migration of the database, and the newest that the replica knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Schema {
    pub database: i64,
    pub program: i64,
}

/// What is to be delivered and was not yet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Waiting {
    pub count: i64,
    pub oldest_sec: f64,
    /// Within the last day.
    pub given_up: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OpenOperations {
    pub kind: String,
    pub count: i64,
    pub oldest_sec: f64,
    /// Whose time is over, and who are open all the same.
    pub overdue: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FleetHost {
    pub id: String,
    /// As in `GET /v1/hosts`.
    pub status: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_version: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolation: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_heartbeat_at: Option<DateTime<Utc>>,
    /// As in `GET /v1/hosts`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_heard_at: Option<DateTime<Utc>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_free_mb: Option<i64>,
    /// Sandboxes that it names and no row knows.
    pub unclaimed: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Counted {
    pub state: String,
    pub count: i64,
}
