//! `POST /v1/hosts`: a record for a machine, and the token by which it registers. The platform's are for administrators to make; a team's own
//! also for its owners and admins, when it may have such.

use api::v1::errors::ErrorBody;
use api::v1::hosts::{CreateHost, HostWithToken};
use axum::extract::State;
use http::StatusCode;
use model::access::Role;
use model::ids::{HostId, TeamId};
use store::hosts::{Created, NewHost};

use crate::app::App;
use crate::http::access::{PersonCaller, at_least};
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::http::idempotency::{IdempotencyKey, secret_bytes};
use crate::tokens;

const LABEL_CHARS_MAX: usize = 128;

#[utoipa::path(post, path = "/", tag = "hosts", request_body = CreateHost,
    responses((status = 201, body = HostWithToken), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 404, body = ErrorBody)))]
pub async fn create(
    State(app): State<App>,
    person: PersonCaller,
    repeat: IdempotencyKey,
    Json(body): Json<CreateHost>,
) -> Result<(StatusCode, axum::Json<HostWithToken>), ApiError> {
    let team = owner(&app, &person, &body).await?;
    for (field, label) in [("provider", &body.provider), ("availability_zone", &body.availability_zone)] {
        if label.as_ref().is_some_and(|l| l.chars().count() > LABEL_CHARS_MAX || l.chars().any(char::is_control)) {
            return Err(ApiError::invalid(field, "must have at most 128 printable characters"));
        }
    }
    let tags = super::tags::checked(body.tags.clone())?;
    let idempotency = repeat.of_person(person.user, "POST /v1/hosts", &body);
    let (token, token_hash) = tokens::registration_token(&secret_bytes(&app, idempotency.as_ref()));
    let actor = person.actor_in(team);
    let new = NewHost {
        id: HostId(uuid::Uuid::now_v7()),
        team,
        provider: body.provider,
        availability_zone: body.availability_zone,
        tags,
        created_by: actor.id.clone(),
        token_hash,
    };
    let store = app.store.clone();
    let created =
        super::super::detached(&app, async move { store.create_host(&new, idempotency.as_ref(), &actor).await });
    match created.await? {
        Created::Made(host) | Created::Repeated(host) => {
            Ok((StatusCode::CREATED, axum::Json(HostWithToken { host: super::shown(host), registration_token: token })))
        }
        Created::OtherArguments => Err(ApiError::idempotency_key_reused()),
        Created::NotByoc => Err(ApiError::not_byoc()),
        Created::TooMany => {
            Err(ApiError::quota_exceeded("the team has as many hosts of its own as it may have; remove some"))
        }
        Created::NoTeam => Err(ApiError::not_found("team")),
        Created::Gone => Err(ApiError::not_found("host")),
    }
}

/// Whose it is to be, if the caller may say so.
async fn owner(app: &App, person: &PersonCaller, body: &CreateHost) -> Result<Option<TeamId>, ApiError> {
    match (body.kind.as_str(), &body.team_id) {
        (super::REGULAR, _) if !person.is_admin => Err(ApiError::forbidden("only administrators may do this")),
        (super::REGULAR, None) => Ok(None),
        (super::REGULAR, Some(_)) => Err(ApiError::invalid("team_id", "is for type \"byoc\" alone")),
        (super::BYOC, None) => Err(ApiError::invalid("team_id", "is needed for type \"byoc\"")),
        (super::BYOC, Some(team)) => {
            let team = team.parse().map_err(|error| ApiError::invalid("team_id", format!("is {error}")))?;
            if !person.is_admin {
                let role = app.store.role_in(team, person.user).await?;
                at_least(Role::Admin, role.ok_or_else(|| ApiError::not_found("team"))?)?;
            }
            Ok(Some(team))
        }
        _ => Err(ApiError::invalid("type", "must be \"regular\" or \"byoc\"")),
    }
}
