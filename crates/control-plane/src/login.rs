//! Opens sessions: for whoever has just shown who they are, and for whoever holds the platform's secret.

use chrono::{DateTime, TimeDelta, Utc};
use model::ids::{SessionId, TeamId, UserId};
use store::sessions::NewSession;
use store::{Store, StoreError};
use uuid::Uuid;

use crate::secrets::random_32;
use crate::tokens::{self, Named, Tokens, USER_LIFE};

/// Of a browser's session.
const COOKIE_LIFE: TimeDelta = TimeDelta::days(7);

/// What a new session is shown by.
pub enum Shown {
    Token(String),
    /// 64 hex digits.
    Cookie(String),
}

pub struct Opened {
    pub team: TeamId,
    pub expires_at: DateTime<Utc>,
    pub shown: Shown,
}

/// Whoever logs in, as far as it was verified.
#[derive(Clone, Copy)]
pub struct Verified<'a> {
    pub user: UserId,
    /// The hash that the password was found to fit.
    pub password_hash: Option<&'a str>,
    pub request_id: &'a str,
}

/// The token of a new session, for whoever holds the platform's secret. None when the person may not log in.
pub async fn open(
    store: &Store,
    tokens: &Tokens,
    user: UserId,
    request_id: &str,
) -> Result<Option<String>, StoreError> {
    let who = Verified { user, password_hash: None, request_id };
    Ok(by_token(store, tokens, who).await?.map(|opened| match opened.shown {
        Shown::Token(text) | Shown::Cookie(text) => text,
    }))
}

/// None when the person may not log in any more.
pub async fn by_token(store: &Store, tokens: &Tokens, who: Verified<'_>) -> Result<Option<Opened>, StoreError> {
    let now = Utc::now();
    let new = session(who, None, now + USER_LIFE);
    let Some(team) = store.open_session(&new).await? else { return Ok(None) };
    let token = tokens.for_user(Named { user: who.user, session: new.id, team }, now, new.expires_at);
    Ok(Some(Opened { team, expires_at: new.expires_at, shown: Shown::Token(token) }))
}

/// None when the person may not log in any more.
pub async fn by_cookie(store: &Store, who: Verified<'_>) -> Result<Option<Opened>, StoreError> {
    let (cookie, hash) = tokens::opaque(&random_32());
    let new = session(who, Some(hash), Utc::now() + COOKIE_LIFE);
    let Some(team) = store.open_session(&new).await? else { return Ok(None) };
    Ok(Some(Opened { team, expires_at: new.expires_at, shown: Shown::Cookie(cookie) }))
}

fn session(who: Verified<'_>, cookie_hash: Option<[u8; 32]>, expires_at: DateTime<Utc>) -> NewSession {
    NewSession {
        id: SessionId(Uuid::now_v7()),
        user: who.user,
        cookie_hash,
        expires_at,
        verified: who.password_hash.map(str::to_owned),
        request_id: who.request_id.to_owned(),
    }
}
