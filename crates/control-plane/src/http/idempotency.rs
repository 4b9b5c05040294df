//! `Idempotency-Key`: a repeated call finds what the first one made. While the first is under way, the repeated one waits with it.

use axum::extract::FromRequestParts;
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
        let mut given = parts.headers.get_all("idempotency-key").iter();
        let Some(value) = given.next() else { return Ok(Self(None)) };
        let text = value.to_str().unwrap_or_default();
        if text.is_empty() || text.len() > KEY_BYTES_MAX || given.next().is_some() {
            return Err(ApiError::invalid(
                "Idempotency-Key",
                "must be given once, with 1 to 255 printable ASCII characters",
            ));
        }
        Ok(Self(Some(text.to_owned())))
    }
}

impl IdempotencyKey {
    /// The key in the scope of the caller and the route.
    pub fn scoped(&self, caller: &Caller, route: &str, args: &impl Serialize) -> Option<Key> {
        match caller.who {
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
