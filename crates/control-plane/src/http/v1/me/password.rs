//! `POST /v1/me/password`: another password. All other sessions of the person end.

use api::v1::accounts::ChangePassword;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;

use super::super::auth::PASSWORD;
use super::super::links;
use crate::app::App;
use crate::http::access::PersonCaller;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::http::fields;
use crate::passwords;

#[utoipa::path(post, path = "/password", tag = "me", request_body = ChangePassword,
    responses((status = 204), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub async fn change(
    State(app): State<App>,
    person: PersonCaller,
    Json(body): Json<ChangePassword>,
) -> Result<StatusCode, ApiError> {
    fields::new_password("new_password", &body.new_password)?;
    let user = app.store.user(person.user).await?.ok_or_else(ApiError::unauthorized)?;
    match (&user.password_hash, &body.current_password) {
        (None, _) if body.confirm_password.as_deref() == Some(&body.new_password) => {}
        (None, _) => return Err(ApiError::invalid("confirm_password", "must be the new password once more")),
        (Some(_), None) => return Err(ApiError::invalid("current_password", "is needed")),
        (Some(hash), Some(current)) => {
            // A session that somebody found open must not be a place to guess at.
            PASSWORD.count(&app, &user.id.to_string()).await?;
            let is_short = current.len() <= passwords::PASSWORD_BYTES_MAX;
            let fits =
                is_short && passwords::verify(current, Some(hash.clone())).await.ok_or_else(ApiError::unavailable)?;
            if !fits {
                return Err(ApiError::wrong_password());
            }
        }
    }
    let hash = passwords::hash_in_time(&body.new_password).await.ok_or_else(ApiError::unavailable)?;
    let text = "The password of your Wrenn account was changed. If that was not you, reset it at once.\n";
    let notice = links::notice(&app, &user.email, "Your Wrenn password was changed", text);
    let (store, actor) = (app.store.clone(), person.actor());
    let change = async move { store.change_password(person.user, &hash, person.session, &notice, &actor).await };
    super::super::detached(&app, change).await?;
    app.outbox.hint();
    Ok(StatusCode::NO_CONTENT)
}
