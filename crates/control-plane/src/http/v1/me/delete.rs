//! `DELETE /v1/me`: the account goes, at once and for good, with its sessions, its keys and the teams in which nobody else is. Their
//! sandboxes are killed. What it did stays written down, by its id.

use api::v1::accounts::DeleteMe;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderValue, StatusCode, header};
use store::deletions::Left;

use super::super::links;
use crate::app::App;
use crate::http::access::PersonCaller;
use crate::http::body::Json;
use crate::http::credentials::set_cookie;
use crate::http::errors::ApiError;

#[utoipa::path(delete, path = "/", tag = "me", request_body = DeleteMe,
    responses((status = 204), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn delete(
    State(app): State<App>,
    person: PersonCaller,
    Json(body): Json<DeleteMe>,
) -> Result<Response, ApiError> {
    let user = app.store.user(person.user).await?.ok_or_else(ApiError::unauthorized)?;
    if !body.confirmation.trim().eq_ignore_ascii_case(&user.email) {
        return Err(ApiError::invalid("confirmation", "must be the account's own address"));
    }
    let text = "Your Wrenn account was deleted, with its API keys and the teams in which nobody else was.\n";
    let notice = links::notice(&app, &user.email, "Your Wrenn account was deleted", text);
    let (store, actor) = (app.store.clone(), person.actor());
    let left = super::super::detached(&app, async move { store.delete_user(person.user, &notice, &actor).await });
    match left.await? {
        Left::Gone(_) => app.outbox.hint(),
        Left::LastOwner(teams) => {
            return Err(ApiError::owns_team_with_members(teams.iter().map(ToString::to_string).collect()));
        }
        Left::LastAdministrator => return Err(ApiError::last_administrator()),
        Left::Missing => return Err(ApiError::unauthorized()),
    }
    let mut response = StatusCode::NO_CONTENT.into_response();
    if person.csrf_token.is_some() {
        let cookie = HeaderValue::from_str(&set_cookie(None, 0, &app.accounts.public_url));
        response.headers_mut().insert(header::SET_COOKIE, cookie.expect("a cookie of ours is ASCII"));
    }
    Ok(response)
}
