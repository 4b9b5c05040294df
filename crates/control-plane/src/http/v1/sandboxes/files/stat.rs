//! `POST /v1/sandboxes/{id}/files/stat`: one file, directory or link, which itself is told of and not its target.

use api::host::StatFileRequest;
use api::v1::errors::ErrorBody;
use api::v1::files::{FilePath, OneFileEntry};
use axum::extract::State;
use model::ids::SandboxId;

use super::{check_path, one, user};
use crate::agents::{AgentError, ask};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;

#[utoipa::path(post, path = "/{id}/files/stat", tag = "files", params(("id" = String, Path)), request_body = FilePath,
    responses((status = 200, body = OneFileEntry), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn stat(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Json(body): Json<FilePath>,
) -> Result<axum::Json<OneFileEntry>, ApiError> {
    check_path("path", &body.path)?;
    let user = user(body.user)?;
    let agent = super::super::awake(&app, &caller, &id).await?;
    let request = StatFileRequest { sandbox_id: id.to_string(), path: body.path, user, ..Default::default() };
    let answer = agent.stat_file_with_options(request, ask()).await.map_err(AgentError::from)?;
    one(answer.into_owned().entry.into_option())
}
