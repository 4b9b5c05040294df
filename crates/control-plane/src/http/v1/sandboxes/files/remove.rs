//! `POST /v1/sandboxes/{id}/files/remove`: a file, a link, or a directory with everything below it. Never `/`, a home, or what holds one: nobody
//! meant that.

use api::host::RemoveFileRequest;
use api::v1::errors::ErrorBody;
use api::v1::files::FilePath;
use axum::extract::State;
use http::StatusCode;
use model::ids::SandboxId;

use super::{check_path, user};
use crate::agents::{AgentError, ask};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;

#[utoipa::path(post, path = "/{id}/files/remove", tag = "files", params(("id" = String, Path)), request_body = FilePath,
    responses((status = 204), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn remove(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Json(body): Json<FilePath>,
) -> Result<StatusCode, ApiError> {
    check_path("path", &body.path)?;
    let user = user(body.user)?;
    let agent = super::super::awake(&app, &caller, &id).await?;
    let request = RemoveFileRequest { sandbox_id: id.to_string(), path: body.path, user, ..Default::default() };
    agent.remove_file_with_options(request, ask()).await.map_err(AgentError::from)?;
    Ok(StatusCode::NO_CONTENT)
}
