//! `PATCH /v1/sandboxes/{id}`: gives a sandbox other metadata: names that are given have their values from now on, those whose value is null
//! are gone, and all others stay.

use api::v1::errors::ErrorBody;
use api::v1::sandboxes::{ChangeSandbox, Sandbox};
use axum::extract::State;
use model::ids::SandboxId;
use store::sandboxes::Relabelled;

use super::create::{METADATA_MAX, metadata_pair};
use super::view::shown;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;

#[utoipa::path(patch, path = "/{id}", tag = "sandboxes", params(("id" = String, Path)), request_body = ChangeSandbox,
    responses((status = 200, body = Sandbox), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody)))]
pub async fn relabel(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Json(body): Json<ChangeSandbox>,
) -> Result<axum::Json<Sandbox>, ApiError> {
    let change = body.metadata;
    // As many that go as there may be, and as many that come.
    if change.is_empty() || change.len() > 2 * METADATA_MAX {
        return Err(ApiError::invalid("metadata", format!("must name 1 to {} pairs", 2 * METADATA_MAX)));
    }
    change.iter().try_for_each(|(name, value)| metadata_pair(name, value.as_deref()))?;
    let (store, actor, team) = (app.store.clone(), caller.actor(), caller.team);
    let relabel = async move { store.relabel_sandbox(team, &id, &change, METADATA_MAX, &actor).await };
    match super::super::detached(&app, relabel).await? {
        Relabelled::Done(sandbox) => Ok(axum::Json(shown(*sandbox))),
        Relabelled::TooMany => Err(ApiError::invalid("metadata", format!("would have more than {METADATA_MAX} pairs"))),
        Relabelled::Ended(status) => Err(ApiError::wrong_state("the sandbox has ended", status)),
        Relabelled::Missing => Err(ApiError::not_found("sandbox")),
    }
}
