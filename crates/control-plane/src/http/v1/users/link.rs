//! `POST /v1/admin/users/{id}/link`: what would be sent to a person, for an administrator to hand on: where there is no mail, or it got lost.

use api::v1::accounts::Link;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use model::ids::UserId;
use store::account_tokens::Purpose;
use store::users::UserStatus;

use super::super::links;
use crate::app::App;
use crate::http::access::Admin;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(post, path = "/{id}/link", tag = "admin", params(("id" = String, Path)),
    responses((status = 201, body = Link), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn link(
    State(app): State<App>,
    Admin(caller): Admin,
    Id(id): Id<UserId>,
) -> Result<(StatusCode, axum::Json<Link>), ApiError> {
    let user = app.store.user(id).await?.ok_or_else(|| ApiError::not_found("user"))?;
    let purpose = match user.status {
        UserStatus::Active => Purpose::PasswordReset,
        UserStatus::Pending => Purpose::Activation,
        UserStatus::Disabled => return Err(ApiError::account_disabled()),
    };
    let (link, token) = links::account_link(&app, id, purpose);
    let (store, actor) = (app.store.clone(), caller.actor());
    let issued =
        super::super::detached(&app, async move { store.issue_account_token(&token, None, &actor).await }).await?;
    // Somebody changed the account in this very moment.
    if !issued {
        return Err(ApiError::not_found("user"));
    }
    Ok((StatusCode::CREATED, axum::Json(shown(id, purpose, link))))
}

pub fn shown(user: UserId, purpose: Purpose, link: links::Link) -> Link {
    Link {
        user_id: user.to_string(),
        purpose: match purpose {
            Purpose::Activation => "activation",
            Purpose::PasswordReset => "password_reset",
        }
        .to_owned(),
        token: link.token,
        url: link.url,
        expires_at: link.expires_at,
    }
}
