//! `GET /v1/admin/templates`: the snapshots of all teams, newest first, and the images of the platform's hosts.

use api::v1::errors::ErrorBody;
use api::v1::snapshots::AnyTemplate;
use axum::extract::State;

use crate::app::App;
use crate::http::access::Admin;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/", tag = "admin",
    responses((status = 200, body = Vec<AnyTemplate>), (status = 403, body = ErrorBody)))]
pub async fn list(State(app): State<App>, _: Admin) -> Result<axum::Json<Vec<AnyTemplate>>, ApiError> {
    let platform = app.store.platform_team().await?.ok_or_else(ApiError::no_team)?;
    let snapshots = app.store.snapshots_of_all().await?.into_iter().map(|snapshot| AnyTemplate {
        name: snapshot.name.unwrap_or_default(),
        kind: "snapshot".to_owned(),
        vcpus: Some(snapshot.shape.vcpus().into()),
        memory_mb: Some(snapshot.shape.memory().0.into()),
        size_bytes: snapshot.size_bytes,
        team_id: snapshot.team.to_string(),
        created_at: Some(snapshot.created_at),
        platform: snapshot.is_published,
    });
    let images = app.store.offered_templates(platform).await?.into_iter().map(|name| AnyTemplate {
        name,
        kind: "base".to_owned(),
        vcpus: None,
        memory_mb: None,
        size_bytes: 0,
        team_id: platform.to_string(),
        created_at: None,
        platform: true,
    });
    Ok(axum::Json(snapshots.chain(images).collect()))
}
