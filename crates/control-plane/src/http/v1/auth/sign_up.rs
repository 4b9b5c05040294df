//! `POST /v1/auth/signup`: an account, which a link that is sent to its address activates. With an invitation to that address it is active
//! at once, and in the team.

use api::v1::accounts::{LoggedIn, Message, SignUp};
use api::v1::errors::ErrorBody;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use model::ids::UserId;
use store::account_tokens::Purpose;
use store::audit::{Actor, ActorKind};
use store::users::{NewUser, SignedUp};

use super::super::links;
use super::MAIL;
use crate::app::App;
use crate::http::access::RequestId;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::http::fields;
use crate::{passwords, tokens};

pub const NAME_CHARS_MAX: usize = 100;

#[utoipa::path(post, path = "/signup", tag = "auth", request_body = SignUp, security(()),
    responses((status = 200, description = "with an invitation", body = LoggedIn), (status = 201, body = Message),
        (status = 400, body = ErrorBody), (status = 403, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 429, body = ErrorBody)))]
pub async fn sign_up(
    State(app): State<App>,
    RequestId(request_id): RequestId,
    Json(body): Json<SignUp>,
) -> Result<Response, ApiError> {
    if !app.accounts.is_signup_open && body.invitation.is_none() {
        return Err(ApiError::signup_closed());
    }
    let email = fields::email(&body.email)?;
    let name = fields::display_name("name", &body.name, NAME_CHARS_MAX)?;
    fields::new_password("password", &body.password)?;
    MAIL.count(&app, &email).await?;
    let password_hash = passwords::hash_in_time(&body.password).await.ok_or_else(ApiError::unavailable)?;
    let new = NewUser { id: UserId(uuid::Uuid::now_v7()), email, name, password_hash: Some(password_hash) };
    let actor = Actor { kind: ActorKind::User, id: new.id.to_string(), team: None, request_id: request_id.clone() };
    match body.invitation {
        Some(token) => invited(&app, new, &token, actor, &request_id).await,
        None => uninvited(&app, new, actor).await,
    }
}

async fn uninvited(app: &App, new: NewUser, actor: Actor) -> Result<Response, ApiError> {
    let (link, token) = links::account_link(app, new.id, Purpose::Activation);
    let mail = links::mail(app, &new.email, Purpose::Activation, &link);
    let store = app.store.clone();
    let signed_up = super::super::detached(app, async move {
        let signed_up = store.sign_up(&new, &token, &mail, &actor).await?;
        let _ = crashpoint::hit("cp.sign_up.written");
        Ok(signed_up)
    });
    match signed_up.await? {
        SignedUp::Made => app.outbox.hint(),
        SignedUp::EmailTaken => return Err(ApiError::email_taken()),
        SignedUp::Cooldown => return Err(ApiError::signup_cooldown()),
    }
    let message = "a link was sent to this address; follow it within 30 minutes".to_owned();
    Ok((StatusCode::CREATED, axum::Json(Message { message })).into_response())
}

async fn invited(app: &App, new: NewUser, token: &str, actor: Actor, request_id: &str) -> Result<Response, ApiError> {
    let hash = tokens::opaque_hash(token).ok_or_else(ApiError::invalid_token)?;
    let (store, id) = (app.store.clone(), new.id);
    let accepted = super::super::detached(app, async move { store.sign_up_invited(&hash, &new, &actor).await }).await?;
    super::super::invitations::joined(accepted)?;
    let user = app.store.user(id).await?.ok_or_else(ApiError::unauthorized)?;
    super::logged_in(app, &user, false, request_id).await
}
