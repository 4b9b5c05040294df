//! Builds: templates of the platform, made by a recipe.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `POST /v1/admin/builds`, as JSON, or as the field `config` of a form whose field `archive` has the files for `COPY`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CreateBuild {
    /// Of the template: 1 to 64 letters, digits, dots, dashes or underscores. A built one that has it already gives way once the new one is
    /// there.
    pub name: String,
    /// What it begins with; `minimal` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_template: Option<String>,
    /// An instruction each: RUN, START, ENV, WORKDIR, USER, COPY.
    #[schema(min_items = 1, max_items = 256)]
    pub recipe: Vec<String>,
    /// A command that says by its exit code whether what was started is ready:
    /// `[--interval=3s] [--timeout=10s] [--start-period=0s] [--retries=0] COMMAND`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<String>,
    /// 1 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<i64>,
    /// 512 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<i64>,
    /// Neither fetch lists of packages and change to `wrenn-user` before the recipe, nor clean up after it.
    #[serde(default)]
    pub skip_pre_post: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Build {
    pub id: String,
    pub name: String,
    pub base_template: String,
    pub recipe: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<String>,
    pub vcpus: i64,
    pub memory_mb: i64,
    pub disk_size_mb: i64,
    /// pending, running, success, failed, cancelled
    pub status: String,
    /// Steps that have ended.
    pub current_step: i64,
    pub total_steps: i64,
    /// The steps that have ended, in their order; none in lists.
    pub logs: Vec<BuildStep>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Where it is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_id: Option<String>,
    /// Who processes run as in what begins with the template.
    pub default_user: String,
    /// What is in the environment of those.
    pub default_env: BTreeMap<String, String>,
    pub created_at: DateTime<Utc>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<DateTime<Utc>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completed_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BuildStep {
    /// From 1.
    pub step: i64,
    /// pre-build, recipe, healthcheck, post-build
    pub phase: String,
    /// The instruction.
    pub cmd: String,
    /// The last 64 KiB of it.
    pub stdout: String,
    /// The last 64 KiB of it.
    pub stderr: String,
    pub exit: i32,
    pub ok: bool,
    pub elapsed_ms: i64,
}
