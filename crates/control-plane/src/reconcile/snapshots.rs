//! Snapshots: has them made on the host of what they are of, and removed when nothing will begin with them any more.

use std::time::Duration;

use api::host::{EnsureSnapshotRequest, RemoveSnapshotRequest};
use connectrpc::client::CallOptions;
use model::ids::SnapshotId;
use store::operations::Operation;
use store::snapshots::Snapshot;
use store::{StoreError, Update};
use tokio::time::Instant;
use tracing::{info, warn};

use super::run::{ENSURE_TIME_MAX, FULL, FULL_PAUSE, pause, point, timings};
use crate::agents::{AgentError, said};
use crate::app::App;

/// The host removes gigabytes meanwhile, or writes down that it will.
const REMOVE_TIME_MAX: Duration = Duration::from_secs(10);

/// What has become of a snapshot that was asked for.
pub(super) enum Taken {
    /// How long each step took, if this call made it.
    Ready(Vec<(String, f64)>),
    /// The host does not answer, or works on it: it is to be asked again.
    Later,
    /// A code of the public API and a sentence.
    Never { code: &'static str, message: String },
}

/// The operation that makes one with a name.
pub(super) async fn run(app: &App, operation: &Operation) -> Result<(), StoreError> {
    let Some(id) = operation.snapshot else { return app.store.finish_operation(operation, &[]).await };
    let owner = app.store.snapshot(id).await?.and_then(|snapshot| snapshot.host.owner);
    let is_over = operation.deadline.is_some_and(|deadline| chrono::Utc::now() > deadline);
    let seat = app.driver.seat(owner);
    if seat.is_none() && !is_over {
        return app.store.put_off_unasked(operation, FULL_PAUSE, FULL).await;
    }
    point("cp.snapshot.begun").await;
    match ensure(app, id).await? {
        Taken::Ready(steps) => {
            point("cp.snapshot.ended").await;
            app.store.finish_operation(operation, &steps).await
        }
        Taken::Never { code, message } => app.store.fail_snapshot(operation, code, &message).await,
        Taken::Later if is_over => {
            app.store.fail_snapshot(operation, "deadline_exceeded", "the snapshot was not made in time").await
        }
        Taken::Later => app.store.put_off(operation, pause(operation.attempts), "host_unavailable").await,
    }
}

/// Has it made if it is not there yet. Whoever begins with one of a fork asks for it: all of them are told of the same one.
pub(super) async fn ensure(app: &App, id: SnapshotId) -> Result<Taken, StoreError> {
    let Some(snapshot) = app.store.snapshot(id).await? else {
        return Ok(Taken::Never { code: "not_found", message: "the snapshot is not there any more".to_owned() });
    };
    if snapshot.is_ready {
        return Ok(Taken::Ready(Vec::new()));
    }
    // Of those who begin with the same one, one asks the host at a time, and most of the others then find that it is there.
    let turn = app.driver.turn(id);
    let began = Instant::now();
    let mut put_off = turn.lock().await;
    // What the one before was told holds for all who have waited meanwhile: else each of them waited for all the others.
    if put_off.is_some_and(|at| at > began) {
        return Ok(Taken::Later);
    }
    let Some(snapshot) = app.store.snapshot(id).await?.filter(|snapshot| !snapshot.is_ready) else {
        return Ok(Taken::Ready(Vec::new()));
    };
    let taken = ask_for(app, &snapshot).await?;
    if matches!(taken, Taken::Later) {
        *put_off = Some(Instant::now());
    }
    Ok(taken)
}

async fn ask_for(app: &App, snapshot: &Snapshot) -> Result<Taken, StoreError> {
    let id = snapshot.id;
    let never = |code, message: &str| Ok(Taken::Never { code, message: message.to_owned() });
    match make(app, snapshot).await {
        Ok(Some((bytes, steps))) => {
            if app.store.snapshot_is_ready(id, bytes).await? == Update::Changed {
                info!(sandbox.id = %snapshot.sandbox, host.id = %snapshot.host.host, "snapshot {id} of sandbox {} is there", snapshot.sandbox);
            } else if app.store.snapshot(id).await?.is_none_or(|snapshot| !snapshot.is_ready) {
                return never("not_found", "the snapshot is not wanted any more");
            }
            Ok(Taken::Ready(steps))
        }
        Ok(None) => Ok(Taken::Later),
        Err(AgentError::NotRunning) => never("invalid_state", "the sandbox neither runs nor is it paused"),
        Err(AgentError::UnknownSandbox) => never("agent_error", "the host no longer has the sandbox"),
        Err(AgentError::UnknownSnapshot) => never("not_found", "the snapshot is not there any more"),
        Err(AgentError::NoDisk) => never("insufficient_storage", "the host's disk has no room for the snapshot"),
        Err(AgentError::NotSaved { message } | AgentError::Refused { message, .. }) => never("agent_error", &message),
        Err(AgentError::Stale) => never("host_unavailable", "the host refused the call as out of date"),
        Err(error) => {
            warn!(host.id = %snapshot.host.host, "snapshot {id} of sandbox {} is not made yet: {error}", snapshot.sandbox);
            Ok(Taken::Later)
        }
    }
}

/// Its bytes and how long each step took; none while the host works on it.
async fn make(app: &App, snapshot: &Snapshot) -> Result<Option<(i64, Vec<(String, f64)>)>, AgentError> {
    let request = EnsureSnapshotRequest {
        sandbox_id: snapshot.sandbox.to_string(),
        host_epoch: snapshot.host.epoch,
        snapshot_id: snapshot.id.to_string(),
        ..Default::default()
    };
    let agent = app.agents.of(&snapshot.host)?;
    let options = CallOptions::default().with_timeout(ENSURE_TIME_MAX);
    let answer = agent.ensure_snapshot_with_options(request, options).await?.into_owned();
    let steps = answer.state.into_option().map(|state| timings(&said::state(state))).unwrap_or_default();
    Ok(answer.ready.then(|| (i64::try_from(answer.size_bytes).unwrap_or(i64::MAX), steps)))
}

/// Tells hosts of what nothing will begin with any more. A host that is silent is told when it is back.
pub async fn remove_unwanted(app: App) -> Result<(), StoreError> {
    if app.store.is_braked().await? {
        return Ok(());
    }
    let unwanted = app.store.unwanted_snapshots().await?;
    // Side by side: a host that hangs keeps nobody else's from going.
    let removals = unwanted.iter().map(|snapshot| remove(&app, snapshot));
    futures::future::join_all(removals).await.into_iter().collect()
}

async fn remove(app: &App, snapshot: &Snapshot) -> Result<(), StoreError> {
    let request = RemoveSnapshotRequest { snapshot_id: snapshot.id.to_string(), ..Default::default() };
    let options = CallOptions::default().with_timeout(REMOVE_TIME_MAX);
    let removed = match app.agents.of(&snapshot.host) {
        Ok(agent) => agent.remove_snapshot_with_options(request, options).await.map(drop).map_err(AgentError::from),
        Err(error) => Err(error),
    };
    if let Err(error) = removed {
        warn!(host.id = %snapshot.host.host, "snapshot {} is not removed yet: {error}", snapshot.id);
        return app.store.put_off_removal(snapshot.id).await;
    }
    point("cp.snapshot.removed").await;
    app.store.forget_snapshot(snapshot.id).await
}
