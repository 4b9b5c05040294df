//! `PUT /v1/admin/users/{id}/admin`: who administers the platform. There is somebody at all times.

use api::v1::accounts::SetAdministrator;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use model::ids::UserId;

use crate::app::App;
use crate::http::access::Admin;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;

#[utoipa::path(put, path = "/{id}/admin", tag = "admin", params(("id" = String, Path)), request_body = SetAdministrator,
    responses((status = 204), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn set(
    State(app): State<App>,
    Admin(caller): Admin,
    Id(id): Id<UserId>,
    Json(body): Json<SetAdministrator>,
) -> Result<StatusCode, ApiError> {
    let (store, actor) = (app.store.clone(), caller.actor());
    let set = async move { store.set_administrator(id, body.admin, &actor).await };
    super::governed(&super::super::detached(&app, set).await?)
}
