//! `PUT /v1/sandboxes/{id}/files/content`: the body, of any size, becomes a file in the sandbox, whole or not at all: an upload that breaks off
//! leaves what was there before.

use api::v1::errors::ErrorBody;
use axum::extract::{Request, State};
use futures::StreamExt as _;
use http::{StatusCode, header};
use model::ids::SandboxId;

use super::content::Named;
use super::{check_path, user};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Query, is_encoded};
use crate::http::errors::ApiError;
use crate::http::form::SILENCE_MAX;
use crate::uploads::{Target, relay};

#[utoipa::path(put, path = "/{id}/files/content", tag = "files", params(("id" = String, Path), Named),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 204), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 408, body = ErrorBody), (status = 409, body = ErrorBody), (status = 415, body = ErrorBody),
        (status = 503, body = ErrorBody), (status = 507, body = ErrorBody)))]
pub async fn put(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Query(named): Query<Named>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    check_path("path", &named.path)?;
    let user = user(named.user)?;
    let headers = request.headers();
    let kind = headers.get(header::CONTENT_TYPE).map(|kind| kind.as_bytes().to_ascii_lowercase()).unwrap_or_default();
    // A form would become the file, with its boundaries.
    if is_encoded(headers) || kind.starts_with(b"multipart/") {
        return Err(ApiError::unsupported_media_type("the file itself (application/octet-stream)"));
    }
    // A part would become the whole (RFC 9110, 14.5).
    if headers.contains_key(header::CONTENT_RANGE) {
        return Err(ApiError::invalid("Content-Range", "cannot be: a file is written whole"));
    }
    let agent = super::super::awake(&app, &caller, &id).await?;
    let pieces = futures::stream::try_unfold(request.into_body().into_data_stream(), |mut body| async move {
        match tokio::time::timeout(SILENCE_MAX, body.next()).await {
            Ok(None) => Ok(None),
            Ok(Some(Ok(piece))) => Ok(Some((piece, body))),
            Ok(Some(Err(_))) => Err(ApiError::invalid("", "the body ended early")),
            Err(_) => Err(ApiError::request_timeout()),
        }
    });
    relay(&agent, Target { sandbox: id, path: named.path, user }, pieces, u64::MAX).await?;
    Ok(StatusCode::NO_CONTENT)
}
