//! `POST /v1/hosts/{id}/drain` and `/undrain`: a host that takes nothing new, for it to become empty. What is on it goes on; what is paused
//! there may run again there. Repeated, each is the same again; `held` in the answer says what is left.

use api::v1::errors::ErrorBody;
use api::v1::hosts::Host;
use axum::extract::State;
use model::ids::HostId;
use store::hosts::{Change, Drain};

use crate::app::App;
use crate::http::access::HostsCaller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(post, path = "/{id}/drain", tag = "hosts", params(("id" = String, Path)),
    responses((status = 200, body = Host), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn drain(app: State<App>, caller: HostsCaller, id: Id<HostId>) -> Result<axum::Json<Host>, ApiError> {
    change(app, caller, id, Drain::Begin).await
}

#[utoipa::path(post, path = "/{id}/undrain", tag = "hosts", params(("id" = String, Path)),
    responses((status = 200, body = Host), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn undrain(app: State<App>, caller: HostsCaller, id: Id<HostId>) -> Result<axum::Json<Host>, ApiError> {
    change(app, caller, id, Drain::End).await
}

async fn change(
    State(app): State<App>,
    caller: HostsCaller,
    Id(id): Id<HostId>,
    drain: Drain,
) -> Result<axum::Json<Host>, ApiError> {
    let (store, actor) = (app.store.clone(), caller.actor());
    match super::super::detached(&app, async move { store.drain_host(id, drain, &actor).await }).await? {
        Change::Done(host) => Ok(axum::Json(super::shown(*host))),
        Change::Missing => Err(ApiError::not_found("host")),
        Change::Refused => {
            let host = app.store.host(id).await?.ok_or_else(|| ApiError::not_found("host"))?;
            Err(ApiError::wrong_state("the host has not joined, or is fenced", super::status_word(host.state)))
        }
    }
}
