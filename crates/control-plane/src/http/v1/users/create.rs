//! `POST /v1/admin/users`: an account for somebody, who sets the password by the link that is sent, and that the answer has as well.

use api::v1::accounts::{CreateUser, Link};
use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use model::ids::UserId;
use store::account_tokens::Purpose;
use store::users::{NewUser, SignedUp};

use super::super::auth::NAME_CHARS_MAX;
use super::super::links;
use crate::app::App;
use crate::http::access::Admin;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::http::fields;

#[utoipa::path(post, path = "/", tag = "admin", request_body = CreateUser,
    responses((status = 201, body = Link), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn create(
    State(app): State<App>,
    Admin(caller): Admin,
    Json(body): Json<CreateUser>,
) -> Result<(StatusCode, axum::Json<Link>), ApiError> {
    let email = fields::email(&body.email)?;
    let name = fields::display_name("name", &body.name, NAME_CHARS_MAX)?;
    let new = NewUser { id: UserId(uuid::Uuid::now_v7()), email: email.clone(), name, password_hash: None };
    let (link, token) = links::account_link(&app, new.id, Purpose::Activation);
    let mail = links::mail(&app, &email, Purpose::Activation, &link);
    let (store, actor, user) = (app.store.clone(), caller.actor(), new.id);
    match super::super::detached(&app, async move { store.sign_up(&new, &token, &mail, &actor).await }).await? {
        SignedUp::Made => app.outbox.hint(),
        SignedUp::EmailTaken => return Err(ApiError::email_taken()),
        SignedUp::Cooldown => return Err(ApiError::signup_cooldown()),
    }
    let link = super::link::shown(user, Purpose::Activation, link);
    Ok((StatusCode::CREATED, axum::Json(link)))
}
