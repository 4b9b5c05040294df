//! `POST /v1/hosts/{id}/unfence`: an operator has found out which of two machines the host is, and stopped the other one.

use api::v1::errors::ErrorBody;
use api::v1::hosts::Host;
use axum::extract::State;
use model::ids::HostId;
use store::hosts::Change;

use crate::app::App;
use crate::http::access::HostsCaller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(post, path = "/{id}/unfence", tag = "hosts", params(("id" = String, Path)),
    responses((status = 200, body = Host), (status = 404, body = ErrorBody)))]
pub async fn unfence(
    State(app): State<App>,
    caller: HostsCaller,
    Id(id): Id<HostId>,
) -> Result<axum::Json<Host>, ApiError> {
    let (store, actor) = (app.store.clone(), caller.actor());
    match super::super::detached(&app, async move { store.unfence_host(id, &actor).await }).await? {
        Change::Done(host) => Ok(axum::Json(super::shown(*host))),
        Change::Missing | Change::Refused => Err(ApiError::not_found("host")),
    }
}
