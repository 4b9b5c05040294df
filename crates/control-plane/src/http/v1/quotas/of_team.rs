//! `GET /v1/teams/{id}/quotas`: of any team, for administrators.

use api::v1::errors::ErrorBody;
use api::v1::quotas::Quotas;
use axum::extract::State;
use model::ids::TeamId;

use crate::app::App;
use crate::http::access::Admin;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/teams/{id}/quotas", tag = "quotas", params(("id" = String, Path)),
    responses((status = 200, body = Quotas), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn of_team(State(app): State<App>, _: Admin, Id(id): Id<TeamId>) -> Result<axum::Json<Quotas>, ApiError> {
    Ok(axum::Json(super::find(&app, id).await?))
}
