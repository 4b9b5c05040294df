//! `PATCH /v1/channels/{id}`: another name, other events.

use api::v1::channels::{Channel, UpdateChannel};
use api::v1::errors::ErrorBody;
use axum::extract::State;
use model::ids::ChannelId;
use store::channels::Changed;

use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;

#[utoipa::path(patch, path = "/{id}", tag = "channels", params(("id" = String, Path)), request_body = UpdateChannel,
    responses((status = 200, body = Channel), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody)))]
pub async fn update(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<ChannelId>,
    Json(body): Json<UpdateChannel>,
) -> Result<axum::Json<Channel>, ApiError> {
    let name = body.name.as_deref().map(super::name).transpose()?;
    let events = body.events.as_deref().map(super::events).transpose()?;
    if name.is_none() && events.is_none() {
        return Err(ApiError::invalid("", "nothing is to be changed: give name or events"));
    }
    let (store, actor, wanted) = (app.store.clone(), caller.actor(), name.clone());
    let updated = super::super::detached(&app, async move {
        store.update_channel(caller.team, id, wanted.as_deref(), events.as_deref(), &actor).await
    });
    match updated.await? {
        Changed::Done(channel) => Ok(axum::Json(super::shown(channel, None))),
        Changed::NameTaken => Err(ApiError::channel_name_taken(name.as_deref().unwrap_or_default())),
        Changed::Missing => Err(ApiError::not_found("channel")),
    }
}
