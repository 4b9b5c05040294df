//! `/v1/me/sessions`: where a person is logged in, and how they end that.

use api::v1::accounts::Session;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use model::ids::SessionId;

use crate::app::App;
use crate::http::access::PersonCaller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/sessions", tag = "me",
    responses((status = 200, body = Vec<Session>), (status = 401, body = ErrorBody)))]
pub async fn list(State(app): State<App>, person: PersonCaller) -> Result<axum::Json<Vec<Session>>, ApiError> {
    let sessions = app.store.sessions(person.user).await?;
    let shown = |session: store::sessions::Session| Session {
        id: session.id.to_string(),
        current: session.id == person.session,
        browser: session.is_browser,
        created_at: session.created_at,
        last_seen_at: session.last_seen_at,
        expires_at: session.expires_at,
    };
    Ok(axum::Json(sessions.into_iter().map(shown).collect()))
}

#[utoipa::path(delete, path = "/sessions/{id}", tag = "me", params(("id" = String, Path)),
    responses((status = 204), (status = 404, body = ErrorBody)))]
pub async fn end(State(app): State<App>, person: PersonCaller, Id(id): Id<SessionId>) -> Result<StatusCode, ApiError> {
    let (store, actor) = (app.store.clone(), person.actor());
    let ended = super::super::detached(&app, async move { store.end_session(person.user, id, &actor).await }).await?;
    if ended { Ok(StatusCode::NO_CONTENT) } else { Err(ApiError::not_found("session")) }
}
