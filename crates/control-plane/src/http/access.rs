//! Who may call which route: one table, looked at before any handler runs. A route that is not in the table answers nobody.

use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::request::Parts;
use http::{HeaderMap, Method, header};
use model::ids::{ApiKeyId, HostId, TeamId, UserId};
use store::audit::{Actor, ActorKind};

use super::errors::{ApiError, REQUEST_ID};
use crate::app::App;
use crate::tokens;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Anybody.
    Open,
    /// An API key or a user's token: a team's things.
    Team,
    /// An administrator's token.
    Administrator,
    /// The host's own token.
    Host,
}

use Policy::{Administrator, Host, Open, Team};

/// Method, route, policy. `/v1/capsules` is `/v1/sandboxes` under its other name.
pub const TABLE: [(&str, &str, Policy); 51] = [
    ("GET", "/", Open),
    ("GET", "/health", Open),
    ("GET", "/openapi.json", Open),
    ("GET", "/docs", Open),
    ("GET", "/docs/", Open),
    ("GET", "/docs/{*rest}", Open),
    ("POST", "/v1/auth/login", Open),
    ("POST", "/v1/api-keys", Team),
    ("GET", "/v1/api-keys", Team),
    ("DELETE", "/v1/api-keys/{id}", Team),
    ("POST", "/v1/hosts", Administrator),
    ("GET", "/v1/hosts", Administrator),
    ("GET", "/v1/hosts/{id}", Administrator),
    ("DELETE", "/v1/hosts/{id}", Administrator),
    ("POST", "/v1/hosts/{id}/token", Administrator),
    ("GET", "/v1/hosts/{id}/inspect", Administrator),
    ("GET", "/v1/hosts/{id}/delete-preview", Administrator),
    ("POST", "/v1/hosts/{id}/drain", Administrator),
    ("POST", "/v1/hosts/{id}/undrain", Administrator),
    ("GET", "/v1/hosts/{id}/tags", Administrator),
    ("POST", "/v1/hosts/{id}/tags", Administrator),
    ("DELETE", "/v1/hosts/{id}/tags/{tag}", Administrator),
    ("GET", "/v1/hosts/silence", Administrator),
    ("POST", "/v1/hosts/register", Open),
    ("POST", "/v1/hosts/{id}/renew", Host),
    ("POST", "/v1/hosts/{id}/heartbeat", Host),
    ("GET", "/v1/teams/self/quotas", Team),
    ("GET", "/v1/teams/{id}/quotas", Administrator),
    ("PUT", "/v1/teams/{id}/quotas", Administrator),
    ("POST", "/v1/sandboxes", Team),
    ("GET", "/v1/sandboxes", Team),
    ("GET", "/v1/sandboxes/{id}", Team),
    ("DELETE", "/v1/sandboxes/{id}", Team),
    ("POST", "/v1/sandboxes/{id}/pause", Team),
    ("POST", "/v1/sandboxes/{id}/resume", Team),
    ("POST", "/v1/sandboxes/{id}/timeout", Team),
    ("POST", "/v1/sandboxes/{id}/ping", Team),
    ("POST", "/v1/sandboxes/{id}/fork", Team),
    ("GET", "/v1/sandboxes/{id}/timeline", Team),
    ("POST", "/v1/sandboxes/{id}/exec", Team),
    ("GET", "/v1/sandboxes/{id}/exec/stream", Team),
    ("GET", "/v1/sandboxes/{id}/processes", Team),
    ("DELETE", "/v1/sandboxes/{id}/processes/{selector}", Team),
    ("GET", "/v1/sandboxes/{id}/console", Team),
    ("POST", "/v1/sandboxes/{id}/files/read", Team),
    ("POST", "/v1/sandboxes/{id}/files/write", Team),
    ("POST", "/v1/sandboxes/{id}/files/stream/read", Team),
    ("POST", "/v1/sandboxes/{id}/files/stream/write", Team),
    ("POST", "/v1/snapshots", Team),
    ("GET", "/v1/snapshots", Team),
    ("DELETE", "/v1/snapshots/{id}", Team),
];

pub fn policy(method: &Method, route: &str) -> Option<Policy> {
    let route = match route.strip_prefix("/v1/capsules") {
        Some(rest) => format!("/v1/sandboxes{rest}"),
        None => route.to_owned(),
    };
    TABLE.iter().find(|(m, r, _)| *m == method.as_str() && *r == route).map(|(_, _, policy)| *policy)
}

/// Who calls, with the right to act for a team.
#[derive(Debug, Clone)]
pub struct Caller {
    pub team: TeamId,
    pub who: Who,
    pub request_id: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    User(UserId),
    Key(ApiKeyId),
}

impl Caller {
    pub fn actor(&self) -> Actor {
        let (kind, id) = match self.who {
            Who::User(id) => (ActorKind::User, id.to_string()),
            Who::Key(id) => (ActorKind::ApiKey, id.to_string()),
        };
        Actor { kind, id, team: Some(self.team), request_id: self.request_id.clone() }
    }

    pub fn user(&self) -> Option<UserId> {
        match self.who {
            Who::User(id) => Some(id),
            Who::Key(_) => None,
        }
    }
}

/// The caller is an administrator of the platform.
#[derive(Debug, Clone)]
pub struct Admin(pub Caller);

/// The caller is this host.
#[derive(Debug, Clone, Copy)]
pub struct HostCaller(pub HostId);

enum Credential {
    Key([u8; 32]),
    Token(String),
}

