//! `/v1/teams`: who owns things, and who belongs to them.

mod add_member;
mod all;
mod byoc;
mod change_role;
mod create;
mod delete;
mod delete_any;
mod get;
mod leave;
mod list;
mod members;
mod remove_member;
mod rename;

use api::v1::teams::{Member, Team};
use http::StatusCode;
use model::access::Role;
use store::deletions::Deleted;
use store::members::MemberChange;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::invitations;
use crate::app::App;
use crate::http::errors::ApiError;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(list::list, create::create))
        .routes(routes!(get::get, rename::rename, delete::delete))
        .routes(routes!(members::members, add_member::add))
        .routes(routes!(change_role::change, remove_member::remove))
        .routes(routes!(leave::leave))
        .merge(invitations::of_teams())
}

/// `/v1/admin/teams`.
pub fn admin_router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(all::list)).routes(routes!(delete_any::delete)).routes(routes!(byoc::set))
}

fn shown(team: store::teams::Team, role: Role) -> Team {
    Team {
        id: team.id.to_string(),
        name: team.name,
        slug: team.slug,
        is_byoc: team.is_byoc,
        created_at: team.created_at,
        role: role.to_string(),
    }
}

fn shown_member(member: store::members::Member) -> Member {
    Member {
        user_id: member.user.to_string(),
        name: member.name,
        email: member.email,
        role: member.role.to_string(),
        joined_at: member.joined_at,
    }
}

fn changed(outcome: &MemberChange) -> Result<StatusCode, ApiError> {
    match outcome {
        MemberChange::Done => Ok(StatusCode::NO_CONTENT),
        MemberChange::LastOwner => Err(ApiError::last_owner()),
        MemberChange::Forbidden => Err(ApiError::forbidden("only an owner decides about owners")),
        MemberChange::Missing => Err(ApiError::not_found("member")),
    }
}

fn deleted(outcome: &Deleted) -> Result<StatusCode, ApiError> {
    match outcome {
        Deleted::Done => Ok(StatusCode::NO_CONTENT),
        Deleted::NotEmpty => Err(ApiError::team_not_empty()),
        Deleted::Platform => Err(ApiError::forbidden("the platform's own team stays")),
        Deleted::Missing => Err(ApiError::not_found("team")),
    }
}
