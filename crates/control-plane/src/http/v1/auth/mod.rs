//! `/v1/auth`: how people get in, and out.

mod activate;
mod login;
mod logout;
mod sign_up;
mod switch_team;

pub(super) use sign_up::NAME_CHARS_MAX;
pub(super) use switch_team::answered;

use std::time::Duration;

use api::v1::accounts::LoggedIn;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderValue, header};
use model::ids::UserId;
use store::users::User;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::http::credentials::set_cookie;
use crate::http::errors::ApiError;
use crate::login::{self as sessions, Opened, Shown, Verified};
use crate::secrets::sha256;
use crate::tokens;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(sign_up::sign_up))
        .routes(routes!(activate::activate))
        .routes(routes!(login::login))
        .routes(routes!(logout::logout))
        .routes(routes!(switch_team::switch_team))
}

/// Tries of one kind on one address, counted for all replicas together. Known and unknown addresses are counted alike.
#[derive(Clone, Copy)]
pub(super) struct Attempts {
    pub what: &'static str,
    pub max: i32,
    pub window: Duration,
}

/// Enough for fingers that slip; a list of passwords takes years.
const LOGIN: Attempts = Attempts { what: "login", max: 20, window: Duration::from_secs(300) };
pub(super) const PASSWORD: Attempts = Attempts { what: "password", ..LOGIN };
/// So that nobody's mailbox is filled by us.
pub(super) const MAIL: Attempts = Attempts { what: "mail", max: 5, window: Duration::from_secs(900) };

impl Attempts {
    fn subject(self, of: &str) -> [u8; 32] {
        sha256(format!("{} {of}", self.what).as_bytes())
    }

    pub(super) async fn count(self, app: &App, of: &str) -> Result<(), ApiError> {
        match app.store.attempt(&self.subject(of), self.max, self.window).await? {
            None => Ok(()),
            Some(seconds) => Err(ApiError::too_many_attempts(seconds)),
        }
    }

    async fn forget(self, app: &App, of: &str) -> Result<(), ApiError> {
        Ok(app.store.forget_attempts(&self.subject(of)).await?)
    }
}

/// The cookie of a session of whoever has shown at another site who they are.
pub(super) async fn cookie_of(app: &App, user: UserId, request_id: &str) -> Result<String, ApiError> {
    let who = Verified { user, password_hash: None, request_id };
    let opened = sessions::by_cookie(&app.store, who).await?.ok_or_else(ApiError::unauthorized)?;
    let life_sec = (opened.expires_at - chrono::Utc::now()).num_seconds();
    match opened.shown {
        Shown::Cookie(value) => Ok(set_cookie(Some(&value), life_sec, &app.accounts.public_url)),
        Shown::Token(_) => Err(ApiError::internal()),
    }
}

/// The answer to whoever is in now.
async fn logged_in(app: &App, user: &User, by_cookie: bool, request_id: &str) -> Result<Response, ApiError> {
    let who = Verified { user: user.id, password_hash: user.password_hash.as_deref(), request_id };
    let opened = if by_cookie {
        sessions::by_cookie(&app.store, who).await?
    } else {
        sessions::by_token(&app.store, &app.tokens, who).await?
    };
    let Opened { team, expires_at, shown } = opened.ok_or_else(ApiError::unauthorized)?;
    let (token, csrf_token, cookie) = match shown {
        Shown::Token(token) => (Some(token), None, None),
        Shown::Cookie(value) => {
            let life_sec = (expires_at - chrono::Utc::now()).num_seconds();
            let cookie = set_cookie(Some(&value), life_sec, &app.accounts.public_url);
            (None, Some(tokens::csrf_token(&value)), Some(cookie))
        }
    };
    let mut response = axum::Json(LoggedIn {
        token,
        csrf_token,
        user_id: user.id.to_string(),
        team_id: team.to_string(),
        email: user.email.clone(),
        name: user.name.clone(),
        expires_at,
    })
    .into_response();
    if let Some(cookie) = cookie {
        let cookie = HeaderValue::from_str(&cookie).expect("a cookie of ours is ASCII");
        response.headers_mut().insert(header::SET_COOKIE, cookie);
    }
    Ok(response)
}
