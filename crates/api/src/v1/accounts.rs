//! People: `/v1/auth`, `/v1/me` and `/v1/admin/users`.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SignUp {
    pub email: String,
    pub password: String,
    pub name: String,
    /// The token of an invitation to this address. With it the account is active at once, also where sign-up is closed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub invitation: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Message {
    pub message: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Activate {
    pub token: String,
    /// For accounts that an administrator made, which have none yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LogIn {
    pub email: String,
    pub password: String,
    /// For browsers: the session is kept in a cookie that scripts cannot read, and the answer has `csrf_token` instead of `token`.
    #[serde(default)]
    pub cookie: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LoggedIn {
    /// For `Authorization: Bearer`. It works for 12 hours, as long as its session is not ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// For the header `X-CSRF-Token` of every request that changes something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub csrf_token: Option<String>,
    pub user_id: String,
    pub team_id: String,
    pub email: String,
    pub name: String,
    /// When the session ends by itself.
    pub expires_at: DateTime<Utc>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SwitchTeam {
    pub team_id: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ResetPassword {
    pub email: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ConfirmReset {
    pub token: String,
    pub new_password: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChangePassword {
    /// Needed when the person has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current_password: Option<String>,
    pub new_password: String,
    /// The new one once more, for people who have none yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm_password: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Rename {
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Me {
    pub user_id: String,
    pub name: String,
    pub email: String,
    pub has_password: bool,
    /// Other sites by which the person logs in: `github`, `oidc`.
    pub providers: Vec<String>,
    pub is_admin: bool,
    /// The team for which this session acts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub team_id: Option<String>,
    /// `owner`, `admin` or `member` of that team.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// Of a session in a cookie.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub csrf_token: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Session {
    pub id: String,
    /// The one that asks.
    pub current: bool,
    /// Kept in a browser's cookie.
    pub browser: bool,
    pub created_at: DateTime<Utc>,
    pub last_seen_at: DateTime<Utc>,
    pub expires_at: DateTime<Utc>,
}

/// A person as administrators of the platform see them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct User {
    pub id: String,
    pub email: String,
    pub name: String,
    pub is_admin: bool,
    /// `pending`, `active` or `disabled`.
    pub status: String,
    pub created_at: DateTime<Utc>,
    pub teams_joined: i64,
    pub teams_owned: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Users {
    pub users: Vec<User>,
    pub total: i64,
    pub page: i64,
    pub per_page: i64,
    pub total_pages: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CreateUser {
    pub email: String,
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SetActive {
    pub active: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SetAdministrator {
    pub admin: bool,
}

/// What would be sent by mail, for an administrator to hand on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Link {
    pub user_id: String,
    /// `activation` for a person who is pending, else `password_reset`.
    pub purpose: String,
    pub token: String,
    pub url: String,
    pub expires_at: DateTime<Utc>,
}

/// Where a browser is to go, so that its account there is bound to the one here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ConnectTo {
    pub auth_url: String,
}

/// Somebody who may log in, as others find them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Found {
    pub user_id: String,
    pub email: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DeleteMe {
    /// The account's own address, so that nobody does it by a slip.
    pub confirmation: String,
}
