//! `POST /v1/sandboxes/{id}/pause`: saves a running sandbox, with its memory or its disk alone, and ends its microVM. 200: it is paused,
//! and costs no memory. 202: it is still under way. A pause that does not come about leaves it running. Repeated, it is the same again.

use api::v1::errors::ErrorBody;
use api::v1::sandboxes::{Pause, Sandbox, Wait};
use axum::extract::State;
use http::StatusCode;
use model::ids::SandboxId;
use model::sandbox::{Kept, Status};
use store::wishes::Turned;
use tokio::time::Instant;

use super::create::waiting;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, OptionalJson, Query};
use crate::http::errors::ApiError;
use crate::reconcile::driver;

const WAIT_DEFAULT_SEC: u32 = 30;

#[utoipa::path(post, path = "/{id}/pause", tag = "sandboxes", params(("id" = String, Path), Wait), request_body = Pause,
    responses((status = 200, body = Sandbox), (status = 202, body = Sandbox), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn pause(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Query(wait): Query<Wait>,
    OptionalJson(body): OptionalJson<Pause>,
) -> Result<(StatusCode, axum::Json<Sandbox>), ApiError> {
    let deadline = Instant::now() + waiting(&wait, WAIT_DEFAULT_SEC)?;
    let kept = if body.memory.unwrap_or(true) { Kept::Memory } else { Kept::Disk };
    let (worker, actor, of, team) = (app.clone(), caller.actor(), id.clone(), caller.team);
    let wished = super::super::detached(&app, async move {
        let wished = worker.store.wish_paused(team, &of, kept, &worker.lease(), &actor).await?;
        let _ = crashpoint::hit("cp.pause.written");
        if let Turned::Opened(operation) = &wished {
            driver::work(&worker, operation.clone(), None);
        }
        Ok(wished)
    });
    super::turned(&app, &caller, &id, wished.await?, Status::Paused, deadline).await
}
