//! `GET /v1/teams/{id}`: a team and who is in it.

use api::v1::errors::ErrorBody;
use api::v1::teams::TeamWithMembers;
use axum::extract::State;

use crate::app::App;
use crate::http::access::MemberCaller;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/{id}", tag = "teams", params(("id" = String, Path)),
    responses((status = 200, body = TeamWithMembers), (status = 404, body = ErrorBody)))]
pub async fn get(State(app): State<App>, caller: MemberCaller) -> Result<axum::Json<TeamWithMembers>, ApiError> {
    let team = app.store.team(caller.team).await?.ok_or_else(|| ApiError::not_found("team"))?;
    let members = app.store.members(caller.team).await?;
    Ok(axum::Json(TeamWithMembers {
        team: super::shown(team, caller.role),
        members: members.into_iter().map(super::shown_member).collect(),
    }))
}
