//! Snapshots, which are templates of a team, and the platform's templates beside them.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// `POST /v1/snapshots`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CreateSnapshot {
    /// It runs, and goes on, or is paused, and stays so.
    pub sandbox_id: String,
    /// 1 to 64 letters, digits, dots, dashes or underscores; `template-` and eight digits when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// `POST /v1/admin/capsules/{id}/snapshot`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PublishSnapshot {
    /// As of `CreateSnapshot`. A template of the platform that has it already gives way once the new one is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A template or snapshot, of whatever team, as administrators of the platform see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AnyTemplate {
    #[serde(flatten)]
    pub template: Template,
    /// Whose it is: of what all teams can begin with, the platform's.
    pub team_id: String,
}

/// What a sandbox can begin with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    pub name: String,
    /// `base`: an image. `snapshot`: with memory, of the team, or, where `platform` says so, of the platform.
    #[serde(rename = "type")]
    pub kind: String,
    /// Of a snapshot, whose shape is fixed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<i64>,
    /// What it takes on its host, also what it shares with others there.
    #[serde(default)]
    pub size_bytes: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<DateTime<Utc>>,
    #[serde(default)]
    pub platform: bool,
    /// The sandbox that it is of, which may be gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
    /// What that had begun with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
}

impl Template {
    pub fn of_platform(name: String) -> Self {
        Self {
            name,
            kind: "base".to_owned(),
            vcpus: None,
            memory_mb: None,
            disk_size_mb: None,
            size_bytes: 0,
            created_at: None,
            platform: true,
            sandbox_id: None,
            template: None,
        }
    }
}

/// The snapshot, and beside it the sandbox that it is of: its id, and how it stands now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MadeSnapshot {
    #[serde(flatten)]
    pub template: Template,
    pub id: String,
    pub status: String,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct TemplateKind {
    /// `base` or `snapshot`; both when absent.
    #[serde(rename = "type")]
    pub kind: Option<String>,
}
