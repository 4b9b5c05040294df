//! `GET /v1/api-keys`: the team's keys, without what opens anything.

use api::v1::errors::ErrorBody;
use api::v1::keys::ApiKey;
use axum::extract::State;

use crate::app::App;
use crate::http::access::Caller;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/", tag = "api-keys",
    responses((status = 200, body = Vec<ApiKey>), (status = 401, body = ErrorBody)))]
pub async fn list(State(app): State<App>, caller: Caller) -> Result<axum::Json<Vec<ApiKey>>, ApiError> {
    let keys = app.store.api_keys(caller.team).await?;
    Ok(axum::Json(keys.into_iter().map(|key| super::shown(key, None)).collect()))
}
