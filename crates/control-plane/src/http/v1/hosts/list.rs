//! `GET /v1/hosts`: every machine, oldest first.

use api::v1::errors::ErrorBody;
use api::v1::hosts::Host;
use axum::extract::State;

use crate::app::App;
use crate::http::access::Admin;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/", tag = "hosts",
    responses((status = 200, body = Vec<Host>), (status = 403, body = ErrorBody)))]
pub async fn list(State(app): State<App>, _: Admin) -> Result<axum::Json<Vec<Host>>, ApiError> {
    Ok(axum::Json(app.store.hosts().await?.into_iter().map(super::shown).collect()))
}
