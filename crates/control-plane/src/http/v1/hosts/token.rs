//! `POST /v1/hosts/{id}/token`: another token after a failed registration. The tokens before it open nothing any more.

use api::v1::errors::ErrorBody;
use api::v1::hosts::HostWithToken;
use axum::extract::State;
use http::StatusCode;
use model::ids::HostId;
use serde::{Deserialize, Serialize};
use store::registration_tokens::NewToken;

use crate::app::App;
use crate::http::access::HostsCaller;
use crate::http::body::{Id, OptionalJson};
use crate::http::errors::ApiError;
use crate::http::idempotency::{IdempotencyKey, secret_bytes};
use crate::tokens;

/// Nothing can be said.
#[derive(Default, Serialize, Deserialize)]
pub struct Nothing {}

#[utoipa::path(post, path = "/{id}/token", tag = "hosts", params(("id" = String, Path)),
    responses((status = 201, body = HostWithToken), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn token(
    State(app): State<App>,
    caller: HostsCaller,
    Id(id): Id<HostId>,
    repeat: IdempotencyKey,
    OptionalJson(body): OptionalJson<Nothing>,
) -> Result<(StatusCode, axum::Json<HostWithToken>), ApiError> {
    let idempotency = repeat.of_person(caller.person.user, &format!("POST /v1/hosts/{id}/token"), &body);
    let (token, token_hash) = tokens::registration_token(&secret_bytes(&app, idempotency.as_ref()));
    let (store, actor) = (app.store.clone(), caller.actor());
    let made = super::super::detached(&app, async move {
        store.new_registration_token(id, &token_hash, idempotency.as_ref(), &actor).await
    });
    match made.await? {
        NewToken::Made(host) | NewToken::Repeated(host) => {
            Ok((StatusCode::CREATED, axum::Json(HostWithToken { host: super::shown(host), registration_token: token })))
        }
        NewToken::OtherArguments => Err(ApiError::idempotency_key_reused()),
        NewToken::Missing => Err(ApiError::not_found("host")),
        NewToken::Registered => {
            Err(ApiError::wrong_state("the host is registered; a token is only for one that is not", "registered"))
        }
    }
}
