//! `GET /v1/admin/fleet`: the platform as a whole, for `wrenn doctor --fleet`. Of hosts the platform's own: those of teams are theirs to
//! look after.

use api::v1::errors::ErrorBody;
use api::v1::fleet::{Counted, Fleet, FleetHost, OpenOperations, Schema, Waiting};
use axum::extract::State;
use chrono::Utc;
use store::hosts::Sees;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::hosts::status_word;
use crate::app::App;
use crate::http::access::Admin;
use crate::http::errors::ApiError;

/// Below `/v1/admin`.
pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(fleet))
}

#[utoipa::path(get, path = "/fleet", tag = "admin",
    responses((status = 200, body = Fleet), (status = 403, body = ErrorBody)))]
pub async fn fleet(State(app): State<App>, _: Admin) -> Result<axum::Json<Fleet>, ApiError> {
    let store = &app.store;
    let (numbers, silence, hosts) =
        (store.numbers().await?, store.silence().await?, store.hosts(Sees::Platform).await?);
    let schema = store.schema_version().await?;
    let pulse = store.pulse().await?;
    let now = Utc::now();
    Ok(axum::Json(Fleet {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        schema: Schema { database: schema.database, program: schema.program },
        now,
        database_now: pulse.now,
        workers: pulse.workers,
        sends_mail: app.accounts.mail.is_sent(),
        outbox: Waiting {
            count: pulse.outgoing,
            oldest_sec: pulse.outgoing_oldest_sec,
            given_up: pulse.outgoing_given_up,
        },
        operations: numbers
            .operations
            .into_iter()
            .map(|open| OpenOperations {
                kind: open.kind,
                count: open.count,
                oldest_sec: open.oldest_sec,
                overdue: open.overdue,
            })
            .collect(),
        hosts: hosts
            .into_iter()
            .map(|host| FleetHost {
                id: host.id.to_string(),
                status: status_word(host.state).to_owned(),
                agent_version: host.facts.as_ref().map(|facts| facts.agent_version.clone()),
                isolation: host.facts.as_ref().map(|facts| facts.isolation.clone()),
                last_heartbeat_at: host.last_heartbeat_at,
                copy_heard_at: host.copy_heard_at,
                disk_free_mb: host.held.disk_free_mib,
                unclaimed: host.unclaimed,
            })
            .collect(),
        sandboxes: numbers.sandboxes.into_iter().map(|(state, count)| Counted { state, count }).collect(),
        brake_since: silence.brake_since,
    }))
}
