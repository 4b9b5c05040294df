//! `POST /v1/channels`: the team is told of these events there from now on.

use api::v1::channels::{Channel, CreateChannel};
use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use model::ids::ChannelId;
use store::channels::{Created, NewChannel};

use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::http::idempotency::{IdempotencyKey, secret_bytes};

#[utoipa::path(post, path = "/", tag = "channels", request_body = CreateChannel,
    responses((status = 201, body = Channel), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 429, body = ErrorBody)))]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    repeat: IdempotencyKey,
    Json(body): Json<CreateChannel>,
) -> Result<(StatusCode, axum::Json<Channel>), ApiError> {
    let key = repeat.scoped(&caller, "POST /v1/channels", &body);
    let name = super::name(&body.name)?;
    let provider = super::provider(&body.provider)?;
    let events = super::events(&body.events)?;
    let (config, secret) = super::whole(provider, body.config, secret_bytes(&app, key.as_ref()))?;
    let id = ChannelId(uuid::Uuid::now_v7());
    let new = NewChannel {
        id,
        team: caller.team,
        name: name.clone(),
        provider: provider.as_str().to_owned(),
        config: super::sealed(&app, id, &config),
        events,
    };
    let (store, actor) = (app.store.clone(), caller.actor());
    let created = super::super::detached(&app, async move { store.create_channel(&new, key.as_ref(), &actor).await });
    match created.await? {
        Created::Made(channel) | Created::Repeated(channel) => {
            Ok((StatusCode::CREATED, axum::Json(super::shown(channel, secret))))
        }
        Created::OtherArguments => Err(ApiError::idempotency_key_reused()),
        Created::Gone => Err(ApiError::not_found("channel")),
        Created::NameTaken => Err(ApiError::channel_name_taken(&name)),
        Created::TooMany => Err(ApiError::quota_exceeded("the team has as many channels as it may have; delete some")),
        Created::NoTeam => Err(ApiError::not_found("team")),
    }
}
