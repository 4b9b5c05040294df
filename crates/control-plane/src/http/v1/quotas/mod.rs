//! `/v1/teams/self/quotas` and `/v1/teams/{id}/quotas`: what a team may have, and what it has.

mod get;
mod of_team;
mod set;

use api::v1::quotas::{Quota, Quotas};
use model::ids::TeamId;
use store::quotas::Account;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::http::errors::ApiError;

/// Below `/v1`.
pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(get::get)).routes(routes!(of_team::of_team, set::set))
}

async fn find(app: &App, team: TeamId) -> Result<Quotas, ApiError> {
    let account = app.store.quotas(team).await?.ok_or_else(|| ApiError::not_found("team"))?;
    Ok(shown(team, &account))
}

fn shown(team: TeamId, account: &Account) -> Quotas {
    let quota = |quota: store::quotas::Quota| Quota {
        name: quota.as_str().to_owned(),
        limit: account.limits.of(quota),
        used: account.used.of(quota),
        is_own: account.own.of(quota).is_some(),
    };
    Quotas { team_id: team.to_string(), quotas: store::quotas::Quota::ALL.map(quota).to_vec() }
}
