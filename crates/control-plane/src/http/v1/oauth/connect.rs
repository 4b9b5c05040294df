//! `GET /v1/me/providers/{provider}/connect`: where the browser is to go, so that the account of the other site is bound to the person's.

use api::v1::accounts::ConnectTo;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};

use crate::app::App;
use crate::http::access::PersonCaller;
use crate::http::body::LastId;
use crate::http::errors::ApiError;
use crate::oauth::ticket::{self, Intent, Ticket};

#[utoipa::path(get, path = "/{provider}/connect", tag = "me", params(("provider" = String, Path)),
    responses((status = 200, body = ConnectTo), (status = 404, body = ErrorBody), (status = 502, body = ErrorBody)))]
pub async fn connect(
    State(app): State<App>,
    person: PersonCaller,
    LastId(provider): LastId<String>,
) -> Result<Response, ApiError> {
    let provider = app.accounts.providers.known(&provider).ok_or_else(ApiError::provider_not_found)?;
    let intent = Intent::Connect { user: person.user.to_string(), session: person.session.to_string() };
    let ticket = Ticket::new(provider, intent);
    let url = app.accounts.providers.begin(&ticket).await.map_err(|error| super::failed(provider, &error))?;
    let mut response = axum::Json(ConnectTo { auth_url: url.into() }).into_response();
    let cookie = ticket::set_cookie(Some(&ticket.sealed(&app.secret)), &app.accounts.public_url);
    super::add_cookie(response.headers_mut(), &cookie);
    Ok(response)
}
