//! `GET /v1/channels/{id}`: one, with how its last delivery went.

use api::v1::channels::Channel;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use model::ids::ChannelId;

use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/{id}", tag = "channels", params(("id" = String, Path)),
    responses((status = 200, body = Channel), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn get(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<ChannelId>,
) -> Result<axum::Json<Channel>, ApiError> {
    let channel = app.store.channel(caller.team, id).await?.ok_or_else(|| ApiError::not_found("channel"))?;
    Ok(axum::Json(super::shown(channel, None)))
}
