//! `POST /v1/sandboxes/{id}/timeout`: a sandbox's time begins anew, that of running and that of being idle, with other lengths or another
//! end when that is asked for. Of one that is paused it begins with its resume.

use api::v1::errors::ErrorBody;
use api::v1::sandboxes::{Sandbox, SetTimeout};
use axum::extract::State;
use model::ids::SandboxId;
use store::wishes::Timed;

use super::create::policy;
use super::view::shown;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;

#[utoipa::path(post, path = "/{id}/timeout", tag = "sandboxes", params(("id" = String, Path)), request_body = SetTimeout,
    responses((status = 200, body = Sandbox), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody)))]
pub async fn timeout(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Json(body): Json<SetTimeout>,
) -> Result<axum::Json<Sandbox>, ApiError> {
    let change = policy(&app, body.timeout_sec, body.on_timeout.as_deref(), body.idle_timeout_sec, body.auto_resume)?;
    let (worker, actor, team) = (app.clone(), caller.actor(), caller.team);
    let set = super::super::detached(&app, async move { worker.store.set_policy(team, &id, &change, &actor).await });
    match set.await? {
        Timed::Set(sandbox) => Ok(axum::Json(shown(*sandbox))),
        Timed::Ended(status) => Err(ApiError::wrong_state("the sandbox has ended", status)),
        Timed::Missing => Err(ApiError::not_found("sandbox")),
    }
}
