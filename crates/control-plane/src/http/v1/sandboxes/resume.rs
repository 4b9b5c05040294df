//! `POST /v1/sandboxes/{id}/resume`: a paused sandbox runs again, where it stood. 200: it runs. 202: it is still under way. A resume that
//! does not come about leaves it paused, with all that it was. Repeated, it is the same again.

use api::v1::errors::ErrorBody;
use api::v1::sandboxes::{Sandbox, Wait};
use axum::extract::State;
use http::StatusCode;
use model::ids::SandboxId;
use model::sandbox::Status;
use store::wishes::ResumeOf;
use tokio::time::Instant;

use super::create::waiting;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Query};
use crate::http::errors::ApiError;
use crate::wake;

const WAIT_DEFAULT_SEC: u32 = 4;

#[utoipa::path(post, path = "/{id}/resume", tag = "sandboxes", params(("id" = String, Path), Wait),
    responses((status = 200, body = Sandbox), (status = 202, body = Sandbox), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn resume(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Query(wait): Query<Wait>,
) -> Result<(StatusCode, axum::Json<Sandbox>), ApiError> {
    let deadline = Instant::now() + waiting(&wait, WAIT_DEFAULT_SEC)?;
    let wished = wake::wish(&app, caller.team, &id, ResumeOf::Wish, &caller.actor()).await?;
    super::turned(&app, &caller, &id, wished, Status::Running, deadline).await
}
