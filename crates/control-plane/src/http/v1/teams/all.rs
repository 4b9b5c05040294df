//! `GET /v1/admin/teams`: every team, also those that were deleted, 100 to a page.

use api::v1::errors::ErrorBody;
use api::v1::teams::{AnyTeam, Teams};
use axum::extract::State;
use store::all_teams::{PAGE, Standing};

use crate::app::App;
use crate::http::access::Admin;
use crate::http::body::Query;
use crate::http::errors::ApiError;
use crate::http::paged::Paged;

#[utoipa::path(get, path = "/", tag = "admin", params(Paged),
    responses((status = 200, body = Teams), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody)))]
pub async fn list(State(app): State<App>, _: Admin, Query(query): Query<Paged>) -> Result<axum::Json<Teams>, ApiError> {
    let page = query.number()?;
    let (teams, total) = app.store.all_teams(page).await?;
    let teams = teams.into_iter().map(shown).collect();
    Ok(axum::Json(Teams { teams, total, page, per_page: PAGE, total_pages: (total + PAGE - 1) / PAGE }))
}

fn shown(standing: Standing) -> AnyTeam {
    AnyTeam {
        id: standing.team.id.to_string(),
        name: standing.team.name,
        slug: standing.team.slug,
        is_byoc: standing.team.is_byoc,
        created_at: standing.team.created_at,
        deleted_at: standing.deleted_at,
        member_count: standing.members,
        owner_name: standing.owner_name,
        owner_email: standing.owner_email,
        active_sandbox_count: standing.active_sandboxes,
        host_count: standing.hosts,
    }
}
