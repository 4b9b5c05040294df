//! Quotas: what a team may have and what it has.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `PUT /v1/teams/{id}/quotas`: the team's own limits, all of them. What is absent is as the platform has it by default.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SetQuotas {
    /// Sandboxes, running or paused. Each limit is from 0 (none at all) to 2^40.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandboxes: Option<i64>,
    /// Those of them that are not paused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<i64>,
    /// Of those that are not paused, together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<i64>,
    /// MiB, of those that are not paused, together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<i64>,
    /// MiB, the sizes of the disks of all, together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mb: Option<i64>,
    /// Creates, and sandboxes of forks, in any 60 seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creates_per_min: Option<i64>,
}

/// Answer of `GET /v1/teams/self/quotas` and of `GET` and `PUT /v1/teams/{id}/quotas`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Quotas {
    pub team_id: String,
    pub quotas: Vec<Quota>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Quota {
    /// sandboxes, running, vcpus, memory_mb, disk_mb, creates_per_min
    pub name: String,
    /// Absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<i64>,
    pub used: i64,
    /// Whether the limit is the team's own and not the platform's default.
    pub is_own: bool,
}
