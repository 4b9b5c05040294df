//! `DELETE /v1/snapshots/{name}`: from now on nothing begins with it. Sandboxes that did live on.

use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use model::shape::TemplateName;

use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(delete, path = "/{id}", tag = "snapshots", params(("id" = String, Path, description = "The snapshot's name.")),
    responses((status = 204), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn delete(
    State(app): State<App>,
    caller: Caller,
    Id(name): Id<TemplateName>,
) -> Result<StatusCode, ApiError> {
    let (worker, actor, team, wanted) = (app.clone(), caller.actor(), caller.team, name.clone());
    let deleted =
        super::super::detached(&app, async move { worker.store.delete_snapshot(team, &wanted, false, &actor).await });
    if deleted.await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    let is_published = app.store.snapshot_named(team, &name).await?.is_some_and(|snapshot| snapshot.is_published);
    if is_published || app.store.template_is_offered(team, name.as_str()).await? {
        return Err(ApiError::forbidden("it is a template of the platform"));
    }
    Err(ApiError::not_found("snapshot"))
}
