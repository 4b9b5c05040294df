//! `PATCH /v1/me`: another name.

use api::v1::accounts::{LoggedIn, Rename};
use api::v1::errors::ErrorBody;
use axum::extract::State;

use super::super::auth::{NAME_CHARS_MAX, answered};
use crate::app::App;
use crate::http::access::PersonCaller;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::http::fields;

#[utoipa::path(patch, path = "/", tag = "me", request_body = Rename,
    responses((status = 200, body = LoggedIn), (status = 400, body = ErrorBody)))]
pub async fn rename(
    State(app): State<App>,
    person: PersonCaller,
    Json(body): Json<Rename>,
) -> Result<axum::Json<LoggedIn>, ApiError> {
    let name = fields::display_name("name", &body.name, NAME_CHARS_MAX)?;
    let (team, _) = person.team.ok_or_else(ApiError::no_team)?;
    let (store, actor, user) = (app.store.clone(), person.actor(), person.user);
    super::super::detached(&app, async move { store.rename_user(user, &name, &actor).await }).await?;
    answered(&app, &person, team).await.map(axum::Json)
}
