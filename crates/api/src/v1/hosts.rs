//! Hosts: create, register, heartbeat, token again, list, get, delete.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use utoipa::ToSchema;

/// `POST /v1/hosts`: of the platform by an administrator, of a team by its owners and admins as well.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CreateHost {
    /// `regular`: the platform's; `byoc`: a team's own, which takes its sandboxes alone.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whose it is to be; for `byoc` alone, and needed there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub team_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub availability_zone: Option<String>,
    /// Words (`gpu`) and pairs (`zone=a`) that creates can ask for; at most 32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tags: Option<Vec<String>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    pub id: String,
    /// `regular`: the platform's; `byoc`: a team's own.
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub team_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub team_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub availability_zone: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arch: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_cores: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_gb: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// pending (not registered yet), online, draining (takes nothing new), unreachable (silent for more than 90 s, which says nothing of
    /// what is on it), fenced (two machines speak as it)
    pub status: String,
    /// Whether it takes nothing new, also while it is unreachable.
    #[serde(default)]
    pub is_draining: bool,
    #[serde(default)]
    pub tags: Vec<String>,
    /// What is on it.
    #[serde(default)]
    pub held: Held,
    /// How new sandboxes on it are isolated: `firecracker/kvm`, `qemu/kvm` or `qemu/emulated`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolation: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_version: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_heartbeat_at: Option<DateTime<Utc>>,
    /// When a copy of an old state of its disk was last heard, and refused. Until it is unfenced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_heard_at: Option<DateTime<Utc>>,
    pub created_by: String,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

/// What is on a host: how many sandboxes and snapshots, and what the sandboxes that are not paused have reserved.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Held {
    pub running: i64,
    pub paused: i64,
    /// Those that have failed and were not killed yet.
    pub failed: i64,
    /// With a name.
    pub snapshots: i64,
    pub vcpus: i64,
    pub memory_mb: i64,
    /// Of its pool, as it was last heard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_free_mb: Option<i64>,
}

/// `POST /v1/hosts/{id}/tags`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AddTag {
    /// A word or `key=value`, each 1 to 63 of a-z, 0-9, `-`, `_` and `.`, beginning with a letter or digit.
    pub tag: String,
}

/// `GET /v1/hosts/{id}/delete-preview`: what a removal with force would lose. Of each kind the oldest hundred; `host.held` counts all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DeletePreview {
    pub host: Host,
    pub sandbox_ids: Vec<String>,
    pub sandboxes: Vec<OnHost>,
    /// Their names.
    pub snapshots: Vec<String>,
    /// What the host reports and nothing here knows.
    pub unclaimed: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OnHost {
    pub id: String,
    pub status: String,
}

/// `GET /v1/hosts/silence`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Silence {
    /// Of the platform, that have ever been heard of. Teams' own are not counted.
    pub hosts: i64,
    /// Of them, those that were silent for more than 90 s.
    pub silent: i64,
    /// Since when nothing is ended, failed or removed by what is heard of hosts, because most fell silent together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub brake_since: Option<DateTime<Utc>>,
}

/// Answer of `POST /v1/hosts` and `POST /v1/hosts/{id}/token`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostWithToken {
    pub host: Host,
    /// Works once, for one hour, for this host.
    pub registration_token: String,
}

/// `POST /v1/hosts/register`, without credentials but the token. Repeated with the same token and the same CSR key within the hour it
/// gives the same host again, because the first answer may have been lost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RegisterHost {
    pub token: String,
    /// `host:port` by which the control plane reaches the agent.
    pub address: String,
    /// PKCS#10, PEM. The private key never leaves the host.
    pub csr_pem: String,
    #[serde(flatten)]
    pub facts: HostFacts,
}

/// What an agent says of its machine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostFacts {
    pub arch: String,
    pub cpu_cores: i64,
    pub memory_mb: i64,
    pub disk_gb: i64,
    pub isolation: String,
    pub agent_version: String,
    pub templates: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostCredentials {
    pub host: Host,
    /// The host's JWT, valid 30 days, renewed by `POST /v1/hosts/{id}/renew`.
    pub token: String,
    pub token_expires_at: DateTime<Utc>,
    /// The agent's server certificate for `address`.
    pub cert_pem: String,
    /// Who may call the agent: clients with a certificate of this authority.
    pub ca_cert_pem: String,
    /// Grows when the host was declared lost.
    pub epoch: u64,
}

/// `POST /v1/hosts/{id}/renew`, with the host's JWT: a new JWT and, for the CSR, a new certificate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RenewHost {
    pub csr_pem: String,
    pub address: String,
    /// As in a heartbeat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ticket: Option<String>,
}

/// `POST /v1/hosts/{id}/heartbeat`, with the host's JWT, every 30 s and at once when something changed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Heartbeat {
    pub epoch: u64,
    /// Grows with each heartbeat of one agent process.
    pub sequence: u64,
    /// Random id of the agent's process: a new one after each start.
    pub agent_run: String,
    /// What the last answer brought that was heard, from the disk; empty before the first. Absent: an agent that keeps none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ticket: Option<String>,
    pub facts: HostFacts,
    pub memory_free_mb: i64,
    pub disk_free_mb: i64,
    /// True once the agent's start-up scan is done: only then does a missing sandbox mean something. False with a digest, so that no
    /// reader that does not know of digests takes the rest for missing.
    pub complete: bool,
    /// At most 10,000. With a digest only those that neither run nor are paused, and those whose idle time counts.
    pub sandboxes: Vec<ReportedSandbox>,
    /// Instead of the list, when the last answer said that it suffices: [`digest`] of all that the host has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// Of what runs and what is paused, the same on both sides when both mean the same: SHA-256 in hexadecimal, 64 letters, of the lines
/// `<id> <state> <revision>` in the order of the ids, with a newline between them.
pub fn digest(sandboxes: &[ReportedSandbox]) -> String {
    let mut held: Vec<&ReportedSandbox> = sandboxes.iter().filter(|seen| seen.is_in_digest()).collect();
    held.sort_by(|one, other| one.id.cmp(&other.id));
    let lines: Vec<String> =
        held.iter().map(|seen| format!("{} {} {}", seen.id, seen.observed, seen.revision)).collect();
    hex::encode(Sha256::digest(lines.join("\n")))
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ReportedSandbox {
    pub id: String,
    /// A word of `model::sandbox::Observed`.
    pub observed: String,
    pub revision: u64,
    #[serde(default)]
    pub incarnation: String,
    #[serde(default)]
    pub reason: String,
    /// Whole seconds for which nothing has happened in it. Absent when it does not run, or the host was not told that its idle time counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_sec: Option<u64>,
}

impl ReportedSandbox {
    pub fn is_in_digest(&self) -> bool {
        matches!(self.observed.as_str(), "running" | "paused")
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HeartbeatAnswer {
    pub epoch: u64,
    /// To be kept on disk, and shown in the next heartbeat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ticket: Option<String>,
    /// All sandboxes of the host whose idle time counts, and no others; at most 10,000.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub idle_timeouts: Vec<IdleTimeout>,
    /// What the host says is what is known of it: while it stays so, a digest says as much as the list. False after a digest: the list is
    /// wanted at once.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub digest_suffices: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct IdleTimeout {
    pub id: String,
    /// The host says at once when the sandbox has been idle for so long.
    pub timeout_sec: u64,
    /// Seconds since its last use that the control plane knows of: of some the host does not hear.
    pub active_sec_ago: u64,
}
