//! `GET /v1/admin/builds`: the newest, without what their steps wrote.

use api::v1::builds::Build;
use api::v1::errors::ErrorBody;
use axum::extract::State;

use crate::app::App;
use crate::http::access::Admin;
use crate::http::errors::ApiError;

const LIST_MAX: i64 = 200;

#[utoipa::path(get, path = "/", tag = "builds",
    responses((status = 200, body = Vec<Build>), (status = 403, body = ErrorBody)))]
pub async fn list(State(app): State<App>, _: Admin) -> Result<axum::Json<Vec<Build>>, ApiError> {
    let builds = app.store.builds(LIST_MAX).await?;
    Ok(axum::Json(builds.into_iter().map(|build| super::shown(build, Vec::new())).collect()))
}
