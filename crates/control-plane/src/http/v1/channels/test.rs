//! `POST /v1/channels/test`: tells `channel.test` there, now, without a channel. Why that failed is not told in detail: the answer must not
//! be a way to look around in the operator's network.

use std::time::Duration;

use api::v1::channels::{News, NewsActor, NewsResource, TestChannel, Tested};
use api::v1::errors::ErrorBody;
use axum::extract::State;
use chrono::Utc;
use uuid::Uuid;

use super::super::auth::Attempts;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::secrets::random_32;

/// Of a team: nobody is to be flooded from here.
const TESTS: Attempts = Attempts { what: "channel test", max: 20, window: Duration::from_secs(60) };

#[utoipa::path(post, path = "/test", tag = "channels", request_body = TestChannel,
    responses((status = 200, body = Tested), (status = 400, body = ErrorBody), (status = 502, body = ErrorBody)))]
pub async fn test(
    State(app): State<App>,
    caller: Caller,
    Json(body): Json<TestChannel>,
) -> Result<axum::Json<Tested>, ApiError> {
    let provider = super::provider(&body.provider)?;
    let (config, _) = super::whole(provider, body.config, random_32())?;
    TESTS.count(&app, &caller.team.to_string()).await?;
    let id = Uuid::new_v4();
    let kind = if caller.user().is_some() { "user" } else { "api_key" };
    let actor = NewsActor { kind: kind.to_owned(), id: None, name: None };
    let news = News {
        event: "channel.test".to_owned(),
        timestamp: Utc::now(),
        team_id: "test".to_owned(),
        actor,
        resource: NewsResource { id: "test".to_owned(), kind: "channel".to_owned() },
    };
    let request = provider.request(&config, id, &news).ok_or_else(ApiError::internal)?;
    app.guarded.call(request).await.map_err(|cause| {
        tracing::info!(provider = provider.as_str(), "a test of a channel failed: {cause}");
        ApiError::delivery_failed()
    })?;
    Ok(axum::Json(Tested { status: "ok".to_owned() }))
}
