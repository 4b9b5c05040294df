//! `POST /v1/auth/switch-team`: the session acts for another team of the person's. A token for the team before goes on working for that.

use api::v1::accounts::{LoggedIn, SwitchTeam};
use api::v1::errors::ErrorBody;
use axum::extract::State;
use chrono::Utc;
use model::ids::TeamId;

use crate::app::App;
use crate::http::access::PersonCaller;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::tokens::Named;

#[utoipa::path(post, path = "/switch-team", tag = "auth", request_body = SwitchTeam,
    responses((status = 200, body = LoggedIn), (status = 404, body = ErrorBody)))]
pub async fn switch_team(
    State(app): State<App>,
    person: PersonCaller,
    Json(body): Json<SwitchTeam>,
) -> Result<axum::Json<LoggedIn>, ApiError> {
    let team: TeamId = body.team_id.parse().map_err(|error| ApiError::invalid("team_id", format!("is {error}")))?;
    let (store, actor, session) = (app.store.clone(), person.actor_in(Some(team)), person.session);
    let switch = async move { store.switch_team(session, team, &actor).await };
    if !super::super::detached(&app, switch).await? {
        return Err(ApiError::not_found("team"));
    }
    answered(&app, &person, team).await.map(axum::Json)
}

/// What a login would answer, for a session that is there.
pub async fn answered(app: &App, person: &PersonCaller, team: TeamId) -> Result<LoggedIn, ApiError> {
    let user = app.store.user(person.user).await?.ok_or_else(ApiError::unauthorized)?;
    let named = Named { user: user.id, session: person.session, team };
    let is_browser = person.csrf_token.is_some();
    Ok(LoggedIn {
        token: (!is_browser).then(|| app.tokens.for_user(named, Utc::now(), person.session_ends)),
        csrf_token: person.csrf_token.clone(),
        user_id: user.id.to_string(),
        team_id: team.to_string(),
        email: user.email,
        name: user.name,
        expires_at: person.session_ends,
    })
}