/// The layer in front of every route.
pub async fn check(
    State(app): State<App>,
    route: MatchedPath,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    // HEAD is answered by the handlers of GET.
    let method = if request.method() == Method::HEAD { Method::GET } else { request.method().clone() };
    let Some(policy) = policy(&method, route.as_str()) else {
        // Known routes with other methods end in the router's own answer, which says which methods there are.
        let known = TABLE.iter().any(|(_, r, _)| *r == route.as_str() || route.as_str().starts_with("/v1/capsules"));
        return if known { Ok(next.run(request).await) } else { Err(ApiError::not_found("route")) };
    };
    let request_id = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned();
    let headers = request.headers();
    match policy {
        Open => {}
        Team => {
            let caller = caller(&app, headers, request_id).await?;
            request.extensions_mut().insert(caller);
        }
        Administrator => {
            let admin = administrator(&app, headers, request_id).await?;
            request.extensions_mut().insert(admin);
        }
        Host => {
            let token = bearer(headers)?.ok_or_else(ApiError::unauthorized)?;
            let host = app.tokens.host(&token).ok_or_else(ApiError::unauthorized)?;
            request.extensions_mut().insert(HostCaller(host));
        }
    }
    Ok(next.run(request).await)
}

async fn caller(app: &App, headers: &HeaderMap, request_id: String) -> Result<Caller, ApiError> {
    match credential(headers)? {
        Some(Credential::Key(hash)) => {
            let (id, team) = app.store.use_api_key(&hash).await?.ok_or_else(ApiError::unauthorized)?;
            Ok(Caller { team, who: Who::Key(id), request_id })
        }
        Some(Credential::Token(token)) => Ok(user(app, &token, request_id).await?.0),
        None => Err(ApiError::unauthorized()),
    }
}

async fn administrator(app: &App, headers: &HeaderMap, request_id: String) -> Result<Admin, ApiError> {
    match credential(headers)? {
        Some(Credential::Token(token)) => {
            let (caller, is_admin) = user(app, &token, request_id).await?;
            if is_admin { Ok(Admin(caller)) } else { Err(ApiError::forbidden("only administrators may do this")) }
        }
        Some(Credential::Key(hash)) => {
            app.store.use_api_key(&hash).await?.ok_or_else(ApiError::unauthorized)?;
            Err(ApiError::forbidden("this needs an administrator's token (Authorization: Bearer), not an API key"))
        }
        None => Err(ApiError::unauthorized()),
    }
}

/// The token says who; what they are now is in the database.
async fn user(app: &App, token: &str, request_id: String) -> Result<(Caller, bool), ApiError> {
    let id = app.tokens.user(token).ok_or_else(ApiError::unauthorized)?;
    let user = app.store.user(id).await?.filter(|user| user.is_active).ok_or_else(ApiError::unauthorized)?;
    let team = user.team.ok_or_else(|| ApiError::forbidden("this person is in no team"))?;
    Ok((Caller { team, who: Who::User(id), request_id }, user.is_admin))
}

/// The one credential of a request; two are refused, because proxies and logs may mean the other one.
fn credential(headers: &HeaderMap) -> Result<Option<Credential>, ApiError> {
    let mut keys = headers.get_all("x-api-key").iter();
    let key = keys.next();
    if keys.next().is_some() {
        return Err(ApiError::invalid("X-API-Key", "is there twice"));
    }
    let token = bearer(headers)?;
    match (key, token) {
        (Some(_), Some(_)) => Err(ApiError::invalid("", "both an API key and a token are given; give one")),
        (Some(key), None) => {
            let hash = key.to_str().ok().and_then(tokens::api_key_hash).ok_or_else(ApiError::unauthorized)?;
            Ok(Some(Credential::Key(hash)))
        }
        (None, Some(token)) => Ok(Some(Credential::Token(token))),
        (None, None) => Ok(None),
    }
}

fn bearer(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = given.next() else { return Ok(None) };
    if given.next().is_some() {
        return Err(ApiError::invalid("Authorization", "is there twice"));
    }
    let text = value.to_str().map_err(|_| ApiError::unauthorized())?;
    let (scheme, token) = text.split_once(' ').ok_or_else(ApiError::unauthorized)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(ApiError::unauthorized());
    }
    Ok(Some(token.trim().to_owned()))
}

macro_rules! from_check {
    ($($type:ty),+) => {$(
        impl<S: Send + Sync> FromRequestParts<S> for $type {
            type Rejection = ApiError;

            async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
                // Absent only when the table gives the route another policy than its handler wants.
                parts.extensions.get::<Self>().cloned().ok_or_else(ApiError::internal)
            }
        }
    )+};
}

from_check!(Caller, Admin, HostCaller);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_credential_and_no_more() {
        let key = format!("wrn_{}", "ab".repeat(32));
        let headers = |list: &[(&'static str, &str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in list {
                headers.append(*name, value.parse().unwrap());
            }
            headers
        };
        let code = |list: &[(&'static str, &str)]| match credential(&headers(list)) {
            Ok(Some(_)) => "one",
            Ok(None) => "none",
            Err(error) => error.code(),
        };
        assert_eq!(code(&[]), "none");
        assert_eq!(code(&[("x-api-key", &key)]), "one");
        assert_eq!(code(&[("authorization", "Bearer x")]), "one");
        assert_eq!(code(&[("x-api-key", &key), ("x-api-key", &key)]), "invalid_request");
        assert_eq!(code(&[("x-api-key", &key), ("authorization", "Bearer x")]), "invalid_request");
        assert_eq!(code(&[("x-api-key", "nonsense")]), "unauthorized");
        assert_eq!(code(&[("authorization", "Basic x")]), "unauthorized");
    }

    #[test]
    fn capsules_are_sandboxes() {
        assert_eq!(policy(&Method::POST, "/v1/capsules"), Some(Team));
        assert_eq!(policy(&Method::GET, "/v1/capsules/{id}/console"), Some(Team));
        assert_eq!(policy(&Method::PUT, "/v1/sandboxes"), None);
    }
}
