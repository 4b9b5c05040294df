//! `DELETE /v1/api-keys/{id}`: the key opens nothing from now on. Repeated, it is 204 again.

use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use model::ids::ApiKeyId;

use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(delete, path = "/{id}", tag = "api-keys", params(("id" = String, Path)),
    responses((status = 204), (status = 400, body = ErrorBody)))]
pub async fn delete(State(app): State<App>, caller: Caller, Id(id): Id<ApiKeyId>) -> Result<StatusCode, ApiError> {
    let (store, actor) = (app.store.clone(), caller.actor());
    super::super::detached(&app, async move { store.delete_api_key(caller.team, id, &actor).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}
