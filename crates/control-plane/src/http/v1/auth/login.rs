//! `POST /v1/auth/login`: e-mail and password for a session.

use api::v1::accounts::{LogIn, LoggedIn};
use api::v1::errors::ErrorBody;
use axum::extract::State;
use axum::response::Response;
use store::users::UserStatus;

use super::LOGIN;
use crate::app::App;
use crate::http::access::RequestId;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::http::fields;
use crate::passwords;

#[utoipa::path(post, path = "/login", tag = "auth", request_body = LogIn, security(()),
    responses((status = 200, body = LoggedIn), (status = 401, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 429, body = ErrorBody)))]
pub async fn login(
    State(app): State<App>,
    RequestId(request_id): RequestId,
    Json(body): Json<LogIn>,
) -> Result<Response, ApiError> {
    let email = fields::email(&body.email).map_err(|_| ApiError::unauthorized())?;
    if body.password.len() > passwords::PASSWORD_BYTES_MAX {
        return Err(ApiError::unauthorized());
    }
    LOGIN.count(&app, &email).await?;
    let user = app.store.user_by_email(&email).await?;
    let hash = user.as_ref().and_then(|user| user.password_hash.clone());
    let fits = passwords::verify(&body.password, hash).await.ok_or_else(ApiError::unavailable)?;
    let user = user.filter(|_| fits).ok_or_else(ApiError::unauthorized)?;
    // Told only to whoever knows the password.
    match user.status {
        UserStatus::Active => {}
        UserStatus::Pending => return Err(ApiError::account_not_activated()),
        UserStatus::Disabled => return Err(ApiError::account_disabled()),
    }
    LOGIN.forget(&app, &email).await?;
    super::logged_in(&app, &user, body.cookie, &request_id).await
}
