//! `POST /v1/sandboxes/{id}/files/list`: what is in a directory, and below it. Twenty thousand entries at most: what has more is listed
//! directory by directory.

use api::host::{LISTING_BYTES_MAX, LISTING_ELEMENT_BYTES_MAX, ListFilesRequest};
use api::v1::errors::ErrorBody;
use api::v1::files::{FileEntries, ListFiles};
use axum::extract::State;
use model::ids::SandboxId;

use super::{check_path, shown, user};
use crate::agents::{AgentError, Refusal, ask};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;

#[utoipa::path(post, path = "/{id}/files/list", tag = "files", params(("id" = String, Path)), request_body = ListFiles,
    responses((status = 200, body = FileEntries), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Json(body): Json<ListFiles>,
) -> Result<axum::Json<FileEntries>, ApiError> {
    check_path("path", &body.path)?;
    let user = user(body.user)?;
    let agent = super::super::awake(&app, &caller, &id).await?;
    let request =
        ListFilesRequest { sandbox_id: id.to_string(), path: body.path, user, depth: body.depth, ..Default::default() };
    let options = ask().with_max_message_size(LISTING_BYTES_MAX).with_element_memory_limit(LISTING_ELEMENT_BYTES_MAX);
    let answer = agent.list_files_with_options(request, options).await.map_err(|error| match error.into() {
        AgentError::Refused { refusal: Refusal::TooLarge, message } => {
            ApiError::invalid("depth", format!("is too much here: {message}; list directories one by one"))
        }
        error => error.into(),
    })?;
    Ok(axum::Json(FileEntries { entries: answer.into_owned().entries.into_iter().map(shown).collect() }))
}
