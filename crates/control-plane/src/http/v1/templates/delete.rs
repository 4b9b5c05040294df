//! `DELETE /v1/admin/templates/{name}`: from now on nothing begins with it. Sandboxes that did live on. What the hosts have as images is theirs.

use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use model::shape::TemplateName;

use super::super::snapshots::delete::deleted;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(delete, path = "/{id}", tag = "admin", params(("id" = String, Path, description = "The template's name.")),
    responses((status = 204), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn delete(
    State(app): State<App>,
    caller: Caller,
    Id(name): Id<TemplateName>,
) -> Result<StatusCode, ApiError> {
    if deleted(&app, &caller, &name, true).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    if app.store.template_is_offered(caller.team, name.as_str()).await? {
        return Err(ApiError::forbidden("it is an image on the hosts"));
    }
    Err(ApiError::not_found("template"))
}
