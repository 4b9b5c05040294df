//! `POST /v1/teams/{id}/invitations`: an offer to join, sent to an address. It takes the place of an open one to the same address.

use api::v1::errors::ErrorBody;
use api::v1::teams::{Invitation, Invite};
use axum::extract::State;
use chrono::{TimeDelta, Utc};
use http::StatusCode;
use model::access::Role;
use model::ids::InvitationId;
use store::invitations::{Invited, NewInvitation};

use super::super::links;
use crate::app::App;
use crate::http::access::MemberCaller;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::http::fields;
use crate::http::idempotency::{IdempotencyKey, secret_bytes};
use crate::{mail, tokens};

/// Long enough for a holiday.
const LIFE: TimeDelta = TimeDelta::days(7);

#[utoipa::path(post, path = "/{id}/invitations", tag = "teams", params(("id" = String, Path)), request_body = Invite,
    responses((status = 201, body = Invitation), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 404, body = ErrorBody)))]
pub async fn create(
    State(app): State<App>,
    caller: MemberCaller,
    repeat: IdempotencyKey,
    Json(body): Json<Invite>,
) -> Result<(StatusCode, axum::Json<Invitation>), ApiError> {
    let email = fields::email(&body.email)?;
    let role: Role =
        body.role.as_deref().unwrap_or("member").parse().map_err(|error| ApiError::invalid("role", error))?;
    let key = repeat.of_person(caller.person.user, &format!("POST /v1/teams/{}/invitations", caller.team), &body);
    let (token, token_hash) = tokens::opaque(&secret_bytes(&app, key.as_ref()));
    let new = NewInvitation {
        id: InvitationId(uuid::Uuid::now_v7()),
        team: caller.team,
        email,
        role,
        token_hash,
        by: caller.person.user,
        expires_at: Utc::now() + LIFE,
    };
    let (store, actor) = (app.store.clone(), caller.actor());
    let url = links::page_url(&app, "join", &token);
    let text = format!("You are invited to a team of Wrenn. To join, follow this link within seven days: {url}\n");
    let mail = mail::outgoing(&app.secret, &new.email, "You are invited to a team", &text, new.expires_at);
    let invited =
        super::super::detached(&app, async move { store.invite(&new, &mail, key.as_ref(), &actor).await }).await?;
    let invitation = match invited {
        Invited::Made(invitation) | Invited::Repeated(invitation) => invitation,
        Invited::OtherArguments => return Err(ApiError::idempotency_key_reused()),
        Invited::Gone => return Err(ApiError::not_found("invitation")),
        Invited::Already => return Err(ApiError::already_a_member()),
        Invited::Forbidden => return Err(ApiError::forbidden("only an owner decides about owners")),
        Invited::TooMany => {
            return Err(ApiError::quota_exceeded("the team has as many open invitations as it may have"));
        }
        Invited::Missing => return Err(ApiError::not_found("team")),
    };
    app.outbox.hint();
    // Whoever has the token can show that the address is theirs: only who can do that anyway sees it.
    let token = caller.person.is_admin.then_some(token);
    Ok((StatusCode::CREATED, axum::Json(super::shown(invitation, token))))
}
