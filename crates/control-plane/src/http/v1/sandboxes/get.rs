//! `GET /v1/sandboxes/{id}`: in any state, also when it has ended.

use api::v1::errors::ErrorBody;
use api::v1::sandboxes::Sandbox;
use axum::extract::State;
use model::ids::SandboxId;

use super::view::shown;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/{id}", tag = "sandboxes", params(("id" = String, Path)),
    responses((status = 200, body = Sandbox), (status = 404, body = ErrorBody)))]
pub async fn get(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
) -> Result<axum::Json<Sandbox>, ApiError> {
    Ok(axum::Json(shown(super::find(&app, &caller, &id).await?)))
}
