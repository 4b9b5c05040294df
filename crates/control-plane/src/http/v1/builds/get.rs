//! `GET /v1/admin/builds/{id}`: how far it is, with what its steps wrote.

use api::v1::builds::Build;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use model::ids::BuildId;

use crate::app::App;
use crate::http::access::Admin;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/{id}", tag = "builds", params(("id" = String, Path)),
    responses((status = 200, body = Build), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn get(State(app): State<App>, _: Admin, Id(id): Id<BuildId>) -> Result<axum::Json<Build>, ApiError> {
    let build = app.store.build(id).await?.ok_or_else(|| ApiError::not_found("build"))?;
    let steps = app.store.build_steps(id).await?;
    Ok(axum::Json(super::shown(build, steps)))
}
