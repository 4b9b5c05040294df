//! `POST /v1/hosts`: a record for a machine, and the token by which it registers.

use api::v1::errors::ErrorBody;
use api::v1::hosts::{CreateHost, HostWithToken};
use axum::extract::State;
use http::StatusCode;
use model::ids::HostId;
use store::hosts::{Created, NewHost};

use crate::app::App;
use crate::http::access::Admin;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::http::idempotency::{IdempotencyKey, secret_bytes};
use crate::tokens;

const LABEL_CHARS_MAX: usize = 128;

#[utoipa::path(post, path = "/", tag = "hosts", request_body = CreateHost,
    responses((status = 201, body = HostWithToken), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody)))]
pub async fn create(
    State(app): State<App>,
    Admin(caller): Admin,
    repeat: IdempotencyKey,
    Json(body): Json<CreateHost>,
) -> Result<(StatusCode, axum::Json<HostWithToken>), ApiError> {
    if body.kind != "regular" {
        return Err(ApiError::invalid("type", "must be \"regular\""));
    }
    for (field, label) in [("provider", &body.provider), ("availability_zone", &body.availability_zone)] {
        if label.as_ref().is_some_and(|l| l.chars().count() > LABEL_CHARS_MAX || l.chars().any(char::is_control)) {
            return Err(ApiError::invalid(field, "must have at most 128 printable characters"));
        }
    }
    let tags = super::tags::checked(body.tags.clone())?;
    let idempotency = repeat.scoped(&caller, "POST /v1/hosts", &body);
    let (token, token_hash) = tokens::registration_token(&secret_bytes(&app, idempotency.as_ref()));
    let actor = caller.actor();
    let new = NewHost {
        id: HostId(uuid::Uuid::now_v7()),
        kind: body.kind,
        provider: body.provider,
        availability_zone: body.availability_zone,
        tags,
        created_by: actor.id.clone(),
        token_hash,
    };
    let store = app.store.clone();
    let created =
        super::super::detached(&app, async move { store.create_host(&new, idempotency.as_ref(), &actor).await });
    match created.await? {
        Created::Made(host) | Created::Repeated(host) => {
            Ok((StatusCode::CREATED, axum::Json(HostWithToken { host: super::shown(host), registration_token: token })))
        }
        Created::OtherArguments => Err(ApiError::idempotency_key_reused()),
        Created::Gone => Err(ApiError::not_found("host")),
    }
}
