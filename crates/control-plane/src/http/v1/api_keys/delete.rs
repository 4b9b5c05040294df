//! `DELETE /v1/api-keys/{id}`: the key opens nothing from now on. Repeated, it is 204 again. A member removes their own keys, an admin of
//! the team everybody's.

use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use model::access::Role;
use model::ids::ApiKeyId;
use store::api_keys::Removed;

use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(delete, path = "/{id}", tag = "api-keys", params(("id" = String, Path)),
    responses((status = 204), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody)))]
pub async fn delete(State(app): State<App>, caller: Caller, Id(id): Id<ApiKeyId>) -> Result<StatusCode, ApiError> {
    let (store, actor) = (app.store.clone(), caller.actor());
    let own_only = caller.user().filter(|_| caller.role == Some(Role::Member));
    let delete = async move { store.delete_api_key(caller.team, id, own_only, &actor).await };
    match super::super::detached(&app, delete).await? {
        Removed::Done | Removed::Missing => Ok(StatusCode::NO_CONTENT),
        Removed::NotOwn => Err(ApiError::forbidden("a member removes no keys but their own")),
    }
}
