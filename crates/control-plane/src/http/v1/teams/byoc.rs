//! `PUT /v1/admin/teams/{id}/byoc`: from now on a team may have hosts of its own, and its new sandboxes go there alone. There is no way back.

use api::v1::errors::ErrorBody;
use api::v1::teams::SetByoc;
use axum::extract::State;
use http::StatusCode;
use model::ids::TeamId;
use store::teams::ByocChange;

use crate::app::App;
use crate::http::access::Admin;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;

#[utoipa::path(put, path = "/{id}/byoc", tag = "admin", params(("id" = String, Path)), request_body = SetByoc,
    responses((status = 204), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn set(
    State(app): State<App>,
    Admin(caller): Admin,
    Id(id): Id<TeamId>,
    Json(body): Json<SetByoc>,
) -> Result<StatusCode, ApiError> {
    if !body.enabled {
        return Err(ApiError::invalid("enabled", "must be true: a team that may have hosts of its own keeps that"));
    }
    let (store, actor) = (app.store.clone(), caller.actor());
    match super::super::detached(&app, async move { store.let_have_hosts(id, &actor).await }).await? {
        ByocChange::Done => Ok(StatusCode::NO_CONTENT),
        ByocChange::Platform => Err(ApiError::forbidden("the hosts of the platform's own team are the platform's")),
        ByocChange::Missing => Err(ApiError::not_found("team")),
    }
}
