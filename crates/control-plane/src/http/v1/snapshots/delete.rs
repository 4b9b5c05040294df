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
    if deleted(&app, &caller, &name, false).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    let team = caller.team;
    let is_published = app.store.snapshot_named(team, &name).await?.is_some_and(|snapshot| snapshot.is_published);
    if is_published || app.store.template_is_offered(team, name.as_str()).await? {
        return Err(ApiError::forbidden("it is a template of the platform"));
    }
    Err(ApiError::not_found("snapshot"))
}

/// Of the caller's team; one that is published, or one that is not. False: there is none.
pub async fn deleted(app: &App, caller: &Caller, name: &TemplateName, is_published: bool) -> Result<bool, ApiError> {
    let (worker, actor, team, wanted) = (app.clone(), caller.actor(), caller.team, name.clone());
    let deletion = async move { worker.store.delete_snapshot(team, &wanted, is_published, &actor).await };
    super::super::detached(app, deletion).await
}
