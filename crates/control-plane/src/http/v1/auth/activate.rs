//! `POST /v1/auth/activate`: the token of a link makes an account active, and logs its person in.

use api::v1::accounts::{Activate, LoggedIn};
use api::v1::errors::ErrorBody;
use axum::extract::State;
use axum::response::Response;
use store::account_tokens::Activated;

use crate::app::App;
use crate::http::access::RequestId;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::http::fields;
use crate::{passwords, tokens};

#[utoipa::path(post, path = "/activate", tag = "auth", request_body = Activate, security(()),
    responses((status = 200, body = LoggedIn), (status = 400, body = ErrorBody)))]
pub async fn activate(
    State(app): State<App>,
    RequestId(request_id): RequestId,
    Json(body): Json<Activate>,
) -> Result<Response, ApiError> {
    let hash = tokens::opaque_hash(&body.token).ok_or_else(ApiError::invalid_token)?;
    let password_hash = match &body.password {
        None => None,
        Some(password) => {
            fields::new_password("password", password)?;
            Some(passwords::hash_in_time(password).await.ok_or_else(ApiError::unavailable)?)
        }
    };
    let (store, id) = (app.store.clone(), request_id.clone());
    let activate = async move { store.activate(&hash, password_hash.as_deref(), &id).await };
    let user = match super::super::detached(&app, activate).await? {
        Activated::Now(user) => user,
        Activated::Already => return Err(ApiError::already_activated()),
        Activated::NeedsPassword => return Err(ApiError::invalid("password", "is needed: the account has none yet")),
        Activated::Invalid => return Err(ApiError::invalid_token()),
    };
    let user = app.store.user(user).await?.ok_or_else(ApiError::invalid_token)?;
    super::logged_in(&app, &user, false, &request_id).await
}
