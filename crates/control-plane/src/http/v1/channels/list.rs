//! `GET /v1/channels`: the team's, oldest first, without what they are reached by.

use api::v1::channels::Channel;
use axum::extract::State;

use crate::app::App;
use crate::http::access::Caller;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/", tag = "channels", responses((status = 200, body = Vec<Channel>)))]
pub async fn list(State(app): State<App>, caller: Caller) -> Result<axum::Json<Vec<Channel>>, ApiError> {
    let channels = app.store.channels(caller.team).await?;
    Ok(axum::Json(channels.into_iter().map(|channel| super::shown(channel, None)).collect()))
}
