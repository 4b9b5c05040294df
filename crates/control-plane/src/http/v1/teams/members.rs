//! `GET /v1/teams/{id}/members`: who is in a team.

use api::v1::errors::ErrorBody;
use api::v1::teams::Member;
use axum::extract::State;

use crate::app::App;
use crate::http::access::MemberCaller;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/{id}/members", tag = "teams", params(("id" = String, Path)),
    responses((status = 200, body = Vec<Member>), (status = 404, body = ErrorBody)))]
pub async fn members(State(app): State<App>, caller: MemberCaller) -> Result<axum::Json<Vec<Member>>, ApiError> {
    let members = app.store.members(caller.team).await?;
    Ok(axum::Json(members.into_iter().map(super::shown_member).collect()))
}
