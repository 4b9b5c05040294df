//! `DELETE /v1/teams/{id}/invitations/{invitation_id}`: nobody can take it any more.

use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use model::ids::InvitationId;

use crate::app::App;
use crate::http::access::MemberCaller;
use crate::http::body::LastId;
use crate::http::errors::ApiError;

#[utoipa::path(delete, path = "/{id}/invitations/{invitation_id}", tag = "teams",
    params(("id" = String, Path), ("invitation_id" = String, Path)),
    responses((status = 204), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn revoke(
    State(app): State<App>,
    caller: MemberCaller,
    LastId(id): LastId<InvitationId>,
) -> Result<StatusCode, ApiError> {
    let (store, actor) = (app.store.clone(), caller.actor());
    let revoked =
        super::super::detached(&app, async move { store.revoke_invitation(caller.team, id, &actor).await }).await?;
    if revoked { Ok(StatusCode::NO_CONTENT) } else { Err(ApiError::not_found("invitation")) }
}
