//! The one place that knows status codes: from what went wrong to what the client is told.
//!
//! Messages say what is wrong and which field. They never hold SQL, addresses or paths of hosts, causes inside, or secrets; what is our
//! fault is told in one generic sentence with the request's id, and logged in full.

use std::borrow::Cow;

use api::v1::errors::ErrorObject;
use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde_json::{Map, Value, json};
use store::StoreError;
use store::placement::Shortage;
use store::quotas::{Exceeded, Quota};
use tracing::error;

use crate::agents::{AgentError, Refusal};
use crate::measures;

/// Every code of the public API with its status. Each has a page in docs/errors.
pub const CODES: [(&str, StatusCode); 47] = [
    ("invalid_request", StatusCode::BAD_REQUEST),
    ("invalid_token", StatusCode::BAD_REQUEST),
    ("already_activated", StatusCode::BAD_REQUEST),
    ("invalid_login", StatusCode::BAD_REQUEST),
    ("last_login_method", StatusCode::BAD_REQUEST),
    ("unauthorized", StatusCode::UNAUTHORIZED),
    ("wrong_password", StatusCode::UNAUTHORIZED),
    ("forbidden", StatusCode::FORBIDDEN),
    ("no_team", StatusCode::FORBIDDEN),
    ("account_not_activated", StatusCode::FORBIDDEN),
    ("account_disabled", StatusCode::FORBIDDEN),
    ("email_not_verified", StatusCode::FORBIDDEN),
    ("no_account", StatusCode::FORBIDDEN),
    ("not_found", StatusCode::NOT_FOUND),
    ("provider_not_found", StatusCode::NOT_FOUND),
    ("method_not_allowed", StatusCode::METHOD_NOT_ALLOWED),
    ("request_timeout", StatusCode::REQUEST_TIMEOUT),
    ("invalid_state", StatusCode::CONFLICT),
    ("conflict", StatusCode::CONFLICT),
    ("operation_in_progress", StatusCode::CONFLICT),
    ("host_has_sandboxes", StatusCode::CONFLICT),
    ("host_fenced", StatusCode::CONFLICT),
    ("name_reserved", StatusCode::CONFLICT),
    ("template_name_taken", StatusCode::CONFLICT),
    ("email_taken", StatusCode::CONFLICT),
    ("signup_cooldown", StatusCode::CONFLICT),
    ("last_owner", StatusCode::CONFLICT),
    ("owns_team_with_members", StatusCode::CONFLICT),
    ("team_not_empty", StatusCode::CONFLICT),
    ("snapshot_incompatible", StatusCode::CONFLICT),
    ("snapshot_damaged", StatusCode::CONFLICT),
    ("too_large", StatusCode::PAYLOAD_TOO_LARGE),
    ("unsupported_media_type", StatusCode::UNSUPPORTED_MEDIA_TYPE),
    ("range_not_satisfiable", StatusCode::RANGE_NOT_SATISFIABLE),
    ("idempotency_key_reused", StatusCode::UNPROCESSABLE_ENTITY),
    ("quota_exceeded", StatusCode::TOO_MANY_REQUESTS),
    ("rate_limited", StatusCode::TOO_MANY_REQUESTS),
    ("headers_too_large", StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
    ("internal_error", StatusCode::INTERNAL_SERVER_ERROR),
    ("agent_error", StatusCode::BAD_GATEWAY),
    ("delivery_failed", StatusCode::BAD_GATEWAY),
    ("provider_error", StatusCode::BAD_GATEWAY),
    ("host_unavailable", StatusCode::SERVICE_UNAVAILABLE),
    ("no_hosts_available", StatusCode::SERVICE_UNAVAILABLE),
    ("unavailable", StatusCode::SERVICE_UNAVAILABLE),
    ("deadline_exceeded", StatusCode::GATEWAY_TIMEOUT),
    ("insufficient_storage", StatusCode::INSUFFICIENT_STORAGE),
];

/// A part of the minute over which creates are counted.
const CREATES_RETRY_SEC: u32 = 10;
/// Input is repeated in messages up to this many characters.
const ECHO_CHARS_MAX: usize = 64;

#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    code: &'static str,
    message: Cow<'static, str>,
    details: Map<String, Value>,
    retry_after_sec: Option<u32>,
    allow: Option<String>,
}

