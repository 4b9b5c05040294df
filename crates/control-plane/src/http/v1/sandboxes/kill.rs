//! `DELETE /v1/sandboxes/{id}`: ends a sandbox for good. 204: nothing of it is left. 202: the wish stands, and its host cannot be reached
//! yet. Repeated, it is the same again.

use api::v1::errors::ErrorBody;
use api::v1::sandboxes::{Sandbox, Wait};
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use model::ids::SandboxId;
use model::sandbox::Status;
use store::wishes::KillWish;
use tokio::time::Instant;

use super::create::waiting;
use super::view::shown;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Query};
use crate::http::errors::ApiError;
use crate::reconcile::driver;

const WAIT_DEFAULT_SEC: u32 = 30;

#[utoipa::path(delete, path = "/{id}", tag = "sandboxes", params(("id" = String, Path), Wait),
    responses((status = 204), (status = 202, body = Sandbox), (status = 404, body = ErrorBody)))]
pub async fn kill(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Query(wait): Query<Wait>,
) -> Result<Response, ApiError> {
    let deadline = Instant::now() + waiting(&wait, WAIT_DEFAULT_SEC)?;
    let (worker, actor, of, team) = (app.clone(), caller.actor(), id.clone(), caller.team);
    let wished = super::super::detached(&app, async move {
        let wished = worker.store.wish_killed(team, &of, &worker.lease(), &actor).await?;
        let _ = crashpoint::hit("cp.kill.written");
        if let KillWish::Opened(operation) = &wished {
            driver::work(&worker, operation.clone(), None);
        }
        Ok(wished)
    });
    let operation = match wished.await? {
        KillWish::Opened(operation) => operation.id,
        KillWish::UnderWay(operation) => operation,
        KillWish::Ended => return Ok(StatusCode::NO_CONTENT.into_response()),
        KillWish::Missing => return Err(ApiError::not_found("sandbox")),
    };
    app.outcomes.wait(operation, deadline).await?;
    let sandbox = super::find(&app, &caller, &id).await?;
    if sandbox.status() == Status::Stopped {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    Ok((StatusCode::ACCEPTED, axum::Json(shown(sandbox))).into_response())
}
