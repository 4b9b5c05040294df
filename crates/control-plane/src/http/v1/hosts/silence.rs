//! `GET /v1/hosts/silence`: how many hosts are silent, and whether so many fell silent together that nothing is concluded from it.

use api::v1::errors::ErrorBody;
use api::v1::hosts::Silence;
use axum::extract::State;

use crate::app::App;
use crate::http::access::Admin;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/silence", tag = "hosts",
    responses((status = 200, body = Silence), (status = 403, body = ErrorBody)))]
pub async fn silence(State(app): State<App>, _: Admin) -> Result<axum::Json<Silence>, ApiError> {
    let silence = app.store.silence().await?;
    Ok(axum::Json(Silence { hosts: silence.hosts, silent: silence.silent, brake_since: silence.brake_since }))
}
