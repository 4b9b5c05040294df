//! `GET /v1/admin/templates`: the snapshots of all teams, newest first, and the images of the platform's hosts.

use api::v1::errors::ErrorBody;
use api::v1::snapshots::{AnyTemplate, Template};
use axum::extract::State;

use super::super::snapshots::shown;
use crate::app::App;
use crate::http::access::Admin;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/", tag = "admin",
    responses((status = 200, body = Vec<AnyTemplate>), (status = 403, body = ErrorBody)))]
pub async fn list(State(app): State<App>, _: Admin) -> Result<axum::Json<Vec<AnyTemplate>>, ApiError> {
    let platform = app.store.platform_team().await?.ok_or_else(ApiError::no_team)?;
    let snapshots = app.store.snapshots_of_all().await?.into_iter().map(|snapshot| {
        let team_id = snapshot.team.to_string();
        AnyTemplate { template: shown(snapshot), team_id }
    });
    let images = app.store.offered_templates(platform).await?.into_iter().map(Template::of_platform);
    let images = images.map(|template| AnyTemplate { template, team_id: platform.to_string() });
    Ok(axum::Json(snapshots.chain(images).collect()))
}
