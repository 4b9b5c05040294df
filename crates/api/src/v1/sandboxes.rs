//! Sandboxes: create, get, list, their time, kill.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// `POST /v1/sandboxes`. Every field has a default; numbers out of range are refused, not clamped.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CreateSandbox {
    /// `minimal` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// 1 to 32; 1 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<i64>,
    /// MiB, even, from 128; 512 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<i64>,
    /// MiB, from 1024; 5120 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<i64>,
    /// Seconds of running, counted from the start and anew from each resume, until `on_timeout`; 0 or absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_sec: Option<i64>,
    /// What happens then: `kill` (when absent); `pause`, with memory; or `pause_disk`, after which a resume boots it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_timeout: Option<String>,
    /// Seconds, from 60, in which nothing happens in it, until `on_timeout`; 0 or absent: never. Something happens while a command, a file
    /// transfer or a snapshot is under way, while its CPUs, its network or its disk work, and at each call of `ping` and `timeout`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout_sec: Option<i64>,
    /// Whether a command or a file call lets it run again when it is paused with its memory; false when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_resume: Option<bool>,
    /// At most 32 pairs of at most 256 bytes; not kernel_version, vmm_version, agent_version and envd_version, which the platform says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
    /// Environment of every process in the sandbox; at most 128 pairs, 32 KiB in all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envs: Option<BTreeMap<String, String>>,
    /// Tags that its host must have, all of them; at most 32. Of a snapshot: that the host has on which it lies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tags: Option<Vec<String>>,
    /// `spread` (onto the emptiest host) or `pack` (onto the fullest that has room); as the platform has it when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<String>,
}

/// `POST /v1/sandboxes/{id}/timeout`: the time begins anew, that of being idle too, with what is given changed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SetTimeout {
    /// As at the create; as it was when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_sec: Option<i64>,
    /// As at the create; as it was when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_timeout: Option<String>,
    /// As at the create; as it was when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout_sec: Option<i64>,
    /// Whether a command or a file call lets it run again when it is paused with its memory; as it was when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_resume: Option<bool>,
}

/// `PATCH /v1/sandboxes/{id}`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChangeSandbox {
    /// Names with their new values; null takes a name away. Others stay as they are. As at a create, all in all.
    pub metadata: BTreeMap<String, Option<String>>,
}

/// `POST /v1/sandboxes/{id}/pause`; the body may be absent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Pause {
    /// Whether its memory is kept; it is when absent. Without, a resume boots it from its disk: smaller and cheaper, but what ran does not
    /// go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<bool>,
}

/// `POST /v1/sandboxes/{id}/fork`. What is absent is as the source has it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Fork {
    /// How many, 1 to 64; 1 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<i64>,
    /// As at a create.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_sec: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_timeout: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout_sec: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_resume: Option<bool>,
    /// Beside the source's own pairs, and over them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
    /// Of processes that are started in the new ones: beside the source's own, and over them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envs: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Forked {
    pub sandboxes: Vec<Sandbox>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Sandbox {
    pub id: String,
    /// starting, running, pausing, paused, resuming, snapshotting, stopping, stopped, error, missing
    pub status: String,
    /// Why it is in that state when that needs a word: `host_silent`, `no_hosts_available`, the cause of an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub template: String,
    pub vcpus: i64,
    pub memory_mb: i64,
    pub disk_size_mb: i64,
    pub timeout_sec: i64,
    /// `kill`, `pause` or `pause_disk`.
    #[serde(default = "on_timeout_default")]
    pub on_timeout: String,
    /// What the pause keeps, of one that is pausing, paused or resuming: `memory` (it goes on where it stood) or `disk` (it boots).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<String>,
    /// Seconds of being idle until `on_timeout`; 0: never.
    #[serde(default)]
    pub idle_timeout_sec: i64,
    /// Whether a command or a file call lets it run again when it is paused with its memory.
    #[serde(default)]
    pub auto_resume: bool,
    /// Since when nothing has happened in it; absent while it works or does not run, and without `idle_timeout_sec`. Up to half a
    /// minute late.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_since: Option<DateTime<Utc>>,
    /// When its time is over; absent while none runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<DateTime<Utc>>,
    /// What stands between this sandbox and its host: `firecracker/kvm`, `qemu/kvm` (hardware virtualisation) or `qemu/emulated` (for
    /// development and trusted tenants).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolation: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_id: Option<String>,
    /// Those that its create asked of its host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// The run of the microVM; a new one after each start or restore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<String>,
    pub created_at: DateTime<Utc>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<DateTime<Utc>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_active_at: Option<DateTime<Utc>>,
    pub last_updated: DateTime<Utc>,
    /// The user's own pairs and kernel_version, vmm_version, agent_version, envd_version.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// How long each step of the last transition took on the host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
}

/// What a control plane that does not say it does.
fn on_timeout_default() -> String {
    "kill".to_owned()
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Step {
    pub name: String,
    pub ms: f64,
}

/// One entry of `GET /v1/sandboxes/{id}/timeline`, newest last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TimelineEntry {
    /// create, pause, resume, snapshot, kill; exit: an end that nobody wished; clean: what a create left is removed.
    pub kind: String,
    /// under_way, done, failed, superseded (by a newer wish)
    pub outcome: String,
    /// Of a failure: a code of the API, and a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How often it was taken up.
    pub attempts: i64,
    pub began_at: DateTime<Utc>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<DateTime<Utc>>,
    /// From the wish to its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ms: Option<f64>,
    /// How long each step took, in order.
    pub steps: Vec<Step>,
}

/// A part of a list, newest first.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Page {
    /// So many at most, 1 to 10000, which is what there is without it. When there are more, the header `Link` names the next page.
    #[param(minimum = 1, maximum = 10000)]
    pub limit: Option<u32>,
    /// Where a page begins: out of the header `Link` of the page before, good for a day and for the same question.
    #[param(max_length = 256)]
    pub cursor: Option<String>,
    /// The id of a sandbox: those that come after it in the list. Not beside `cursor`.
    pub before: Option<String>,
    /// Those that are in one of these states, with commas or repeated.
    pub status: Option<String>,
    /// Those that began with this template or snapshot.
    #[param(max_length = 64)]
    pub template: Option<String>,
    pub created_after: Option<DateTime<Utc>>,
    pub created_before: Option<DateTime<Utc>>,
}

/// How long a call may wait for the outcome before it answers with the state under way (202).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Wait {
    /// Seconds, 0 to 120; 4 when absent, which the timeouts of published clients allow.
    #[param(minimum = 0, maximum = 120)]
    pub wait_sec: Option<u32>,
}
