//! `POST /v1/hosts/{id}/heartbeat`: what a host has and holds, every 30 seconds and when something changed.

use api::v1::errors::ErrorBody;
use api::v1::hosts::{Heartbeat, HeartbeatAnswer, IdleTimeout};
use axum::extract::State;
use model::ids::HostId;
use store::beats::{Heard, News};
use store::hosts::Beat;
use store::sandboxes::Sighting;
use tracing::{error, warn};

use crate::agents::said;
use crate::app::App;
use crate::http::access::HostCaller;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;
use crate::measures;

const SANDBOXES_MAX: usize = 10_000;
const WORD_BYTES_MAX: usize = 128;
const UNCLAIMED_MAX: usize = 100;
/// SHA-256 in hexadecimal.
const DIGEST_LETTERS: usize = 64;

/// Why a heartbeat is not taken in.
enum Refusal {
    Unknown,
    Fenced,
    Copy,
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
    if body.agent_run.len() > WORD_BYTES_MAX || body.agent_run.chars().any(char::is_control) {
        return Err(ApiError::invalid("agent_run", "is too long"));
    }
    let ticket = ticket_number(&app, id, body.ticket.as_deref())?;
    let sightings = sightings(&body)?;
    let beat = Beat {
        ticket,
        digest: digest(&body)?,
        agent_run: body.agent_run,
        sequence: i64::try_from(body.sequence).map_err(|_| ApiError::invalid("sequence", "is too large"))?,
        facts: super::facts(body.facts)?,
        memory_free_mb: body.memory_free_mb,
        disk_free_mb: body.disk_free_mb,
    };
    let (at, complete, epoch_said) = (app.clone(), body.complete, body.epoch);
    let taken = super::super::detached(&app, async move {
        let news = match at.store.beat(id, &beat).await? {
            Heard::News(news) => news,
            Heard::Old { epoch } => {
                measures::heartbeat("repeated");
                return Ok(Ok(HeartbeatAnswer { epoch, ..HeartbeatAnswer::default() }));
            }
            Heard::Fenced => return Ok(Err(Refusal::Fenced)),
            Heard::Copy => return Ok(Err(Refusal::Copy)),
            Heard::Unknown => return Ok(Err(Refusal::Unknown)),
        };
        let News { epoch, ticket, unclaimed: were_unclaimed, mut is_back, digested } = news;
        let mut idle_timeouts = Vec::new();
        // A report of before the host was declared lost says nothing about now.
        let taken = match &beat.digest {
            _ if epoch_said != epoch => None,
            Some(_) => at.store.take_beside_digest(id, &digested, &sightings).await?,
            None => Some(at.store.take_sightings(id, &sightings, complete).await?),
        };
        let outcome = match &taken {
            Some(_) => "taken",
            None if epoch_said == epoch => "differs",
            None => "old_epoch",
        };
        // Nothing new: neither side has what the other has not, nor has it otherwise.
        let digest_suffices = taken.as_ref().is_some_and(|taken| !taken.is_news) && (complete || beat.digest.is_some());
        if let Some(mut taken) = taken {
            taken.unclaimed.truncate(UNCLAIMED_MAX);
            if !taken.unclaimed.is_empty() {
                warn!(host.id = %id, "host {id} has sandboxes that nothing here knows: {:?}", taken.unclaimed);
            }
            if taken.unclaimed != were_unclaimed {
                at.store.note_unclaimed(id, &taken.unclaimed).await?;
            }
            if taken.counts_idleness {
                idle_timeouts = at.store.note_idleness(id, &beat.agent_run, beat.sequence, &sightings).await?;
            }
            is_back |= taken.is_news;
        }
        // What was put off, or what a report has called for.
        if is_back {
            at.driver.wake();
        }
        measures::heartbeat(outcome);
        let ticket = beat.ticket.map(|_| at.tokens.ticket(id, ticket));
        let idle_timeouts = idle_timeouts.into_iter().map(told).collect();
        Ok(Ok(HeartbeatAnswer { epoch, ticket, idle_timeouts, digest_suffices }))
    });
    let taken = taken.await.inspect_err(|_| measures::heartbeat("failed"))?;
    taken.map(axum::Json).map_err(|refusal| match refusal {
        Refusal::Unknown => {
            measures::heartbeat("unknown");
            ApiError::unauthorized()
        }
        Refusal::Fenced => {
            measures::heartbeat("fenced");
            error!(host.id = %id, "two machines speak as host {id}: it is fenced, and an operator must look at both");
            ApiError::host_fenced()
        }
        Refusal::Copy => {
            measures::heartbeat("copy");
            error!(host.id = %id, "what speaks as host {id} has an old state of its disk, and is refused: a copy, or a host that was restored");
            ApiError::host_is_past()
        }
    })
}

/// Of what a host shows; none when it keeps no tickets.
pub(super) fn ticket_number(app: &App, id: HostId, ticket: Option<&str>) -> Result<Option<i64>, ApiError> {
    match ticket {
        Some(ticket) if ticket.len() > WORD_BYTES_MAX => Err(ApiError::invalid("ticket", "is too long")),
        ticket => Ok(ticket.map(|ticket| app.tokens.ticket_number(id, ticket))),
    }
}

fn digest(body: &Heartbeat) -> Result<Option<String>, ApiError> {
    let Some(digest) = &body.digest else { return Ok(None) };
    if digest.len() != DIGEST_LETTERS || !digest.bytes().all(|letter| matches!(letter, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(ApiError::invalid("digest", "is not 64 hexadecimal digits in small letters"));
    }
    // One of the two would be wrong, and it cannot be known which.
    if body.complete {
        return Err(ApiError::invalid("digest", "stands beside a complete list"));
    }
    Ok(Some(digest.clone()))
}

fn told(known: store::idleness::IdleTimeout) -> IdleTimeout {
    let seconds = |seconds: i64| u64::try_from(seconds).unwrap_or_default();
    IdleTimeout { id: known.id, timeout_sec: seconds(known.timeout_sec), active_sec_ago: seconds(known.active_sec_ago) }
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
                incarnation: said::word(&seen.incarnation),
                idle_sec: seen.idle_sec.map(|seconds| i64::from(u32::try_from(seconds).unwrap_or(u32::MAX))),
                reason: said::sentence(&seen.reason),
            })
        })
        .collect()
}
