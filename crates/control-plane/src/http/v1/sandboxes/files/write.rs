//! `POST /v1/sandboxes/{id}/files/write` and `.../files/stream/write`: a multipart body with `path` and then `file` (and perhaps `user` between them)
//! becomes a file in the sandbox, whole or not at all: an upload that breaks off leaves what was there before.

use api::v1::errors::ErrorBody;
use axum::extract::{Request, State};
use futures::stream;
use http::StatusCode;
use model::ids::SandboxId;
use utoipa::ToSchema;

use super::{check_path, user};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Id;
use crate::http::errors::ApiError;
use crate::http::form::{self, text_of, within};
use crate::uploads::{Target, relay};

/// Of the form that published clients use for small files.
const SMALL_BYTES_MAX: u64 = 100 * 1024 * 1024;
const TEXT_FIELD_BYTES_MAX: usize = 8 * 1024;

#[derive(ToSchema)]
#[allow(dead_code, reason = "describes the form for the OpenAPI document")]
pub struct Upload {
    /// Absolute, or relative to the home of the user; comes before `file`.
    path: String,
    /// The sandbox's default user when absent; comes before `file`.
    user: Option<String>,
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
}

#[utoipa::path(post, path = "/{id}/files/write", tag = "files", params(("id" = String, Path)),
    request_body(content = Upload, content_type = "multipart/form-data"),
    responses((status = 204), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 408, body = ErrorBody), (status = 409, body = ErrorBody), (status = 413, body = ErrorBody),
        (status = 415, body = ErrorBody), (status = 503, body = ErrorBody), (status = 507, body = ErrorBody)))]
pub async fn write(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let announced =
        request.headers().get(http::header::CONTENT_LENGTH).and_then(|l| l.to_str().ok()?.parse::<u64>().ok());
    // The form around the file has its own size.
    if announced.is_some_and(|bytes| bytes > SMALL_BYTES_MAX + 64 * 1024) {
        return Err(ApiError::too_large(SMALL_BYTES_MAX));
    }
    upload(&app, &caller, &id, request, SMALL_BYTES_MAX).await
}

#[utoipa::path(post, path = "/{id}/files/stream/write", tag = "files", params(("id" = String, Path)),
    request_body(content = Upload, content_type = "multipart/form-data"),
    responses((status = 204), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 408, body = ErrorBody), (status = 409, body = ErrorBody), (status = 415, body = ErrorBody),
        (status = 503, body = ErrorBody), (status = 507, body = ErrorBody)))]
pub async fn stream_write(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    upload(&app, &caller, &id, request, u64::MAX).await
}

async fn upload(
    app: &App,
    caller: &Caller,
    id: &SandboxId,
    request: Request,
    bytes_max: u64,
) -> Result<StatusCode, ApiError> {
    form::is_one(request.headers())?;
    let agent = super::super::awake(app, caller, id).await?;
    let mut form = form::of(request).await?;
    let (mut path, mut named) = (None, None);
    while let Some(mut field) = within(form.next_field()).await? {
        match field.name() {
            Some("path") => {
                let text = text_of(&mut field, "path", TEXT_FIELD_BYTES_MAX).await?;
                check_path("path", &text)?;
                path = Some(text);
            }
            Some("user") => named = Some(text_of(&mut field, "user", TEXT_FIELD_BYTES_MAX).await?),
            Some("file") => {
                let path = path.ok_or_else(|| ApiError::invalid("path", "is missing; it must come before the file"))?;
                let target = Target { sandbox: id.clone(), path, user: user(named)? };
                let pieces = stream::try_unfold(field, |mut field| async move {
                    Ok(within(field.chunk()).await?.map(|piece| (piece, field)))
                });
                return relay(&agent, target, pieces, bytes_max).await.map(|()| StatusCode::NO_CONTENT);
            }
            // Fields that we do not know are left alone, as everywhere.
            _ => while within(field.chunk()).await?.is_some() {},
        }
    }
    Err(ApiError::invalid(if path.is_some() { "file" } else { "path" }, "is missing"))
}
