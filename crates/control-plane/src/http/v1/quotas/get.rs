//! `GET /v1/teams/self/quotas`: of the caller's own team.

use api::v1::errors::ErrorBody;
use api::v1::quotas::Quotas;
use axum::extract::State;

use crate::app::App;
use crate::http::access::Caller;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/teams/self/quotas", tag = "quotas",
    responses((status = 200, body = Quotas), (status = 401, body = ErrorBody)))]
pub async fn get(State(app): State<App>, caller: Caller) -> Result<axum::Json<Quotas>, ApiError> {
    Ok(axum::Json(super::find(&app, caller.team).await?))
}
