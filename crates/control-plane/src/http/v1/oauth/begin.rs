//! `GET /auth/oauth/{provider}`: sends the browser to the other site, with a ticket in its cookie.

use api::v1::errors::ErrorBody;
use axum::extract::State;
use axum::response::{IntoResponse as _, Redirect, Response};
use serde::Deserialize;
use utoipa::IntoParams;

use crate::app::App;
use crate::http::body::{LastId, Query};
use crate::http::errors::ApiError;
use crate::oauth::ticket::{self, Intent, Ticket};

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Begin {
    /// `login` (the default), or `signup`: then somebody who has no account gets one.
    intent: Option<String>,
}

#[utoipa::path(get, path = "/{provider}", tag = "auth", params(("provider" = String, Path), Begin), security(()),
    responses((status = 303, description = "to the other site"), (status = 403, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 502, body = ErrorBody), (status = 504, body = ErrorBody)))]
pub async fn begin(
    State(app): State<App>,
    LastId(provider): LastId<String>,
    Query(query): Query<Begin>,
) -> Result<Response, ApiError> {
    let provider = app.accounts.providers.known(&provider).ok_or_else(ApiError::provider_not_found)?;
    let intent = match query.intent.as_deref() {
        None | Some("login") => Intent::Login,
        Some("signup") if app.accounts.is_signup_open => Intent::Signup,
        Some("signup") => return Err(ApiError::signup_closed()),
        Some(_) => return Err(ApiError::invalid("intent", "must be login or signup")),
    };
    let ticket = Ticket::new(provider, intent);
    let url = app.accounts.providers.begin(&ticket).await.map_err(|error| super::failed(provider, &error))?;
    let mut response = Redirect::to(url.as_str()).into_response();
    let cookie = ticket::set_cookie(Some(&ticket.sealed(&app.secret)), &app.accounts.public_url);
    super::add_cookie(response.headers_mut(), &cookie);
    Ok(response)
}
