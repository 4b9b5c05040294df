//! `POST /v1/sandboxes/{id}/files/move`: another name for a file, directory or link, also on another file system of the sandbox.

use api::host::MoveFileRequest;
use api::v1::errors::ErrorBody;
use api::v1::files::{MoveFile, OneFileEntry};
use axum::extract::State;
use model::ids::SandboxId;

use super::{check_path, one, user};
use crate::agents::{AgentError, ask};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;

#[utoipa::path(post, path = "/{id}/files/move", tag = "files", operation_id = "move", params(("id" = String, Path)),
    request_body = MoveFile,
    responses((status = 200, body = OneFileEntry), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 503, body = ErrorBody),
        (status = 507, body = ErrorBody)))]
pub async fn rename(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Json(body): Json<MoveFile>,
) -> Result<axum::Json<OneFileEntry>, ApiError> {
    check_path("from", &body.from)?;
    check_path("to", &body.to)?;
    let user = user(body.user)?;
    let agent = super::super::awake(&app, &caller, &id).await?;
    let request =
        MoveFileRequest { sandbox_id: id.to_string(), from: body.from, to: body.to, user, ..Default::default() };
    let answer = agent.move_file_with_options(request, ask()).await.map_err(AgentError::from)?;
    one(answer.into_owned().entry.into_option())
}
