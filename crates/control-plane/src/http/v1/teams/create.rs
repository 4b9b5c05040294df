//! `POST /v1/teams`: a team whose owner is the caller.

use api::v1::errors::ErrorBody;
use api::v1::teams::{Team, TeamName};
use axum::extract::State;
use http::StatusCode;
use model::access::Role;
use model::ids::TeamId;
use store::teams::Created;

use crate::app::App;
use crate::http::access::PersonCaller;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::http::fields;
use crate::http::idempotency::IdempotencyKey;

#[utoipa::path(post, path = "/", tag = "teams", request_body = TeamName,
    responses((status = 201, body = Team), (status = 400, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub async fn create(
    State(app): State<App>,
    person: PersonCaller,
    repeat: IdempotencyKey,
    Json(body): Json<TeamName>,
) -> Result<(StatusCode, axum::Json<Team>), ApiError> {
    let key = repeat.of_person(person.user, "POST /v1/teams", &body);
    let name = fields::team_name(&body.name)?;
    let (store, actor) = (app.store.clone(), person.actor());
    let id = TeamId(uuid::Uuid::now_v7());
    let create = async move { store.create_team(id, &name, person.user, key.as_ref(), &actor).await };
    let team = match super::super::detached(&app, create).await? {
        Created::Made(team) | Created::Repeated(team) => team,
        Created::OtherArguments => return Err(ApiError::idempotency_key_reused()),
        Created::TooMany => return Err(ApiError::quota_exceeded("this person is in as many teams as one may be in")),
        Created::Gone => return Err(ApiError::not_found("team")),
    };
    Ok((StatusCode::CREATED, axum::Json(super::shown(team, Role::Owner))))
}
