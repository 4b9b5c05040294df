//! `Idempotency-Key`: a repeated call finds what the first one made. While the first is under way, the repeated one waits with it.

use axum::extract::FromRequestParts;
use http::HeaderMap;
use http::request::Parts;
use model::ids::UserId;
use serde::Serialize;
use store::idempotency::Key;

use super::access::{Caller, Who};
use super::errors::ApiError;
use crate::app::App;
use crate::secrets::{random_32, sha256};

const KEY_BYTES_MAX: usize = 255;

/// The header, when there is one.
pub struct IdempotencyKey(Option<String>);

impl<S: Send + Sync> FromRequestParts<S> for IdempotencyKey {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        Ok(Self(given(&parts.headers)?.map(str::to_owned)))
    }
}

/// Also where a call may be repeated without one, such as a pause: a key that no route would take is a mistake everywhere.
pub fn is_well_formed(headers: &HeaderMap) -> Result<(), ApiError> {
    given(headers).map(drop)
}

fn given(headers: &HeaderMap) -> Result<Option<&str>, ApiError> {
    let mut given = headers.get_all("idempotency-key").iter();
    let Some(value) = given.next() else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    // A tab passes as text of a header.
    let is_printable = text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    if text.is_empty() || text.len() > KEY_BYTES_MAX || !is_printable || given.next().is_some() {
        let reason = "must be given once, with 1 to 255 printable ASCII characters";
        return Err(ApiError::invalid("Idempotency-Key", reason));
    }
    Ok(Some(text))
}

impl IdempotencyKey {
    /// The key in the scope of the caller and the route.
    pub fn scoped(&self, caller: &Caller, route: &str, args: &impl Serialize) -> Option<Key> {
        match caller.who {
            // For the platform, not in the person's own team.
            Who::User(id) if caller.acts_in.is_none() => self.of(&format!("{id} platform"), route, args),
            Who::User(id) => self.of_person(id, route, args),
            Who::Key(_) => self.of(&caller.team.to_string(), route, args),
        }
    }

    /// The key in the scope of a person and the route.
    pub fn of_person(&self, person: UserId, route: &str, args: &impl Serialize) -> Option<Key> {
        self.of(&person.to_string(), route, args)
    }

    fn of(&self, who: &str, route: &str, args: &impl Serialize) -> Option<Key> {
        let key = self.0.clone()?;
        let args = serde_json::to_vec(args).expect("arguments came from JSON");
        Some(Key { scope: format!("{who} {route}"), key, args_hash: sha256(&args) })
    }
}

/// Random bytes for a new secret; for a call that may be repeated, the same bytes each time.
pub fn secret_bytes(app: &App, key: Option<&Key>) -> [u8; 32] {
    match key {
        None => random_32(),
        Some(key) => app.secret.repeatable(&[key.scope.as_bytes(), key.key.as_bytes(), &key.args_hash]),
    }
}
