//! `PUT /v1/admin/users/{id}/active`: a person is put out, with sessions and keys, or may come back.

use api::v1::accounts::SetActive;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use model::ids::UserId;

use crate::app::App;
use crate::http::access::Admin;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;

#[utoipa::path(put, path = "/{id}/active", tag = "admin", params(("id" = String, Path)), request_body = SetActive,
    responses((status = 204), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn set(
    State(app): State<App>,
    Admin(caller): Admin,
    Id(id): Id<UserId>,
    Json(body): Json<SetActive>,
) -> Result<StatusCode, ApiError> {
    super::is_other(&caller, id)?;
    let (store, actor) = (app.store.clone(), caller.actor());
    let set = async move { store.set_active(id, body.active, &actor).await };
    super::governed(&super::super::detached(&app, set).await?)
}
