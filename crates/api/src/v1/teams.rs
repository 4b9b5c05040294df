//! Teams, their members, and invitations to them: `/v1/teams`.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Team {
    pub id: String,
    pub name: String,
    pub slug: String,
    /// It has hosts of its own, and its new sandboxes go there alone.
    pub is_byoc: bool,
    pub created_at: DateTime<Utc>,
    /// What the caller is in it: `owner`, `admin` or `member`.
    pub role: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TeamName {
    /// 1 to 128 letters, digits, spaces and `_ - @ '`.
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TeamWithMembers {
    pub team: Team,
    pub members: Vec<Member>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Member {
    pub user_id: String,
    pub name: String,
    pub email: String,
    pub role: String,
    pub joined_at: DateTime<Utc>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AddMember {
    pub email: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChangeRole {
    /// `owner`, `admin` or `member`.
    pub role: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Invite {
    pub email: String,
    /// `member` when it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Invitation {
    pub id: String,
    pub team_id: String,
    pub email: String,
    pub role: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub invited_by: Option<String>,
    pub created_at: DateTime<Utc>,
    /// From then on it cannot be accepted.
    pub expires_at: DateTime<Utc>,
    /// Only in the answer that creates it, and only for administrators of the platform: whoever has it can join.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AcceptInvitation {
    pub token: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Joined {
    pub team_id: String,
    pub role: String,
}

/// A team as administrators of the platform see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AnyTeam {
    pub id: String,
    pub name: String,
    pub slug: String,
    /// It has hosts of its own, and its new sandboxes go there alone.
    pub is_byoc: bool,
    pub created_at: DateTime<Utc>,
    pub deleted_at: Option<DateTime<Utc>>,
    pub member_count: i64,
    /// Of the owner who has been it for longest.
    pub owner_name: Option<String>,
    pub owner_email: Option<String>,
    /// Sandboxes that have neither ended nor are paused.
    pub active_sandbox_count: i64,
    /// Of its own; a deletion takes them away with what is on them.
    #[serde(default)]
    pub host_count: i64,
}

/// `PUT /v1/admin/teams/{id}/byoc`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SetByoc {
    /// `true`: there is no way back.
    pub enabled: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Teams {
    pub teams: Vec<AnyTeam>,
    pub total: i64,
    pub page: i64,
    pub per_page: i64,
    pub total_pages: i64,
}
