//! `POST /v1/sandboxes/{id}/files/write` and `.../files/stream/write`: a multipart body with `path` and then `file` (and perhaps `user` between them)
//! becomes a file in the sandbox, whole or not at all: an upload that breaks off leaves what was there before.

use std::time::Duration;

use api::host::__buffa::oneof::write_file_request::Part;
use api::host::{CHUNK_BYTES, WriteFileEnd, WriteFileHead, WriteFileRequest};
use api::v1::errors::ErrorBody;
use axum::extract::multipart::{Field, Multipart, MultipartRejection};
use axum::extract::{DefaultBodyLimit, FromRequest as _, Request, State};
use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use http::StatusCode;
use model::ids::SandboxId;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use utoipa::ToSchema;

use super::{check_path, user};
use crate::agents::{Agent, AgentError};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, is_encoded};
use crate::http::errors::ApiError;

/// Of the form that published clients use for small files.
const SMALL_BYTES_MAX: u64 = 100 * 1024 * 1024;
/// Silence of the client in the middle of an upload.
pub const SILENCE_MAX: Duration = Duration::from_secs(60);
/// After its last byte, for the guest to write and name the file.
const FINISH_TIME_MAX: Duration = Duration::from_secs(120);
/// Pieces on their way; the client waits for the guest.
const PIECES_MAX: usize = 4;
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
    mut request: Request,
    bytes_max: u64,
) -> Result<StatusCode, ApiError> {
    if is_encoded(request.headers()) {
        return Err(ApiError::unsupported_media_type("multipart/form-data"));
    }
    let agent = super::super::awake(app, caller, id).await?;
    DefaultBodyLimit::disable().apply(&mut request);
    let mut form = Multipart::from_request(request, &()).await.map_err(|error| match error {
        MultipartRejection::InvalidBoundary(_) => ApiError::unsupported_media_type("multipart/form-data"),
        _ => ApiError::invalid("", "the body is not multipart/form-data"),
    })?;
    let (mut path, mut named) = (None, None);
    while let Some(mut field) = within(form.next_field()).await? {
        match field.name() {
            Some("path") => {
                let text = text_of(&mut field, "path").await?;
                check_path("path", &text)?;
                path = Some(text);
            }
            Some("user") => named = Some(text_of(&mut field, "user").await?),
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

async fn text_of(field: &mut Field<'_>, name: &str) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = within(field.chunk()).await? {
        if bytes.len() + chunk.len() > TEXT_FIELD_BYTES_MAX {
            return Err(ApiError::invalid(name, "is too long"));
        }
        bytes.extend_from_slice(&chunk);
    }
    String::from_utf8(bytes).map_err(|_| ApiError::invalid(name, "is not UTF-8"))
}

/// Which file.
pub struct Target {
    pub sandbox: SandboxId,
    pub path: String,
    pub user: String,
}

/// Sends the file to the host as it comes. Only the end mark makes it a file: whatever breaks off before leaves nothing.
pub async fn relay(
    agent: &Agent,
    target: Target,
    source: impl Stream<Item = Result<Bytes, ApiError>>,
    bytes_max: u64,
) -> Result<(), ApiError> {
    let mut source = std::pin::pin!(source);
    let (pieces, receiver) = mpsc::channel(PIECES_MAX);
    let call = agent.write_file(ReceiverStream::new(receiver));
    let mut call = std::pin::pin!(call);
    let feed = async {
        let Target { sandbox, path, user } = target;
        let head = WriteFileHead { sandbox_id: sandbox.to_string(), path, user, ..Default::default() };
        let mut next = Some(Part::from(head));
        let mut size = 0u64;
        loop {
            if let Some(part) = next.take()
                && pieces.send(WriteFileRequest { part: Some(part), ..Default::default() }).await.is_err()
            {
                // The call has ended; it says why.
                return Ok(());
            }
            let Some(chunk) = source.next().await.transpose()? else { break };
            size = size.saturating_add(u64::try_from(chunk.len()).unwrap_or(u64::MAX));
            if size > bytes_max {
                return Err(ApiError::too_large(bytes_max));
            }
            for piece in chunk.chunks(CHUNK_BYTES) {
                let request = WriteFileRequest { part: Some(Part::Chunk(piece.to_vec())), ..Default::default() };
                if pieces.send(request).await.is_err() {
                    return Ok(());
                }
            }
        }
        let end = WriteFileRequest { part: Some(Part::from(WriteFileEnd::default())), ..Default::default() };
        let _ = pieces.send(end).await;
        drop(pieces);
        Ok::<(), ApiError>(())
    };
    tokio::select! {
        answered = call.as_mut() => return answered.map(drop).map_err(|error| AgentError::from(error).into()),
        fed = feed => fed?,
    }
    let answered = tokio::time::timeout(FINISH_TIME_MAX, call).await;
    answered
        .map_err(|_| ApiError::deadline_exceeded("the sandbox did not finish writing the file"))?
        .map_err(AgentError::from)?;
    Ok(())
}

/// The next part of the form, if it comes in time.
async fn within<T>(
    part: impl Future<Output = Result<T, axum::extract::multipart::MultipartError>>,
) -> Result<T, ApiError> {
    match tokio::time::timeout(SILENCE_MAX, part).await {
        Ok(Ok(part)) => Ok(part),
        Ok(Err(_)) => Err(ApiError::invalid("", "the form is malformed or ended early")),
        Err(_) => Err(ApiError::request_timeout()),
    }
}
