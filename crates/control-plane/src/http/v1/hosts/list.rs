//! `GET /v1/hosts`, oldest first: every machine for administrators, for others those of the team for which the session acts.

use api::v1::errors::ErrorBody;
use api::v1::hosts::Host;
use axum::extract::State;

use crate::app::App;
use crate::http::access::HostsCaller;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/", tag = "hosts",
    responses((status = 200, body = Vec<Host>), (status = 403, body = ErrorBody)))]
pub async fn list(State(app): State<App>, caller: HostsCaller) -> Result<axum::Json<Vec<Host>>, ApiError> {
    Ok(axum::Json(app.store.hosts(caller.sees).await?.into_iter().map(super::shown).collect()))
}
