//! `GET /auth/oauth/{provider}/callback`: the browser comes back from the other site. Whoever has logged in there is logged in here, by a
//! cookie, or has that account bound to theirs.
//!
//! An account that is not bound yet is opened by its address only when the other site has verified that, and this one, too.

use std::time::Duration;

use api::v1::errors::ErrorBody;
use axum::extract::State;
use axum::response::{IntoResponse as _, Redirect, Response};
use chrono::Utc;
use http::{HeaderMap, header};
use model::ids::{SessionId, UserId};
use serde::Deserialize;
use store::audit::{Actor, ActorKind};
use store::identities::{Claimed, Entered, Unknown};
use store::sessions::SessionBy;
use utoipa::IntoParams;

use super::super::auth::{Attempts, cookie_of};
use crate::app::App;
use crate::http::access::RequestId;
use crate::http::body::{LastId, Query};
use crate::http::errors::ApiError;
use crate::http::fields;
use crate::oauth::ticket::{self, Intent, Ticket};

/// Of one ticket.
const ANSWER: Attempts = Attempts { what: "oauth answer", max: 1, window: Duration::from_secs(600) };
/// Of one account of a site: as often as passwords may be tried.
const LOGIN: Attempts = Attempts { what: "oauth login", max: 20, window: Duration::from_secs(300) };
const CODE_BYTES_MAX: usize = 4096;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Answer {
    code: Option<String>,
    state: Option<String>,
    error: Option<String>,
}

#[utoipa::path(get, path = "/{provider}/callback", tag = "auth", params(("provider" = String, Path), Answer), security(()),
    responses((status = 303, description = "to WRENN_PUBLIC_URL, with the session's cookie"), (status = 400, body = ErrorBody),
        (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 502, body = ErrorBody), (status = 504, body = ErrorBody)))]
pub async fn callback(
    State(app): State<App>,
    RequestId(request_id): RequestId,
    LastId(provider): LastId<String>,
    headers: HeaderMap,
    Query(answer): Query<Answer>,
) -> Result<Response, ApiError> {
    let provider = app.accounts.providers.known(&provider).ok_or_else(ApiError::provider_not_found)?;
    let state = answer.state.unwrap_or_default();
    let cookie = cookie(&headers).unwrap_or_default();
    let ticket = Ticket::opened(&app.secret, &cookie, provider, &state, Utc::now()).ok_or_else(|| {
        ApiError::invalid_login("this browser has not begun this login, or too long ago; begin again")
    })?;
    if let Err(error) = ANSWER.count(&app, &ticket.state).await {
        let is_used = error.code() == "rate_limited";
        return Err(if is_used {
            ApiError::invalid_login("this login was answered before; begin again")
        } else {
            error
        });
    }
    if answer.error.is_some() {
        return Err(ApiError::forbidden("the other site did not let you in, or you did not let it tell who you are"));
    }
    let code = answer.code.filter(|code| !code.is_empty() && code.len() <= CODE_BYTES_MAX);
    let code = code.ok_or_else(|| ApiError::invalid("code", "is missing or too long"))?;
    // Of a task of its own: the code is used up, whatever becomes of the browser.
    let worker = app.clone();
    let ended = app.tracker.spawn(async move { end(&worker, provider, &ticket, &code, request_id).await });
    let cookie = ended.await.map_err(|_| ApiError::internal())??;
    let mut response = Redirect::to(app.accounts.public_url.as_str()).into_response();
    super::add_cookie(response.headers_mut(), &ticket::set_cookie(None, &app.accounts.public_url));
    if let Some(cookie) = cookie {
        super::add_cookie(response.headers_mut(), &cookie);
    }
    Ok(response)
}

/// The cookie of the session that begins, if one does.
async fn end(
    app: &App,
    provider: &str,
    ticket: &Ticket,
    code: &str,
    request_id: String,
) -> Result<Option<String>, ApiError> {
    let claimed = app.accounts.providers.end(ticket, code).await.map_err(|error| super::failed(provider, &error))?;
    // As everywhere: what is no address to us is none.
    let email = claimed.email.as_deref().and_then(|email| fields::email(email).ok());
    let claimed = Claimed { email, ..claimed };
    LOGIN.count(app, &format!("{provider} {}", claimed.subject)).await?;
    let unknown = match &ticket.intent {
        Intent::Connect { user, session } => {
            connect(app, &claimed, user, session, request_id).await?;
            return Ok(None);
        }
        Intent::Signup if app.accounts.is_signup_open => Unknown::SignedUp,
        Intent::Signup => return Err(ApiError::signup_closed()),
        Intent::Login => Unknown::Refused,
    };
    let user = match app.store.enter(&claimed, unknown, &request_id).await? {
        Entered::As(user) => user,
        Entered::Pending => return Err(ApiError::account_not_activated()),
        Entered::Disabled => return Err(ApiError::account_disabled()),
        Entered::NotVerified => return Err(ApiError::email_not_verified()),
        Entered::NoAccount => return Err(ApiError::no_account()),
        Entered::Taken => return Err(ApiError::identity_taken()),
    };
    cookie_of(app, user, &request_id).await.map(Some)
}

/// Only for the session that has begun it, which may have ended since.
async fn connect(app: &App, claimed: &Claimed, user: &str, session: &str, request_id: String) -> Result<(), ApiError> {
    let user: UserId = user.parse().map_err(|_| ApiError::internal())?;
    let session: SessionId = session.parse().map_err(|_| ApiError::internal())?;
    let standing = app.store.standing(SessionBy::Id(session), None).await?;
    if standing.is_none_or(|standing| standing.user != user) {
        return Err(ApiError::unauthorized());
    }
    let actor = Actor { kind: ActorKind::User, id: user.to_string(), team: None, request_id };
    if app.store.connect_identity(claimed, user, &actor).await? { Ok(()) } else { Err(ApiError::identity_taken()) }
}

/// The one ticket of the browser.
fn cookie(headers: &HeaderMap) -> Option<String> {
    let all = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut ours = all.flat_map(|value| value.split(';')).filter_map(|pair| {
        pair.trim().split_once('=').filter(|(name, _)| *name == ticket::COOKIE).map(|(_, value)| value.to_owned())
    });
    let first = ours.next()?;
    // A page of a neighbouring name can add one of its own.
    ours.next().is_none().then_some(first)
}