impl ApiError {
    fn new(code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self { code, message: message.into(), details: Map::new(), retry_after_sec: None, allow: None }
    }

    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.details.insert(name.to_owned(), value.into());
        self
    }

    fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after_sec = Some(seconds);
        self
    }

    pub fn code(&self) -> &'static str {
        self.code
    }

    pub fn message(&self) -> &str {
        &self.message
    }

    pub fn status(&self) -> StatusCode {
        status(self.code)
    }

    /// A field of the request is wrong.
    pub fn invalid(field: &str, reason: impl std::fmt::Display) -> Self {
        let reason = reason.to_string();
        let said = if field.is_empty() { reason.clone() } else { format!("{field} {reason}") };
        Self::new("invalid_request", said).with("field", field).with("reason", reason)
    }

    /// One text for everything that is wrong with a credential.
    pub fn unauthorized() -> Self {
        Self::new("unauthorized", "a valid API key (X-API-Key) or token (Authorization: Bearer) is needed")
    }

    pub fn forbidden(message: &'static str) -> Self {
        Self::new("forbidden", message)
    }

    pub fn invalid_token() -> Self {
        Self::new("invalid_token", "the token is unknown, was used, or its time is over; ask for another")
    }

    pub fn already_activated() -> Self {
        Self::new("already_activated", "the account is active already; log in")
    }

    pub fn wrong_password() -> Self {
        Self::new("wrong_password", "the current password is another one").with("field", "current_password")
    }

    pub fn no_team() -> Self {
        Self::new("no_team", "this person is not in the team for which the session acts; switch to another team")
    }

    pub fn account_not_activated() -> Self {
        Self::new("account_not_activated", "the account is not active yet; follow the link that was sent")
    }

    pub fn account_disabled() -> Self {
        Self::new("account_disabled", "an administrator has disabled this account")
    }

    pub fn email_taken() -> Self {
        Self::new("email_taken", "there is an account with this address already; log in").with("field", "email")
    }

    pub fn signup_cooldown() -> Self {
        Self::new("signup_cooldown", "a link was sent to this address a short while ago; follow it, or try again later")
            .with("field", "email")
    }

    pub fn last_owner() -> Self {
        Self::new("last_owner", "a team has an owner at all times; make somebody else one first")
    }

    /// Teams that have other members and no other owner.
    pub fn owns_team_with_members(teams: Vec<String>) -> Self {
        let message =
            "the account is the only owner of teams that go on without it; make somebody else an owner, or delete them";
        Self::new("owns_team_with_members", message).with("team_ids", teams)
    }

    pub fn last_login_method() -> Self {
        Self::new("last_login_method", "the account could not log in any more; set a password first")
    }

    pub fn signup_closed() -> Self {
        Self::forbidden("sign-up is closed here; ask for an invitation, or an administrator for an account")
    }

    pub fn provider_not_found() -> Self {
        Self::new("provider_not_found", "this platform knows no such site to log in by")
    }

    /// The other site is away, or says what cannot be believed.
    pub fn provider_error(message: &'static str) -> Self {
        Self::new("provider_error", message).retry_after(10)
    }

    pub fn invalid_login(message: &'static str) -> Self {
        Self::new("invalid_login", message)
    }

    pub fn email_not_verified() -> Self {
        Self::new("email_not_verified", "the other site does not say that it has verified an address of this account")
    }

    pub fn no_account() -> Self {
        Self::new("no_account", "nobody here is known by this account of the other site; sign up first")
    }

    pub fn identity_taken() -> Self {
        Self::new(
            "conflict",
            "this account of the other site, or another one of it, is bound to an account here already",
        )
    }

    pub fn last_administrator() -> Self {
        Self::new("conflict", "the platform has an administrator at all times; make somebody else one first")
    }

    pub fn team_not_empty() -> Self {
        Self::new("team_not_empty", "the team has sandboxes, snapshots or hosts; kill, delete and remove them first")
    }

    /// A team that has not been let have hosts of its own.
    pub fn not_byoc() -> Self {
        Self::forbidden("the team may have no hosts of its own yet; an administrator of the platform turns that on")
    }

    pub fn already_a_member() -> Self {
        Self::invalid("email", "is that of a member already")
    }

    pub fn too_many_attempts(retry_after_sec: u32) -> Self {
        Self::new("rate_limited", "too many tries; wait a little").retry_after(retry_after_sec)
    }

    pub fn too_many_requests(retry_after_sec: u32) -> Self {
        Self::new("rate_limited", "too many requests; send fewer, and none before Retry-After")
            .retry_after(retry_after_sec)
    }

    /// Under the same idempotency key.
    pub fn operation_in_progress() -> Self {
        let message = "the first call under this Idempotency-Key has not ended yet; ask again in a moment";
        Self::new("operation_in_progress", message).retry_after(1)
    }

    /// Of a stream for which others had to wait.
    pub fn too_slow() -> Self {
        let message = "this client took the output so slowly that others who hear the same process had to wait";
        Self::new("rate_limited", message)
    }

    /// Unknown and foreign things are the same.
    pub fn not_found(what: &'static str) -> Self {
        Self::new("not_found", format!("there is no such {what}"))
    }

    pub fn no_template(name: &str) -> Self {
        Self::new("not_found", format!("there is no template {}", echo(name))).with("field", "template")
    }

    pub fn method_not_allowed(allow: String) -> Self {
        Self { allow: Some(allow), ..Self::new("method_not_allowed", "this route does not know that method") }
    }

    pub fn request_timeout() -> Self {
        Self::new("request_timeout", "the request's body did not arrive in time")
    }

    pub fn invalid_state(state: impl std::fmt::Display) -> Self {
        Self::new("invalid_state", format!("the sandbox is {state}, not running")).with("state", state.to_string())
    }

    pub fn wrong_state(message: &'static str, state: impl std::fmt::Display) -> Self {
        Self::new("invalid_state", message).with("state", state.to_string())
    }

    pub fn host_fenced() -> Self {
        Self::new("host_fenced", "two machines speak as this host; an operator must find out which one it is")
    }

    pub fn host_is_past() -> Self {
        let message = "this disk has an old state of the host: it is a copy; if it is the host, restored, an operator must unfence it";
        Self::new("host_fenced", message)
    }

    pub fn host_has_sandboxes(sandboxes: Vec<String>, snapshots: Vec<String>) -> Self {
        let what = if sandboxes.is_empty() { "snapshots; delete them" } else { "sandboxes; kill them" };
        Self::new("host_has_sandboxes", format!("the host has {what}, or repeat with force=true"))
            .with("sandbox_ids", sandboxes)
            .with("snapshots", snapshots)
    }

    pub fn name_reserved(name: &str) -> Self {
        Self::new("name_reserved", format!("{} is the name of a template of the platform", echo(name)))
            .with("field", "name")
    }

    pub fn template_name_taken(name: &str) -> Self {
        Self::new("template_name_taken", format!("there is a snapshot {} already", echo(name))).with("field", "name")
    }

    pub fn channel_name_taken(name: &str) -> Self {
        Self::new("conflict", format!("there is a channel {} already", echo(name))).with("field", "name")
    }

    pub fn delivery_failed() -> Self {
        Self::new(
            "delivery_failed",
            "nothing could be delivered there: it is not reachable, or does not answer with a status of success",
        )
    }

    pub fn snapshot_under_way() -> Self {
        Self::new("conflict", "another snapshot of this sandbox is being made")
    }

    pub fn too_large(limit_bytes: u64) -> Self {
        Self::new("too_large", format!("the request's body is larger than {limit_bytes} bytes"))
            .with("limit_bytes", limit_bytes)
    }

    pub fn headers_too_large() -> Self {
        Self::new("headers_too_large", "the request's headers or its address are too large")
    }

    pub fn unsupported_media_type(wanted: &'static str) -> Self {
        Self::new("unsupported_media_type", format!("the body must be {wanted}, without a content encoding"))
    }

    pub fn range_not_satisfiable() -> Self {
        Self::new("range_not_satisfiable", "the range that is asked for lies outside the file")
    }

    pub fn idempotency_key_reused() -> Self {
        Self::new("idempotency_key_reused", "this Idempotency-Key was used with other arguments before")
    }

    pub fn quota_exceeded(message: &'static str) -> Self {
        Self::new("quota_exceeded", message)
    }

    pub fn too_many_builds(max: i64) -> Self {
        let message = format!("{max} builds wait or run already; wait for one of them, or cancel one");
        Self::new("quota_exceeded", message).with("limit", max)
    }

    /// Of creates per minute some are free again soon, of the others none without somebody's doing.
    pub fn over_quota(exceeded: &Exceeded) -> Self {
        let Exceeded { quota, limit, used, asked } = *exceeded;
        measures::over_quota(quota);
        let name = quota.as_str();
        let error = if quota == Quota::CreatesPerMin {
            let message = format!("the team may create {limit} sandboxes in a minute and has created {used}");
            Self::new("rate_limited", message).retry_after(CREATES_RETRY_SEC)
        } else {
            let message =
                format!("the team's quota of {name} is {limit}: {used} are used, and {asked} more are too many");
            Self::new("quota_exceeded", message)
        };
        error.with("quota", name).with("limit", limit).with("used", used).with("asked", asked)
    }

    pub fn internal() -> Self {
        Self::new(
            "internal_error",
            "something went wrong in the control plane; the request's id helps to find out what",
        )
    }

    pub fn host_unavailable() -> Self {
        Self::new("host_unavailable", "the sandbox's host cannot be reached now").retry_after(5)
    }

    pub fn no_hosts_available() -> Self {
        Self::new("no_hosts_available", "no host has room for the sandbox").retry_after(10)
    }

    /// Which of what a host has is short where the sandbox comes closest to fitting. Whose it is, and how much, is not told.
    pub fn short_of(shortage: &Shortage) -> Self {
        let short: Vec<&str> = shortage.0.iter().map(|dimension| dimension.as_str()).collect();
        Self::new("no_hosts_available", shortage.to_string()).retry_after(10).with("short", short)
    }

    /// This replica is told to end.
    pub fn ending() -> Self {
        let message = "this replica ends now; another one answers, and what was asked for may have been done";
        Self::new("unavailable", message).retry_after(1)
    }

    pub fn unavailable() -> Self {
        Self::new("unavailable", "the platform is not available now; try again in a moment").retry_after(1)
    }

    pub fn deadline_exceeded(message: &'static str) -> Self {
        Self::new("deadline_exceeded", message)
    }

    /// What an operation ended in, as it was written down.
    pub fn of_operation(code: &str, message: &str) -> Self {
        let known = CODES.iter().map(|(known, _)| *known).find(|known| *known == code).unwrap_or("internal_error");
        let error = Self::new(known, message.to_owned());
        if status(known) == StatusCode::SERVICE_UNAVAILABLE { error.retry_after(10) } else { error }
    }

    pub fn object(&self, request_id: &str) -> ErrorObject {
        ErrorObject {
            code: self.code.to_owned(),
            message: self.message.to_string(),
            request_id: request_id.to_owned(),
            details: (!self.details.is_empty()).then(|| self.details.clone()),
        }
    }

    /// The answer, whole.
    pub fn response(&self, request_id: &str) -> Response {
        let body = json!({ "error": self.object(request_id) });
        let mut response = (self.status(), axum::Json(body)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json; charset=utf-8"));
        if let Some(seconds) = self.retry_after_sec {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if let Some(allow) = self.allow.as_deref().and_then(|allow| HeaderValue::from_str(allow).ok()) {
            headers.insert(header::ALLOW, allow);
        }
        if self.code == "unauthorized" {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.code == "request_timeout" {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// The error goes to the outermost layer, which knows the request's id and writes the body.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

fn status(code: &str) -> StatusCode {
    let known = CODES.iter().find(|(known, _)| *known == code);
    known.map_or(StatusCode::INTERNAL_SERVER_ERROR, |(_, status)| *status)
}

/// Input in a message: short, and nothing that a terminal would act on.
pub fn echo(input: &str) -> String {
    input.chars().take(ECHO_CHARS_MAX).flat_map(char::escape_debug).collect()
}

impl From<StoreError> for ApiError {
    fn from(cause: StoreError) -> Self {
        if matches!(cause, StoreError::FirstUnderWay) {
            return Self::operation_in_progress();
        }
        if cause.is_unavailable() {
            tracing::warn!("the database is not available: {}", innermost(&cause));
            return Self::unavailable();
        }
        error!(error = ?cause, "the database: {cause}");
        Self::internal()
    }
}

impl From<AgentError> for ApiError {
    fn from(cause: AgentError) -> Self {
        match cause {
            AgentError::Unreachable | AgentError::NoAnswer | AgentError::NotReady => Self::host_unavailable(),
            AgentError::UnknownSandbox | AgentError::NotRunning => Self::invalid_state("not running on its host"),
            AgentError::Stale => Self::new("conflict", "the sandbox was changed meanwhile"),
            AgentError::UnknownTemplate => Self::not_found("template"),
            AgentError::NoRoom => {
                Self::new("insufficient_storage", "the host has no room for that").with("where", "host")
            }
            AgentError::UnknownSnapshot => Self::not_found("snapshot"),
            AgentError::NoDisk => Self::new("insufficient_storage", "the sandbox's host has no disk for it"),
            AgentError::NotSaved { message } => Self::new("agent_error", message),
            AgentError::GuestDiskFull => {
                Self::new("insufficient_storage", "the sandbox's disk is full").with("where", "guest")
            }
            AgentError::TooManyStreams => {
                Self::new("rate_limited", "too many commands and transfers are under way in this sandbox")
                    .retry_after(1)
            }
            AgentError::DeadlineExceeded => Self::deadline_exceeded("the sandbox did not answer in time"),
            AgentError::Refused { refusal, message } => {
                let message = echo_long(&message);
                match refusal {
                    Refusal::Invalid => Self::new("invalid_request", message),
                    Refusal::NotFound => Self::new("not_found", message),
                    Refusal::Conflict => Self::new("conflict", message),
                    Refusal::Forbidden => Self::new("forbidden", message),
                    Refusal::TooLarge => Self::new("too_large", message),
                }
            }
            AgentError::Misbehaved { message } => {
                tracing::warn!("the guest agent misbehaved: {message}");
                Self::new("agent_error", "the sandbox's own agent did not answer as it must")
            }
        }
    }
}

/// What a guest made us say: bounded and printable.
fn echo_long(message: &str) -> String {
    message.chars().take(500).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_a_page() {
        let pages = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/errors"));
        for (code, _) in CODES {
            assert!(pages.join(format!("{code}.md")).is_file(), "docs/errors/{code}.md is missing");
        }
    }

    #[test]
    fn input_in_messages_is_short_and_harmless() {
        assert_eq!(echo("a\u{1b}[31m\n"), "a\\u{1b}[31m\\n");
        assert_eq!(echo(&"x".repeat(1000)).len(), 64);
    }

    #[test]
    fn a_stored_code_that_is_unknown_is_our_own_fault() {
        assert_eq!(ApiError::of_operation("nonsense", "x").code(), "internal_error");
        assert_eq!(ApiError::of_operation("host_unavailable", "x").status(), StatusCode::SERVICE_UNAVAILABLE);
    }
}
