//! `/v1/admin/users`: everybody, for administrators of the platform.

mod active;
mod administrator;
mod create;
mod link;
mod list;
mod search;

use model::ids::UserId;
use store::users::{Governed, Person};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::http::access::Caller;
use crate::http::errors::ApiError;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(list::list, create::create))
        .routes(routes!(active::set))
        .routes(routes!(administrator::set))
        .routes(routes!(link::link))
}

/// `/v1/users`.
pub fn search_router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(search::search))
}

fn shown(person: Person) -> api::v1::accounts::User {
    let user = person.user;
    api::v1::accounts::User {
        id: user.id.to_string(),
        email: user.email,
        name: user.name,
        is_admin: user.is_admin,
        status: user.status.as_str().to_owned(),
        created_at: user.created_at,
        teams_joined: person.teams_joined,
        teams_owned: person.teams_owned,
    }
}

/// Nobody puts themselves out by a slip.
fn is_other(caller: &Caller, user: UserId) -> Result<(), ApiError> {
    if caller.user() == Some(user) {
        Err(ApiError::invalid("id", "is your own; another administrator can do that"))
    } else {
        Ok(())
    }
}

fn governed(outcome: &Governed) -> Result<http::StatusCode, ApiError> {
    match outcome {
        Governed::Done => Ok(http::StatusCode::NO_CONTENT),
        Governed::Missing => Err(ApiError::not_found("user")),
        Governed::LastAdministrator => Err(ApiError::last_administrator()),
    }
}
