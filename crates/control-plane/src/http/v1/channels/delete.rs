//! `DELETE /v1/channels/{id}`: nothing is told there any more, nor what still waits to be.

use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use model::ids::ChannelId;

use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(delete, path = "/{id}", tag = "channels", params(("id" = String, Path)),
    responses((status = 204), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn delete(State(app): State<App>, caller: Caller, Id(id): Id<ChannelId>) -> Result<StatusCode, ApiError> {
    let (store, actor) = (app.store.clone(), caller.actor());
    let deleted = super::super::detached(&app, async move { store.delete_channel(caller.team, id, &actor).await });
    if deleted.await? { Ok(StatusCode::NO_CONTENT) } else { Err(ApiError::not_found("channel")) }
}
