//! `GET /v1/admin/audit-logs`: what was done with hosts, people and the platform itself; with `team_id`, all that was done in a team.

use api::v1::audit::AuditLog;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use store::audit_log::Asked;

use super::query::{AuditParams, AuditQuery};
use crate::app::App;
use crate::http::access::Admin;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/admin/audit-logs", tag = "admin",
    params(AuditParams, ("team_id" = Option<String>, Query, description = "what was done in that team")),
    responses((status = 200, body = AuditLog), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody)))]
pub async fn list(State(app): State<App>, _: Admin, query: AuditQuery) -> Result<axum::Json<AuditLog>, ApiError> {
    let is_platforms = query.team.is_none();
    let asked = Asked {
        team: query.team,
        visible: Vec::new(),
        kinds: query.kinds,
        actions: query.actions,
        before: query.before,
        limit: query.limit,
    };
    Ok(axum::Json(super::page(app.store.audit_log(&asked).await?, is_platforms)))
}
