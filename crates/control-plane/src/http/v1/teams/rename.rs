//! `PATCH /v1/teams/{id}`: another name.

use api::v1::errors::ErrorBody;
use api::v1::teams::TeamName;
use axum::extract::State;
use http::StatusCode;

use crate::app::App;
use crate::http::access::MemberCaller;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::http::fields;

#[utoipa::path(patch, path = "/{id}", tag = "teams", params(("id" = String, Path)), request_body = TeamName,
    responses((status = 204), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn rename(
    State(app): State<App>,
    caller: MemberCaller,
    Json(body): Json<TeamName>,
) -> Result<StatusCode, ApiError> {
    let name = fields::team_name(&body.name)?;
    let (store, actor) = (app.store.clone(), caller.actor());
    let renamed =
        super::super::detached(&app, async move { store.rename_team(caller.team, &name, &actor).await }).await?;
    if renamed { Ok(StatusCode::NO_CONTENT) } else { Err(ApiError::not_found("team")) }
}
