//! `POST /v1/teams/{id}/members`: somebody who has an account joins as a member, and is told so.

use api::v1::errors::ErrorBody;
use api::v1::teams::{AddMember, Member};
use axum::extract::State;
use http::StatusCode;
use store::members::Added;

use super::super::links;
use crate::app::App;
use crate::http::access::MemberCaller;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::http::fields;
use crate::http::idempotency::IdempotencyKey;

#[utoipa::path(post, path = "/{id}/members", tag = "teams", params(("id" = String, Path)), request_body = AddMember,
    responses((status = 201, body = Member), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 404, body = ErrorBody)))]
pub async fn add(
    State(app): State<App>,
    caller: MemberCaller,
    repeat: IdempotencyKey,
    Json(body): Json<AddMember>,
) -> Result<(StatusCode, axum::Json<Member>), ApiError> {
    let key = repeat.of_person(caller.person.user, &format!("POST /v1/teams/{}/members", caller.team), &body);
    let email = fields::email(&body.email)?;
    let text = "You are in a team of Wrenn now. Log in and look at your teams.\n";
    let notice = links::notice(&app, &email, "You were added to a team", text);
    let (store, actor, team) = (app.store.clone(), caller.actor(), caller.team);
    let add = async move { store.add_member(team, &email, &notice, key.as_ref(), &actor).await };
    let member = match super::super::detached(&app, add).await? {
        Added::Made(member) | Added::Repeated(member) => member,
        Added::OtherArguments => return Err(ApiError::idempotency_key_reused()),
        Added::Gone => return Err(ApiError::not_found("member")),
        Added::Already => return Err(ApiError::already_a_member()),
        Added::NoTeam => return Err(ApiError::not_found("team")),
        Added::NoUser => return Err(ApiError::not_found("user")),
        Added::TooMany => return Err(ApiError::quota_exceeded("the team has as many members as it may have")),
    };
    app.outbox.hint();
    Ok((StatusCode::CREATED, axum::Json(super::shown_member(member))))
}
