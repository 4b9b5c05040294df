//! `POST /v1/api-keys`: a new key, told once.

use api::v1::errors::ErrorBody;
use api::v1::keys::{ApiKey, CreateApiKey};
use axum::extract::State;
use chrono::Utc;
use http::StatusCode;
use model::access::Scope;
use model::ids::ApiKeyId;
use store::api_keys::{Created, NewApiKey};

use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::OptionalJson;
use crate::http::errors::ApiError;
use crate::http::fields;
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
    let name = fields::display_name("name", body.name.as_deref().unwrap_or(NAME_DEFAULT), NAME_CHARS_MAX)?;
    let scopes = scopes(&caller, body.scopes.as_deref())?;
    if body.expires_at.is_some_and(|at| at <= Utc::now()) {
        return Err(ApiError::invalid("expires_at", "must be in the future"));
    }
    let idempotency = repeat.scoped(&caller, "POST /v1/api-keys", &body);
    let (key, key_hash, key_prefix) = tokens::api_key(&secret_bytes(&app, idempotency.as_ref()));
    let new = NewApiKey {
        id: ApiKeyId(uuid::Uuid::now_v7()),
        team: caller.team,
        name,
        key_hash,
        key_prefix,
        created_by: caller.user(),
        scopes,
        expires_at: body.expires_at,
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
        Created::NoTeam => Err(ApiError::not_found("team")),
        Created::Gone => Err(ApiError::not_found("API key")),
    }
}

/// No key makes one that opens more than itself.
fn scopes(caller: &Caller, wanted: Option<&[String]>) -> Result<Vec<Scope>, ApiError> {
    let Some(wanted) = wanted else {
        return Ok(Scope::ordinary().into_iter().filter(|scope| caller.scopes.contains(scope)).collect());
    };
    let mut scopes = Vec::new();
    for word in wanted {
        let scope: Scope = word.parse().map_err(|error| ApiError::invalid("scopes", error))?;
        if !caller.scopes.contains(&scope) {
            return Err(ApiError::forbidden("a key may not make one with more scopes than its own")
                .with("scope", word.as_str()));
        }
        scopes.push(scope);
    }
    if scopes.is_empty() {
        return Err(ApiError::invalid("scopes", "must name at least one"));
    }
    scopes.sort_unstable();
    scopes.dedup();
    Ok(scopes)
}
