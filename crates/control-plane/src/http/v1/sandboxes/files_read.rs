//! `POST /v1/sandboxes/{id}/files/read` and `.../files/stream/read`: a file's bytes, as they come. Nothing of it is held here.

use api::host::__buffa::oneof::read_file_response::Part;
use api::host::ReadFileRequest;
use api::v1::errors::ErrorBody;
use api::v1::files::ReadFile;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::stream;
use http::header;
use model::ids::SandboxId;

use crate::agents::{Agent, AgentError};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;

const PATH_BYTES_MAX: usize = 4096;

#[utoipa::path(post, path = "/{id}/files/read", tag = "files", params(("id" = String, Path)), request_body = ReadFile,
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"), (status = 404, body = ErrorBody)))]
pub async fn read(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Json(body): Json<ReadFile>,
) -> Result<Response, ApiError> {
    check_path(&body.path)?;
    let agent = super::awake(&app, &caller, &id).await?;
    respond(&agent, &id, body.path).await
}

#[utoipa::path(post, path = "/{id}/files/stream/read", tag = "files", params(("id" = String, Path)), request_body = ReadFile,
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"), (status = 404, body = ErrorBody)))]
pub async fn stream_read(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Json(body): Json<ReadFile>,
) -> Result<Response, ApiError> {
    check_path(&body.path)?;
    let agent = super::awake(&app, &caller, &id).await?;
    respond(&agent, &id, body.path).await
}

pub fn check_path(path: &str) -> Result<(), ApiError> {
    if path.is_empty() || path.len() > PATH_BYTES_MAX || path.contains('\0') {
        return Err(ApiError::invalid("path", "must have 1 to 4096 bytes and no NUL"));
    }
    Ok(())
}

/// The status is told only once the guest has opened the file, so that a missing one is 404.
async fn respond(agent: &Agent, id: &SandboxId, path: String) -> Result<Response, ApiError> {
    let request = ReadFileRequest { sandbox_id: id.to_string(), path, ..Default::default() };
    let mut stream = agent.read_file(request).await.map_err(AgentError::from)?;
    let first = stream.message().await.map_err(AgentError::from)?.map(|message| message.to_owned_message());
    let Some(Part::Head(head)) = first.and_then(|message| message.part) else {
        return Err(AgentError::Misbehaved { message: "a file came without its head".to_owned() }.into());
    };
    // An error in the middle breaks the connection off: a body that just ended would look whole.
    let chunks = stream::try_unfold(stream, |mut stream| async move {
        loop {
            let Some(message) = stream.message().await? else { return Ok::<_, connectrpc::ConnectError>(None) };
            if let Some(Part::Chunk(chunk)) = message.to_owned_message().part {
                return Ok(Some((Bytes::from(chunk), stream)));
            }
        }
    });
    let mut response = Body::from_stream(chunks).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, http::HeaderValue::from_static("application/octet-stream"));
    if let Some(size) = head.size {
        headers.insert(header::CONTENT_LENGTH, size.into());
    }
    Ok(response)
}
