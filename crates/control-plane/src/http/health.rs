//! Whether this replica lives, and whether it should get requests. Two questions: a replica that has no database should get none, and
//! ending it would help nobody.

use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use serde_json::json;

use super::errors::ApiError;
use crate::app::App;

/// 200 for as long as this program answers at all.
pub async fn live() -> Response {
    axum::Json(json!({ "status": "ok", "version": env!("CARGO_PKG_VERSION") })).into_response()
}

/// 200 when this replica should get requests: the database answers, and nobody has told it to end. 503 with the cause otherwise.
pub async fn ready(State(app): State<App>) -> Response {
    if app.drain.is_cancelled() {
        return ApiError::ending().into_response();
    }
    match app.store.ping().await {
        Ok(()) => live().await,
        Err(error) => ApiError::from(error).into_response(),
    }
}
