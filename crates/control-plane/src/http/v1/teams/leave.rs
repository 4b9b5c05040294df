//! `POST /v1/teams/{id}/leave`: the caller goes. The last owner stays.

use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;

use crate::app::App;
use crate::http::access::MemberCaller;
use crate::http::errors::ApiError;

#[utoipa::path(post, path = "/{id}/leave", tag = "teams", params(("id" = String, Path)),
    responses((status = 204), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn leave(State(app): State<App>, caller: MemberCaller) -> Result<StatusCode, ApiError> {
    let (store, actor, user) = (app.store.clone(), caller.actor(), caller.person.user);
    let leave = async move { store.remove_member(caller.team, user, user, &actor).await };
    super::changed(&super::super::detached(&app, leave).await?)
}
