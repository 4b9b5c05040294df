//! `POST /v1/sandboxes/{id}/files/read` and `.../files/stream/read`: a file's bytes, as they come, or a range of them. Nothing of it is held
//! here.

use api::host::__buffa::oneof::read_file_response::Part;
use api::host::{FileHead, ReadFileRequest};
use api::v1::errors::ErrorBody;
use api::v1::files::ReadFile;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::stream;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use model::ids::SandboxId;

use super::{check_path, user};
use crate::agents::{Agent, AgentError};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;

#[utoipa::path(post, path = "/{id}/files/read", tag = "files",
    params(("id" = String, Path), ("Range" = Option<String>, Header), ("If-Range" = Option<String>, Header)), request_body = ReadFile,
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 206, body = Vec<u8>, content_type = "application/octet-stream"), (status = 400, body = ErrorBody),
        (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 416, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn read(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    headers: HeaderMap,
    Json(body): Json<ReadFile>,
) -> Result<Response, ApiError> {
    respond(&app, &caller, &id, &headers, body).await
}

#[utoipa::path(post, path = "/{id}/files/stream/read", tag = "files",
    params(("id" = String, Path), ("Range" = Option<String>, Header), ("If-Range" = Option<String>, Header)), request_body = ReadFile,
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 206, body = Vec<u8>, content_type = "application/octet-stream"), (status = 400, body = ErrorBody),
        (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 416, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn stream_read(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    headers: HeaderMap,
    Json(body): Json<ReadFile>,
) -> Result<Response, ApiError> {
    respond(&app, &caller, &id, &headers, body).await
}

async fn respond(
    app: &App,
    caller: &Caller,
    id: &SandboxId,
    headers: &HeaderMap,
    body: ReadFile,
) -> Result<Response, ApiError> {
    check_path("path", &body.path)?;
    let user = user(body.user)?;
    let agent = super::super::awake(app, caller, id).await?;
    let request = ReadFileRequest {
        sandbox_id: id.to_string(),
        path: body.path,
        user,
        range: asked(headers, header::RANGE),
        if_range: asked(headers, header::IF_RANGE),
        ..Default::default()
    };
    send(&agent, request).await
}

/// A header as the client sent it, for the guest to judge; empty for what cannot be one.
pub fn asked(headers: &HeaderMap, name: HeaderName) -> String {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
}

/// The status is told only once the guest has opened the file, so that a missing one is 404.
pub async fn send(agent: &Agent, request: ReadFileRequest) -> Result<Response, ApiError> {
    let head_only = request.head_only;
    let mut stream = agent.read_file(request).await.map_err(AgentError::from)?;
    let first = stream.message().await.map_err(AgentError::from)?.map(|message| message.to_owned_message());
    let Some(Part::Head(head)) = first.and_then(|message| message.part) else {
        return Err(AgentError::Misbehaved { message: "a file came without its head".to_owned() }.into());
    };
    let status = match head.status {
        // An agent of before knows no conditions, and the whole file is a right answer to each of them.
        0 | 200 => StatusCode::OK,
        206 => StatusCode::PARTIAL_CONTENT,
        304 => StatusCode::NOT_MODIFIED,
        416 => StatusCode::RANGE_NOT_SATISFIABLE,
        other => return Err(AgentError::Misbehaved { message: format!("a file came with status {other}") }.into()),
    };
    if status == StatusCode::RANGE_NOT_SATISFIABLE {
        let mut refused = ApiError::range_not_satisfiable().into_response();
        add(refused.headers_mut(), header::CONTENT_RANGE, &head.content_range);
        return Ok(refused);
    }
    let body = if head_only || status == StatusCode::NOT_MODIFIED {
        Body::empty()
    } else {
        // An error in the middle breaks the connection off: a body that just ended would look whole.
        Body::from_stream(stream::try_unfold(stream, |mut stream| async move {
            loop {
                let Some(message) = stream.message().await? else { return Ok::<_, connectrpc::ConnectError>(None) };
                if let Some(Part::Chunk(chunk)) = message.to_owned_message().part {
                    return Ok(Some((Bytes::from(chunk), stream)));
                }
            }
        }))
    };
    let mut response = (status, body).into_response();
    describe(response.headers_mut(), status, &head);
    Ok(response)
}

fn describe(headers: &mut HeaderMap, status: StatusCode, head: &FileHead) {
    add(headers, header::ETAG, &head.etag);
    add(headers, header::LAST_MODIFIED, &head.last_modified);
    if status == StatusCode::NOT_MODIFIED {
        return;
    }
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    add(headers, header::CONTENT_RANGE, &head.content_range);
    if head.has_ranges {
        headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    }
    if let Some(size) = head.size {
        headers.insert(header::CONTENT_LENGTH, size.into());
    }
}

/// What a guest says is left out when it is empty or no header.
fn add(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if !value.is_empty()
        && let Ok(value) = HeaderValue::from_str(value)
    {
        headers.insert(name, value);
    }
}
