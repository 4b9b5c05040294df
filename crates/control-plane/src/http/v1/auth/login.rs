//! `POST /v1/auth/login`: e-mail and password for a token.

use api::v1::errors::ErrorBody;
use axum::extract::State;
use chrono::Utc;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::app::App;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::passwords;

const EMAIL_BYTES_MAX: usize = 320;

#[derive(Deserialize, ToSchema)]
pub struct Login {
    email: String,
    password: String,
}

#[derive(Serialize, ToSchema)]
pub struct LoggedIn {
    /// For `Authorization: Bearer`, valid for 24 hours.
    token: String,
    user_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    team_id: Option<String>,
    email: String,
    name: String,
}

#[utoipa::path(post, path = "/login", tag = "auth", request_body = Login, security(()),
    responses((status = 200, body = LoggedIn), (status = 401, body = ErrorBody)))]
pub async fn login(State(app): State<App>, Json(body): Json<Login>) -> Result<axum::Json<LoggedIn>, ApiError> {
    if body.email.len() > EMAIL_BYTES_MAX || body.password.len() > passwords::PASSWORD_BYTES_MAX {
        return Err(ApiError::unauthorized());
    }
    let user = app.store.user_by_email(body.email.trim()).await?;
    let hash = user.as_ref().and_then(|user| user.password_hash.clone());
    let fits = passwords::verify(&body.password, hash).await.ok_or_else(ApiError::unavailable)?;
    let user = user.filter(|user| fits && user.is_active).ok_or_else(ApiError::unauthorized)?;
    Ok(axum::Json(LoggedIn {
        token: app.tokens.for_user(user.id, Utc::now()),
        user_id: user.id.to_string(),
        team_id: user.team.map(|team| team.to_string()),
        email: user.email,
        name: user.name,
    }))
}
