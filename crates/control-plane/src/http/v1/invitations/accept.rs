//! `POST /v1/invitations/accept`: a person who has an account joins. Who has none signs up with the token.

use api::v1::errors::ErrorBody;
use api::v1::teams::{AcceptInvitation, Joined};
use axum::extract::State;

use crate::app::App;
use crate::http::access::PersonCaller;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::tokens;

#[utoipa::path(post, path = "/accept", tag = "teams", request_body = AcceptInvitation,
    responses((status = 200, body = Joined), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody)))]
pub async fn accept(
    State(app): State<App>,
    person: PersonCaller,
    Json(body): Json<AcceptInvitation>,
) -> Result<axum::Json<Joined>, ApiError> {
    let hash = tokens::opaque_hash(&body.token).ok_or_else(ApiError::invalid_token)?;
    let (store, actor) = (app.store.clone(), person.actor());
    let accept = async move { store.accept_invitation(&hash, person.user, &actor).await };
    super::joined(super::super::detached(&app, accept).await?).map(axum::Json)
}
