//! `POST /v1/sandboxes/{id}/ping`: a sign of life. The idle time of a running sandbox begins anew; one that was answered 204 is not ended
//! for being idle before that time has passed once more.

use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use model::ids::SandboxId;
use store::idleness::Pinged;

use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(post, path = "/{id}/ping", tag = "sandboxes", params(("id" = String, Path)),
    responses((status = 204), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn ping(State(app): State<App>, caller: Caller, Id(id): Id<SandboxId>) -> Result<StatusCode, ApiError> {
    let (worker, team) = (app.clone(), caller.team);
    match super::super::detached(&app, async move { worker.store.ping_sandbox(team, &id).await }).await? {
        Pinged::Noted => Ok(StatusCode::NO_CONTENT),
        Pinged::Wrong(status) => Err(ApiError::invalid_state(status)),
        Pinged::Missing => Err(ApiError::not_found("sandbox")),
    }
}
