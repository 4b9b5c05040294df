//! `GET /v1/hosts/{id}`.

use api::v1::errors::ErrorBody;
use api::v1::hosts::Host;
use axum::extract::State;
use model::ids::HostId;

use crate::app::App;
use crate::http::access::HostsCaller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/{id}", tag = "hosts", params(("id" = String, Path)),
    responses((status = 200, body = Host), (status = 404, body = ErrorBody)))]
pub async fn get(State(app): State<App>, _: HostsCaller, Id(id): Id<HostId>) -> Result<axum::Json<Host>, ApiError> {
    Ok(axum::Json(super::shown(super::find(&app, id).await?)))
}
