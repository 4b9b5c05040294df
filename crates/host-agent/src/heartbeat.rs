//! Tells the control plane every 30 seconds, and at once when something changed, what this host has and holds.
//!
//! What it holds is told as a list, until the control plane has said that this is what it knows; from then on, for as long as it is the
//! same, as a digest. When the control plane finds that it is not the same, it gets the list at once.
//!
//! Whatever comes back, sandboxes go on: an answer that is not a yes puts the host into *detached*, which is a word in the log and in
//! `GetHost`, a slower rhythm, and nothing else.

use std::sync::Arc;
use std::time::Duration;

use api::v1::hosts::{self, Heartbeat, HeartbeatAnswer, IdleTimeout};
use futures::future::BoxFuture;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::control_plane::{BackOff, CallError, ControlPlane, NoClient};
use crate::credentials::{Credentials, Files};
use crate::measures;
use crate::sandbox::Sandboxes;
use crate::ticket::Ticket;

const PERIOD: Duration = Duration::from_secs(30);
/// So that a fleet that was started together does not beat together.
const JITTER: f64 = 0.2;

/// Least time between two heartbeats, whatever changes.
const GAP_MIN: Duration = Duration::from_millis(200);
/// After the control plane is back, what it shows of a host is true again within ten seconds. A thousand hosts send it 200 heartbeats a
/// second then, until all are back.
const BACK_OFF_MAX: Duration = Duration::from_secs(8);
/// When the control plane itself refuses this host, only a person can help, and nothing is gained by haste.
const REFUSED_BACK_OFF_MAX: Duration = Duration::from_secs(60);

/// How the host stands with its control plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// No answer yet since the start.
    Unknown,
    /// Nor has one come: what was tried last, for a person. What the host is to the control plane is as unknown as before.
    Unheard(String),
    Attached,
    /// The reason, for a person.
    Detached(String),
    /// Another machine may be this host: nothing new is begun here.
    Fenced(String),
}

/// What the heartbeat needs of the agent.
pub struct Beat {
    /// Everything but epoch, sequence, run and ticket.
    pub report: Box<dyn Fn() -> BoxFuture<'static, Heartbeat> + Send + Sync>,
    /// Woken when a sandbox changed.
    pub changed: Arc<Notify>,
    pub credentials: watch::Receiver<Credentials>,
    pub ticket: Arc<Ticket>,
    /// Called with each epoch that the control plane names.
    pub epoch_seen: Box<dyn Fn(u64) + Send + Sync>,
    /// Called with each list of the sandboxes whose idle time counts.
    pub idle_timeouts: Box<dyn Fn(Vec<IdleTimeout>) + Send + Sync>,
    pub link: watch::Sender<Link>,
}

