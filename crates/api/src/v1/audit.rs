//! Who did what: `/v1/audit-logs` and `/v1/admin/audit-logs`.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AuditLog {
    /// Newest first.
    pub items: Vec<AuditEntry>,
    /// Of the last item, for `before` and `before_id` of the next page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_before: Option<DateTime<Utc>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_before_id: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AuditEntry {
    pub id: String,
    /// `user`, `api_key`, `host` or `system`.
    pub actor_type: String,
    pub actor_id: String,
    /// Empty when the actor is gone, or is neither a person nor a key.
    pub actor_name: String,
    /// What it was done to: `sandbox`, `snapshot`, `team`, `api_key`, `member`, `invitation`, `session`; `host`, `user`.
    pub resource_type: String,
    pub resource_id: String,
    pub action: String,
    /// Who sees it: `team` (all members), `admin` (admins and owners of the team), `platform` (administrators).
    pub scope: String,
    /// `success`, `info` or `warning`: something was made, changed, or taken away.
    pub status: String,
    pub metadata: Value,
    /// Of the request by which it was done; empty when it was none.
    pub request_id: String,
    pub created_at: DateTime<Utc>,
}
