//! `PATCH /v1/teams/{id}/members/{user_id}`: another role. Owners decide about owners, and one is left at all times.

use api::v1::errors::ErrorBody;
use api::v1::teams::ChangeRole;
use axum::extract::State;
use http::StatusCode;
use model::access::Role;
use model::ids::UserId;

use crate::app::App;
use crate::http::access::MemberCaller;
use crate::http::body::{Json, LastId};
use crate::http::errors::ApiError;

#[utoipa::path(patch, path = "/{id}/members/{user_id}", tag = "teams", request_body = ChangeRole,
    params(("id" = String, Path), ("user_id" = String, Path)),
    responses((status = 204), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn change(
    State(app): State<App>,
    caller: MemberCaller,
    LastId(user): LastId<UserId>,
    Json(body): Json<ChangeRole>,
) -> Result<StatusCode, ApiError> {
    let to: Role = body.role.parse().map_err(|error| ApiError::invalid("role", error))?;
    let (store, actor) = (app.store.clone(), caller.actor());
    let change = async move { store.change_role(caller.team, user, to, caller.person.user, &actor).await };
    super::changed(&super::super::detached(&app, change).await?)
}
