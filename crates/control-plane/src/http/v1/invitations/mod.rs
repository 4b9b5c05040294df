//! Invitations: `/v1/teams/{id}/invitations`, and `/v1/invitations/accept` for who has one.

mod accept;
mod create;
mod list;
mod revoke;

use api::v1::teams::{Invitation, Joined};
use store::invitations::Accepted;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::http::errors::ApiError;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(accept::accept))
}

/// Those below `/v1/teams`.
pub fn of_teams() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list::list, create::create)).routes(routes!(revoke::revoke))
}

fn shown(invitation: store::invitations::Invitation, token: Option<String>) -> Invitation {
    Invitation {
        id: invitation.id.to_string(),
        team_id: invitation.team.to_string(),
        email: invitation.email,
        role: invitation.role.to_string(),
        invited_by: invitation.invited_by.map(|user| user.to_string()),
        created_at: invitation.created_at,
        expires_at: invitation.expires_at,
        token,
    }
}

/// What whoever took an invitation is told.
pub fn joined(accepted: Accepted) -> Result<Joined, ApiError> {
    match accepted {
        Accepted::Joined(team, role) => Ok(Joined { team_id: team.to_string(), role: role.to_string() }),
        Accepted::Invalid => Err(ApiError::invalid_token()),
        Accepted::OtherPerson => Err(ApiError::forbidden("this invitation is for another address")),
        Accepted::Already => Err(ApiError::already_a_member()),
        Accepted::EmailTaken => Err(ApiError::email_taken()),
        Accepted::TooMany => Err(ApiError::quota_exceeded("the team has as many members as it may have")),
    }
}
