//! `POST /v1/me/password/reset` and `.../confirm`: a new password for whoever reads the mail of the account's address.

use api::v1::accounts::{ConfirmReset, ResetPassword};
use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use store::account_tokens::Purpose;
use store::audit::Actor;
use store::users::UserStatus;

use super::super::auth::MAIL;
use super::super::links;
use crate::app::App;
use crate::http::access::RequestId;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::http::fields;
use crate::{passwords, tokens};

/// The same answer, at the same time, whether there is such an account or not.
#[utoipa::path(post, path = "/password/reset", tag = "me", request_body = ResetPassword, security(()),
    responses((status = 204), (status = 400, body = ErrorBody)))]
pub async fn ask(
    State(app): State<App>,
    RequestId(request_id): RequestId,
    Json(body): Json<ResetPassword>,
) -> Result<StatusCode, ApiError> {
    let email = fields::email(&body.email)?;
    let behind = app.clone();
    app.tracker.spawn(async move {
        if let Err(error) = send(&behind, &email, request_id).await {
            tracing::warn!("a link for a new password was not sent: {}", error.code());
        }
    });
    Ok(StatusCode::NO_CONTENT)
}

async fn send(app: &App, email: &str, request_id: String) -> Result<(), ApiError> {
    MAIL.count(app, email).await?;
    let Some(user) = app.store.user_by_email(email).await? else { return Ok(()) };
    let purpose = match user.status {
        UserStatus::Active => Purpose::PasswordReset,
        // Who has lost the first link gets another.
        UserStatus::Pending => Purpose::Activation,
        UserStatus::Disabled => return Ok(()),
    };
    let (link, token) = links::account_link(app, user.id, purpose);
    let actor = Actor { request_id, ..Actor::platform("password reset") };
    let mail = links::mail(app, &user.email, purpose, &link);
    if app.store.issue_account_token(&token, Some(&mail), &actor).await? {
        app.outbox.hint();
    }
    Ok(())
}

#[utoipa::path(post, path = "/password/reset/confirm", tag = "me", request_body = ConfirmReset, security(()),
    responses((status = 204), (status = 400, body = ErrorBody)))]
pub async fn confirm(
    State(app): State<App>,
    RequestId(request_id): RequestId,
    Json(body): Json<ConfirmReset>,
) -> Result<StatusCode, ApiError> {
    let hash = tokens::opaque_hash(&body.token).ok_or_else(ApiError::invalid_token)?;
    fields::new_password("new_password", &body.new_password)?;
    let password_hash = passwords::hash_in_time(&body.new_password).await.ok_or_else(ApiError::unavailable)?;
    let worker = app.clone();
    let reset = async move {
        let text = "The password of your Wrenn account was reset, and all sessions have ended.\n";
        let notice = |email: &str| links::notice(&worker, email, "Your Wrenn password was changed", text);
        worker.store.reset_password(&hash, &password_hash, notice, &request_id).await
    };
    if !super::super::detached(&app, reset).await? {
        return Err(ApiError::invalid_token());
    }
    app.outbox.hint();
    Ok(StatusCode::NO_CONTENT)
}
