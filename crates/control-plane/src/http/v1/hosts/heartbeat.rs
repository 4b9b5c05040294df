//! `POST /v1/hosts/{id}/heartbeat`: what a host has and holds, every 30 seconds and when something changed.

use api::v1::errors::ErrorBody;
use api::v1::hosts::{Heartbeat, HeartbeatAnswer, IdleTimeout};
use axum::extract::State;
use model::ids::HostId;
use store::beats::Heard;
use store::hosts::Beat;
use store::sandboxes::Sighting;
use tracing::{error, warn};

use crate::app::App;
use crate::http::access::HostCaller;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;
use crate::measures;

const SANDBOXES_MAX: usize = 10_000;
const WORD_BYTES_MAX: usize = 128;
/// What a host says of a cause is shown to people.
const REASON_CHARS_MAX: usize = 500;
const UNCLAIMED_MAX: usize = 100;

/// Why a heartbeat is not taken in.
enum Refusal {
    Unknown,
    Fenced,
}

#[utoipa::path(post, path = "/{id}/heartbeat", tag = "hosts", params(("id" = String, Path)), request_body = Heartbeat,
    responses((status = 200, body = HeartbeatAnswer), (status = 401, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 409, body = ErrorBody)))]
pub async fn heartbeat(
    State(app): State<App>,
    HostCaller(caller): HostCaller,
    Id(id): Id<HostId>,
    Json(body): Json<Heartbeat>,
) -> Result<axum::Json<HeartbeatAnswer>, ApiError> {
    if caller != id {
        return Err(ApiError::forbidden("the token is another host's"));
    }
    if body.agent_run.len() > WORD_BYTES_MAX {
        return Err(ApiError::invalid("agent_run", "is too long"));
    }
    let sightings = sightings(&body)?;
    let beat = Beat {
        agent_run: body.agent_run,
        sequence: i64::try_from(body.sequence).map_err(|_| ApiError::invalid("sequence", "is too large"))?,
        facts: super::facts(body.facts)?,
        memory_free_mb: body.memory_free_mb,
        disk_free_mb: body.disk_free_mb,
    };
    let (store, complete, epoch_said) = (app.store.clone(), body.complete, body.epoch);
    let taken = super::super::detached(&app, async move {
        let (epoch, is_news) = match store.beat(id, &beat).await? {
            Heard::News { epoch } => (epoch, true),
            Heard::Old { epoch } => (epoch, false),
            Heard::Fenced => return Ok(Err(Refusal::Fenced)),
            Heard::Unknown => return Ok(Err(Refusal::Unknown)),
        };
        let outcome = match is_news {
            true if epoch_said == epoch => "taken",
            true => "old_epoch",
            false => "repeated",
        };
        // A report of before the host was declared lost says nothing about now.
        let mut idle_timeouts = Vec::new();
        if is_news && epoch_said == epoch {
            let mut unclaimed = store.take_sightings(id, &sightings, complete).await?;
            unclaimed.truncate(UNCLAIMED_MAX);
            if !unclaimed.is_empty() {
                warn!(host.id = %id, "host {id} has sandboxes that nothing here knows: {unclaimed:?}");
            }
            store.note_unclaimed(id, &unclaimed).await?;
            idle_timeouts = store.note_idleness(id, &beat.agent_run, beat.sequence, &sightings).await?;
        }
        measures::heartbeat(outcome);
        Ok(Ok((epoch, idle_timeouts)))
    });
    let taken = taken.await.inspect_err(|_| measures::heartbeat("failed"))?;
    let (epoch, idle_timeouts) = taken.map_err(|refusal| match refusal {
        Refusal::Unknown => {
            measures::heartbeat("unknown");
            ApiError::unauthorized()
        }
        Refusal::Fenced => {
            measures::heartbeat("fenced");
            error!(host.id = %id, "two machines speak as host {id}: it is fenced, and an operator must look at both");
            ApiError::host_fenced()
        }
    })?;
    app.driver.wake();
    let seconds = |seconds: i64| u64::try_from(seconds).unwrap_or_default();
    let told = idle_timeouts.into_iter().map(|known| IdleTimeout {
        id: known.id,
        timeout_sec: seconds(known.timeout_sec),
        active_sec_ago: seconds(known.active_sec_ago),
    });
    Ok(axum::Json(HeartbeatAnswer { epoch, idle_timeouts: told.collect() }))
}

fn sightings(body: &Heartbeat) -> Result<Vec<Sighting>, ApiError> {
    if body.sandboxes.len() > SANDBOXES_MAX {
        return Err(ApiError::invalid("sandboxes", "are more than 10000"));
    }
    body.sandboxes
        .iter()
        .map(|seen| {
            seen.id
                .parse::<model::ids::SandboxId>()
                .map_err(|_| ApiError::invalid("sandboxes", "names what is no sandbox"))?;
            Ok(Sighting {
                id: seen.id.clone(),
                observed: seen.observed.parse().map_err(|_| ApiError::invalid("sandboxes", "has an unknown state"))?,
                revision: i64::try_from(seen.revision).unwrap_or(i64::MAX),
                incarnation: seen.incarnation.chars().take(WORD_BYTES_MAX).collect(),
                idle_sec: seen.idle_sec.map(|seconds| i64::from(u32::try_from(seconds).unwrap_or(u32::MAX))),
                reason: seen.reason.chars().take(REASON_CHARS_MAX).filter(|c| !c.is_control()).collect(),
            })
        })
        .collect()
}
