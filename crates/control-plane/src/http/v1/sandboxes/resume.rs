//! `POST /v1/sandboxes/{id}/resume`: a paused sandbox runs again, where it stood. 200: it runs. 202: it is still under way. A resume that
//! does not come about leaves it paused, with all that it was. Repeated, it is the same again.

use api::v1::errors::ErrorBody;
use api::v1::sandboxes::{Sandbox, Wait};
use axum::extract::State;
use http::StatusCode;
use model::ids::SandboxId;
use model::sandbox::Status;
use store::sandboxes::{ResumeOf, Turned};
use tokio::time::Instant;

use super::create::waiting;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Query};
use crate::http::errors::ApiError;
use crate::reconcile::driver;

const WAIT_DEFAULT_SEC: u32 = 4;

#[utoipa::path(post, path = "/{id}/resume", tag = "sandboxes", params(("id" = String, Path), Wait),
    responses((status = 200, body = Sandbox), (status = 202, body = Sandbox), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn resume(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Query(wait): Query<Wait>,
) -> Result<(StatusCode, axum::Json<Sandbox>), ApiError> {
    let deadline = Instant::now() + waiting(&wait, WAIT_DEFAULT_SEC)?;
    let (worker, actor, of, team) = (app.clone(), caller.actor(), id.clone(), caller.team);
    let wished = super::super::detached(&app, async move {
        let wished = worker.store.wish_resumed(team, &of, ResumeOf::Wish, &worker.lease(), &actor).await?;
        let _ = crashpoint::hit("cp.resume.written");
        if let Turned::Opened(operation) = &wished {
            driver::work(&worker, operation.clone(), None);
        }
        Ok(wished)
    });
    super::turned(&app, &caller, &id, wished.await?, Status::Running, deadline).await
}
