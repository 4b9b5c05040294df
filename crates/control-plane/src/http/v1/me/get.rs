//! `GET /v1/me`: who the session's person is.

use api::v1::accounts::Me;
use api::v1::errors::ErrorBody;
use axum::extract::State;

use crate::app::App;
use crate::http::access::PersonCaller;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/", tag = "me", responses((status = 200, body = Me), (status = 401, body = ErrorBody)))]
pub async fn get(State(app): State<App>, person: PersonCaller) -> Result<axum::Json<Me>, ApiError> {
    let user = app.store.user(person.user).await?.ok_or_else(ApiError::unauthorized)?;
    let providers = app.store.providers_of(person.user).await?;
    Ok(axum::Json(Me {
        user_id: user.id.to_string(),
        name: user.name,
        email: user.email,
        has_password: user.password_hash.is_some(),
        providers,
        is_admin: user.is_admin,
        team_id: person.team.map(|(team, _)| team.to_string()),
        role: person.team.map(|(_, role)| role.to_string()),
        csrf_token: person.csrf_token,
    }))
}
