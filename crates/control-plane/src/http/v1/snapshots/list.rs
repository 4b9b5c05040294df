//! `GET /v1/snapshots`: what sandboxes of the team can begin with: its snapshots and those of the platform, newest first, and the
//! images of the hosts.

use api::v1::errors::ErrorBody;
use api::v1::snapshots::{Template, TemplateKind};
use axum::extract::State;

use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Query;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/", tag = "snapshots", params(TemplateKind),
    responses((status = 200, body = Vec<Template>), (status = 400, body = ErrorBody)))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    Query(wanted): Query<TemplateKind>,
) -> Result<axum::Json<Vec<Template>>, ApiError> {
    let (snapshots, base) = match wanted.kind.as_deref() {
        None => (true, true),
        Some("snapshot") => (true, false),
        Some("base") => (false, true),
        Some(_) => return Err(ApiError::invalid("type", "must be base or snapshot")),
    };
    let mut templates = Vec::new();
    if snapshots {
        templates.extend(app.store.snapshots(caller.team).await?.into_iter().map(super::shown));
    }
    if base {
        templates.extend(app.store.offered_templates(caller.team).await?.into_iter().map(Template::of_platform));
    }
    Ok(axum::Json(templates))
}
