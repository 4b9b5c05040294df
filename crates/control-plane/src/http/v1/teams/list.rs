//! `GET /v1/teams`: the teams that the caller is in.

use api::v1::errors::ErrorBody;
use api::v1::teams::Team;
use axum::extract::State;

use crate::app::App;
use crate::http::access::PersonCaller;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/", tag = "teams",
    responses((status = 200, body = Vec<Team>), (status = 401, body = ErrorBody)))]
pub async fn list(State(app): State<App>, person: PersonCaller) -> Result<axum::Json<Vec<Team>>, ApiError> {
    let teams = app.store.teams_of(person.user).await?;
    Ok(axum::Json(teams.into_iter().map(|(team, role)| super::shown(team, role)).collect()))
}