pub async fn run(beat: Beat, stop: CancellationToken) -> Result<(), NoClient> {
    let control_plane = ControlPlane::new(beat.credentials.borrow().host.cp_url.clone())?;
    let agent_run = uuid::Uuid::new_v4().to_string();
    let mut back_off = BackOff::new(Duration::from_secs(1), BACK_OFF_MAX);
    let mut refused = BackOff::new(Duration::from_secs(1), REFUSED_BACK_OFF_MAX);
    let mut sequence = 0;
    // Of the last list or digest, when the control plane knew the same.
    let mut agreed: Option<String> = None;
    loop {
        sequence += 1;
        let host = beat.credentials.borrow().host.clone();
        let mut body = (beat.report)().await;
        body.epoch = host.epoch;
        body.sequence = sequence;
        body.agent_run.clone_from(&agent_run);
        body.ticket = Some(beat.ticket.shown());
        let digest = hosts::digest(&body.sandboxes);
        let is_list = agreed.as_ref() != Some(&digest) || !shorten(&mut body, &digest);
        let path = format!("/v1/hosts/{}/heartbeat", host.host_id);
        let wait = match control_plane.post::<HeartbeatAnswer>(&path, Some(&host.token), &body).await {
            Ok(answer) => {
                measures::heartbeat("taken");
                back_off.reset();
                refused.reset();
                if let Some(ticket) = answer.ticket {
                    beat.ticket.keep(ticket).await;
                }
                (beat.epoch_seen)(answer.epoch);
                agreed = answer.digest_suffices.then_some(digest);
                let is_wanted_as_list = !is_list && agreed.is_none();
                // Whose idle time counts comes with the answer to the list: to forget it until then would begin all idle times anew.
                if !is_wanted_as_list {
                    (beat.idle_timeouts)(answer.idle_timeouts);
                }
                if beat.link.send_replace(Link::Attached) != Link::Attached {
                    info!(host.id = %host.host_id, "the control plane knows this host");
                }
                if is_wanted_as_list {
                    GAP_MIN
                } else {
                    PERIOD.mul_f64(1.0 - JITTER + 2.0 * JITTER * rand::random::<f64>())
                }
            }
            Err(error) => {
                measures::heartbeat("failed");
                detach(&beat.link, &error);
                let back_off = if error.is_unauthorized() { &mut refused } else { &mut back_off };
                error.retry_after().unwrap_or_default().max(back_off.next(rand::random()))
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.cancelled() => return Ok(()),
            // While detached nothing is sent out of turn: a change must not become a storm.
            () = beat.changed.notified(), if *beat.link.borrow() == Link::Attached => {
                tokio::select! {
                    () = tokio::time::sleep(GAP_MIN) => {}
                    () = stop.cancelled() => return Ok(()),
                }
            }
        }
    }
}

/// Puts the digest in the place of what it covers. False, and nothing done, when it would not say all: before the scan of the start is done,
/// and while something is under way.
fn shorten(body: &mut Heartbeat, digest: &str) -> bool {
    if !body.complete || body.sandboxes.iter().any(|seen| !seen.is_in_digest() && seen.observed != "failed") {
        return false;
    }
    body.sandboxes.retain(|seen| !seen.is_in_digest() || seen.idle_sec.is_some());
    body.complete = false;
    body.digest = Some(digest.to_owned());
    true
}

fn detach(link: &watch::Sender<Link>, cause: &CallError) {
    let reason = cause.to_string();
    let before = link.borrow().clone();
    let now = match before {
        _ if cause.is_fenced() => Link::Fenced(reason.clone()),
        // Until the control plane says otherwise: that it does not answer says nothing.
        Link::Fenced(_) => before.clone(),
        Link::Unknown | Link::Unheard(_) => Link::Unheard(reason.clone()),
        Link::Attached | Link::Detached(_) => Link::Detached(reason.clone()),
    };
    if link.send_replace(now.clone()) == now {
        return;
    }
    if cause.is_fenced() {
        error!(
            "detached: {reason}; sandboxes go on, and nothing new is begun. If another machine is this host, stop wrenn-agent here and \
             remove host-token, host-ticket and host-key.pem; if this one is, stop the other, then: wrenn host unfence ID"
        );
    } else if cause.is_unauthorized() {
        error!("detached: {reason}; sandboxes go on and the credential is kept; an operator must look at this host");
    } else {
        warn!("detached: {reason}; sandboxes go on");
    }
}

/// Keeps the highest epoch of this host, also over restarts.
pub fn epoch_keeper(
    sandboxes: Arc<Sandboxes>,
    credentials: Arc<watch::Sender<Credentials>>,
    files: Files,
) -> Box<dyn Fn(u64) + Send + Sync> {
    Box::new(move |epoch| {
        sandboxes.see_epoch(epoch);
        let grew = credentials.send_if_modified(|credentials| {
            let grew = epoch > credentials.host.epoch;
            credentials.host.epoch = credentials.host.epoch.max(epoch);
            grew
        });
        if grew {
            let files = files.clone();
            // Not awaited: the epoch in memory counts at once, and the next heartbeat brings it again after a crash.
            tokio::task::spawn_blocking(move || {
                if let Err(error) = files.note_epoch(epoch) {
                    warn!("the epoch was not written down: {error}");
                }
            });
        }
    })
}
