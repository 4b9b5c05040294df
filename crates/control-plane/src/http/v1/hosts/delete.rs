//! `DELETE /v1/hosts/{id}`: the host's credential opens nothing from now on. A host with sandboxes or snapshots goes only with
//! `force=true`, which counts them as killed and deleted; `wrenn-agent --stop-all` on the machine ends what runs there.

use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use model::ids::HostId;
use serde::Deserialize;
use store::hosts::Deleted;
use utoipa::IntoParams;

use crate::app::App;
use crate::http::access::HostsCaller;
use crate::http::body::{Id, Query};
use crate::http::errors::ApiError;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Force {
    /// Also with sandboxes or snapshots on it.
    #[serde(default)]
    force: bool,
}

#[utoipa::path(delete, path = "/{id}", tag = "hosts", params(("id" = String, Path), Force),
    responses((status = 204), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn delete(
    State(app): State<App>,
    caller: HostsCaller,
    Id(id): Id<HostId>,
    Query(force): Query<Force>,
) -> Result<StatusCode, ApiError> {
    let (store, actor) = (app.store.clone(), caller.actor());
    match super::super::detached(&app, async move { store.delete_host(id, force.force, &actor).await }).await? {
        Deleted::Done => Ok(StatusCode::NO_CONTENT),
        Deleted::Missing => Err(ApiError::not_found("host")),
        Deleted::Holds(losses) => {
            let sandboxes = losses.sandboxes.iter().map(|(id, _)| id.to_string()).collect();
            Err(ApiError::host_has_sandboxes(sandboxes, losses.snapshots))
        }
    }
}
