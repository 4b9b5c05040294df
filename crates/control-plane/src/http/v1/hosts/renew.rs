//! `POST /v1/hosts/{id}/renew`: fresh credentials for a registered host, perhaps at another address.

use api::v1::errors::ErrorBody;
use api::v1::hosts::{HostCredentials, RenewHost};
use axum::extract::State;
use model::ids::HostId;
use store::hosts::Change;

use super::heartbeat::ticket_number;
use super::register::{credentials, request};
use crate::app::App;
use crate::http::access::HostCaller;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;

#[utoipa::path(post, path = "/{id}/renew", tag = "hosts", params(("id" = String, Path)), request_body = RenewHost,
    responses((status = 200, body = HostCredentials), (status = 401, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 409, body = ErrorBody)))]
pub async fn renew(
    State(app): State<App>,
    HostCaller(caller): HostCaller,
    Id(id): Id<HostId>,
    Json(body): Json<RenewHost>,
) -> Result<axum::Json<HostCredentials>, ApiError> {
    if caller != id {
        return Err(ApiError::forbidden("the token is another host's"));
    }
    let request = request(&body.csr_pem)?;
    let ticket = ticket_number(&app, id, body.ticket.as_deref())?;
    let name = super::host_of(&app, &body.address).await?;
    let (store, address) = (app.store.clone(), body.address);
    match super::super::detached(&app, async move { store.move_host(id, &address, ticket).await }).await? {
        Change::Done(host) => Ok(axum::Json(credentials(&app, *host, request, &name)?)),
        // A host that was removed has lost its credential with its record.
        Change::Missing => Err(ApiError::unauthorized()),
        Change::Refused => Err(ApiError::host_is_past()),
    }
}
