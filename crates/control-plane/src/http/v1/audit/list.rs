//! `GET /v1/audit-logs`: what was done in the team for which the session acts. Members see what was done with its things; what was done
//! with people is for its admins and owners.

use api::v1::audit::AuditLog;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use model::access::Role;
use store::audit_log::Asked;

use super::query::{AuditParams, AuditQuery};
use super::{OF_ADMINS, OF_ALL};
use crate::app::App;
use crate::http::access::PersonCaller;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/audit-logs", tag = "audit", params(AuditParams),
    responses((status = 200, body = AuditLog), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody)))]
pub async fn list(
    State(app): State<App>,
    person: PersonCaller,
    query: AuditQuery,
) -> Result<axum::Json<AuditLog>, ApiError> {
    let (team, role) = person.team.ok_or_else(ApiError::no_team)?;
    let of_admins: &[&str] = if role >= Role::Admin { &OF_ADMINS } else { &[] };
    let asked = Asked {
        team: Some(team),
        visible: OF_ALL.iter().chain(of_admins).map(ToString::to_string).collect(),
        kinds: query.kinds,
        actions: query.actions,
        before: query.before,
        limit: query.limit,
    };
    Ok(axum::Json(super::page(app.store.audit_log(&asked).await?, false)))
}
