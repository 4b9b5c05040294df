//! `PUT /v1/teams/{id}/quotas`: limits of the team's own, in place of those it had. A limit below what the team has takes nothing away; it
//! keeps more from being added.

use api::v1::errors::ErrorBody;
use api::v1::quotas::{Quotas, SetQuotas};
use axum::extract::State;
use model::ids::TeamId;
use store::audit::Actor;
use store::quotas::{Limits, Quota};

use crate::app::App;
use crate::capacity::QUOTA_MAX;
use crate::http::access::Admin;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;

#[utoipa::path(put, path = "/teams/{id}/quotas", tag = "quotas", params(("id" = String, Path)), request_body = SetQuotas,
    responses((status = 200, body = Quotas), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 404, body = ErrorBody)))]
pub async fn set(
    State(app): State<App>,
    Admin(caller): Admin,
    Id(id): Id<TeamId>,
    Json(body): Json<SetQuotas>,
) -> Result<axum::Json<Quotas>, ApiError> {
    let own = Limits {
        sandboxes: body.sandboxes,
        running: body.running,
        vcpus: body.vcpus,
        memory_mb: body.memory_mb,
        disk_mb: body.disk_mb,
        creates_per_min: body.creates_per_min,
    };
    for quota in Quota::ALL {
        if own.of(quota).is_some_and(|limit| !(0..=QUOTA_MAX).contains(&limit)) {
            let error = ApiError::invalid(quota.as_str(), format!("must be from 0 to {QUOTA_MAX}"));
            return Err(error.with("min", 0).with("max", QUOTA_MAX));
        }
    }
    // The team's owners see who gave it more or less.
    let (store, actor) = (app.store.clone(), Actor { team: Some(id), ..caller.actor() });
    let account = super::super::detached(&app, async move { store.set_quotas(id, &own, &actor).await }).await?;
    let account = account.ok_or_else(|| ApiError::not_found("team"))?;
    Ok(axum::Json(super::shown(id, &account)))
}
