//! `GET /v1/teams/{id}/invitations`: those that nobody has taken yet.

use api::v1::errors::ErrorBody;
use api::v1::teams::Invitation;
use axum::extract::State;

use crate::app::App;
use crate::http::access::MemberCaller;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/{id}/invitations", tag = "teams", params(("id" = String, Path)),
    responses((status = 200, body = Vec<Invitation>), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn list(State(app): State<App>, caller: MemberCaller) -> Result<axum::Json<Vec<Invitation>>, ApiError> {
    let invitations = app.store.invitations(caller.team).await?;
    Ok(axum::Json(invitations.into_iter().map(|invitation| super::shown(invitation, None)).collect()))
}
