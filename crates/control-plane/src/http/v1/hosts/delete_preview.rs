//! `GET /v1/hosts/{id}/delete-preview`: what would be lost if the host were removed with force. Of each kind the oldest hundred are named;
//! `host.held` counts all.

use api::v1::errors::ErrorBody;
use api::v1::hosts::{DeletePreview, OnHost};
use axum::extract::State;
use model::ids::HostId;

use crate::app::App;
use crate::http::access::HostsCaller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/{id}/delete-preview", tag = "hosts", params(("id" = String, Path)),
    responses((status = 200, body = DeletePreview), (status = 404, body = ErrorBody)))]
pub async fn delete_preview(
    State(app): State<App>,
    _: HostsCaller,
    Id(id): Id<HostId>,
) -> Result<axum::Json<DeletePreview>, ApiError> {
    let host = super::find(&app, id).await?;
    let losses = app.store.losses_of_host(id).await?;
    let on_host = |(id, status): &(model::ids::SandboxId, model::sandbox::Status)| OnHost {
        id: id.to_string(),
        status: status.as_str().to_owned(),
    };
    Ok(axum::Json(DeletePreview {
        sandbox_ids: losses.sandboxes.iter().map(|(id, _)| id.to_string()).collect(),
        sandboxes: losses.sandboxes.iter().map(on_host).collect(),
        snapshots: losses.snapshots,
        unclaimed: host.unclaimed.clone(),
        host: super::shown(host),
    }))
}
