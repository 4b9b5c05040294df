//! `POST /v1/auth/logout`: this session opens nothing from now on; a browser forgets its cookie.

use api::v1::errors::ErrorBody;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderValue, StatusCode, header};

use crate::app::App;
use crate::http::access::PersonCaller;
use crate::http::credentials::set_cookie;
use crate::http::errors::ApiError;

#[utoipa::path(post, path = "/logout", tag = "auth",
    responses((status = 204), (status = 401, body = ErrorBody)))]
pub async fn logout(State(app): State<App>, person: PersonCaller) -> Result<Response, ApiError> {
    let (store, actor) = (app.store.clone(), person.actor());
    let end = async move { store.end_session(person.user, person.session, &actor).await };
    super::super::detached(&app, end).await?;
    let mut response = StatusCode::NO_CONTENT.into_response();
    if person.csrf_token.is_some() {
        let cookie = HeaderValue::from_str(&set_cookie(None, 0, &app.accounts.public_url));
        response.headers_mut().insert(header::SET_COOKIE, cookie.expect("a cookie of ours is ASCII"));
    }
    Ok(response)
}
