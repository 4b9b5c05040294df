//! `PUT /v1/channels/{id}/config`: all that it is reached by, anew. A secret that is made for it is told in the answer, once.

use api::v1::channels::{Channel, SetConfig};
use api::v1::errors::ErrorBody;
use axum::extract::State;
use model::ids::ChannelId;
use store::channels::Changed;

use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;
use crate::secrets::random_32;

#[utoipa::path(put, path = "/{id}/config", tag = "channels", params(("id" = String, Path)), request_body = SetConfig,
    responses((status = 200, body = Channel), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn set(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<ChannelId>,
    Json(body): Json<SetConfig>,
) -> Result<axum::Json<Channel>, ApiError> {
    let channel = app.store.channel(caller.team, id).await?.ok_or_else(|| ApiError::not_found("channel"))?;
    let (config, secret) = super::whole(super::provider(&channel.provider)?, body.config, random_32())?;
    let sealed = super::sealed(&app, id, &config);
    let (store, actor) = (app.store.clone(), caller.actor());
    let set =
        super::super::detached(&app, async move { store.set_channel_config(caller.team, id, &sealed, &actor).await });
    match set.await? {
        Changed::Done(channel) => Ok(axum::Json(super::shown(channel, secret))),
        Changed::NameTaken | Changed::Missing => Err(ApiError::not_found("channel")),
    }
}
