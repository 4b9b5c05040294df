//! `POST /v1/api-keys`: a new key, told once.

use api::v1::errors::ErrorBody;
use api::v1::keys::{ApiKey, CreateApiKey};
use axum::extract::State;
use http::StatusCode;
use model::ids::ApiKeyId;
use store::api_keys::{Created, NewApiKey};

use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::OptionalJson;
use crate::http::errors::ApiError;
use crate::http::idempotency::{IdempotencyKey, secret_bytes};
use crate::tokens;

const NAME_CHARS_MAX: usize = 128;
const NAME_DEFAULT: &str = "Unnamed API Key";

#[utoipa::path(post, path = "/", tag = "api-keys", request_body = CreateApiKey,
    responses((status = 201, body = ApiKey), (status = 400, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    repeat: IdempotencyKey,
    OptionalJson(body): OptionalJson<CreateApiKey>,
) -> Result<(StatusCode, axum::Json<ApiKey>), ApiError> {
    let name = body.name.as_deref().unwrap_or(NAME_DEFAULT).trim();
    if name.is_empty() || name.chars().count() > NAME_CHARS_MAX || name.chars().any(is_misleading) {
        return Err(ApiError::invalid("name", "must have 1 to 128 printable characters"));
    }
    let idempotency = repeat.scoped(&caller, "POST /v1/api-keys", &body);
    let (key, key_hash, key_prefix) = tokens::api_key(&secret_bytes(&app, idempotency.as_ref()));
    let new = NewApiKey {
        id: ApiKeyId(uuid::Uuid::now_v7()),
        team: caller.team,
        name: name.to_owned(),
        key_hash,
        key_prefix,
        created_by: caller.user(),
    };
    let actor = caller.actor();
    let store = app.store.clone();
    let created =
        super::super::detached(&app, async move { store.create_api_key(&new, idempotency.as_ref(), &actor).await });
    match created.await? {
        Created::Made(made) | Created::Repeated(made) => {
            Ok((StatusCode::CREATED, axum::Json(super::shown(made, Some(key)))))
        }
        Created::OtherArguments => Err(ApiError::idempotency_key_reused()),
        Created::TooMany => Err(ApiError::quota_exceeded("the team has as many API keys as it may have; delete some")),
        Created::Gone => Err(ApiError::not_found("API key")),
    }
}

/// Control characters, and those that change the direction of the text around them.
fn is_misleading(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}
