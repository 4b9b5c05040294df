//! `GET /v1/sandboxes`: the team's, newest first, without those that have ended.

use api::v1::errors::ErrorBody;
use api::v1::sandboxes::Sandbox;
use axum::extract::State;

use super::view::shown;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/", tag = "sandboxes",
    responses((status = 200, body = Vec<Sandbox>), (status = 401, body = ErrorBody)))]
pub async fn list(State(app): State<App>, caller: Caller) -> Result<axum::Json<Vec<Sandbox>>, ApiError> {
    Ok(axum::Json(app.store.sandboxes(caller.team).await?.into_iter().map(shown).collect()))
}
