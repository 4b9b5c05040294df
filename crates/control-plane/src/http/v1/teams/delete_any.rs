//! `DELETE /v1/admin/teams/{id}`: a team with all that is in it. Its own hosts are removed as by force;
//! its sandboxes elsewhere are killed, and its snapshots removed, behind the answer.

use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use model::ids::TeamId;

use crate::app::App;
use crate::http::access::Admin;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(delete, path = "/{id}", tag = "admin", params(("id" = String, Path)),
    responses((status = 204), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn delete(State(app): State<App>, Admin(caller): Admin, Id(id): Id<TeamId>) -> Result<StatusCode, ApiError> {
    let (store, actor) = (app.store.clone(), caller.actor());
    let deleted = super::super::detached(&app, async move { store.delete_team_with_all(id, &actor).await }).await?;
    super::deleted(&deleted)
}
