//! What sandboxes take and have taken: `GET /v1/sandboxes/{id}/metrics`, `/v1/sandboxes/stats` and `/v1/sandboxes/usage`.

use chrono::NaiveDate;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What one sandbox took of its host, as the host sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Metrics {
    pub sandbox_id: String,
    pub range: String,
    /// Oldest first, as fine as they are kept for so long: every 5 s for 10 min, 30 s for 2 h, 5 min for 24 h. There are none of times in
    /// which the sandbox did not run.
    pub points: Vec<MetricPoint>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MetricPoint {
    pub timestamp_unix: i64,
    /// Of all its vCPUs together, 0 to 100.
    pub cpu_pct: f64,
    /// Resident memory of its microVM.
    pub mem_bytes: i64,
    /// What its disk takes on the host: holes count nothing, and what is shared with its template may count.
    pub disk_bytes: i64,
}

/// How much of a team runs, and ran at most.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Stats {
    pub range: String,
    pub current: CurrentLoad,
    /// Of the last 30 days, whatever the range. Each is a maximum by itself.
    pub peaks: PeakLoad,
    pub series: LoadSeries,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CurrentLoad {
    pub running_count: i64,
    pub vcpus_reserved: i64,
    pub memory_mb_reserved: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PeakLoad {
    pub running_count: i64,
    pub vcpus: i64,
    pub memory_mb: i64,
}

/// As many of each: the most within each bucket of time, oldest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LoadSeries {
    /// Beginnings of the buckets, RFC 3339.
    pub labels: Vec<String>,
    pub running: Vec<i64>,
    pub vcpus: Vec<i64>,
    pub memory_mb: Vec<i64>,
}

/// What a team has used, by days of UTC.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    pub from: NaiveDate,
    pub to: NaiveDate,
    /// Days on which anything ran.
    pub points: Vec<UsagePoint>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct UsagePoint {
    pub date: NaiveDate,
    /// Minutes that sandboxes ran, each times its vCPUs.
    pub cpu_minutes: f64,
    /// Likewise times its memory in MiB.
    pub ram_mb_minutes: f64,
}
