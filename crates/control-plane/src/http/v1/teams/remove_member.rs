//! `DELETE /v1/teams/{id}/members/{user_id}`: a person is out, with the keys that they made. What they have open ends within a minute.

use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use model::ids::UserId;

use crate::app::App;
use crate::http::access::MemberCaller;
use crate::http::body::LastId;
use crate::http::errors::ApiError;

#[utoipa::path(delete, path = "/{id}/members/{user_id}", tag = "teams",
    params(("id" = String, Path), ("user_id" = String, Path)),
    responses((status = 204), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn remove(
    State(app): State<App>,
    caller: MemberCaller,
    LastId(user): LastId<UserId>,
) -> Result<StatusCode, ApiError> {
    let (store, actor) = (app.store.clone(), caller.actor());
    let remove = async move { store.remove_member(caller.team, user, caller.person.user, &actor).await };
    super::changed(&super::super::detached(&app, remove).await?)
}
