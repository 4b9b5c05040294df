//! `DELETE /v1/teams/{id}`: a team that has no sandboxes, no snapshots and no hosts goes, with its keys and its members' places in it.

use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;

use crate::app::App;
use crate::http::access::MemberCaller;
use crate::http::errors::ApiError;

#[utoipa::path(delete, path = "/{id}", tag = "teams", params(("id" = String, Path)),
    responses((status = 204), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn delete(State(app): State<App>, caller: MemberCaller) -> Result<StatusCode, ApiError> {
    let (store, actor) = (app.store.clone(), caller.actor());
    let deleted = super::super::detached(&app, async move { store.delete_team(caller.team, &actor).await }).await?;
    super::deleted(&deleted)
}
