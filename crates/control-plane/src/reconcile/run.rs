//! One operation, from its row to what the host says. Every step may be repeated: the host's "ensure" calls carry the revision, and what
//! is written is conditional on it.

use std::time::Duration;

use api::host::{
    self, EnsureKilledRequest, EnsurePausedRequest, EnsureRunningRequest, Fence, SandboxSpec, SandboxState,
};
use connectrpc::client::CallOptions;
use model::sandbox::{Kept, Observed};
use store::operations::{Kind, Operation};
use store::placement::Shortage;
use store::sandboxes::{Placed, Report, Sandbox};
use store::{StoreError, Update};
use tokio::time::Instant;
use tracing::{info, warn};

use super::snapshots::{self, Taken};
use crate::agents::{AgentError, said};
use crate::app::App;
use crate::measures;

/// One call of "ensure": the agent answers with what is true before this is over, and is asked again.
pub(super) const ENSURE_TIME_MAX: Duration = Duration::from_secs(60);
/// Hosts that are asked for one sandbox, one after the other, before it is said that there is no room: the books that they were chosen by are
/// not what they have, and more of them will not be either.
const HOSTS_MAX: usize = 3;
/// A host agent that restarts is back within a second; after this time another host is tried.
const REACH_TIME_MAX: Duration = Duration::from_millis(2500);
const REACH_AGAIN: Duration = Duration::from_millis(150);
const PUT_OFF_FIRST: Duration = Duration::from_millis(500);
const PUT_OFF_MAX: Duration = Duration::from_secs(30);
/// It is not claimed before there is a place.
pub(super) const FULL_PAUSE: Duration = Duration::from_secs(1);
/// Why an operation waits that nothing else keeps.
pub(super) const FULL: &str = "the team's hosts have as much to do as they may have";

pub async fn run(app: &App, operation: &Operation, since: Option<Instant>) -> Result<(), StoreError> {
    point("cp.operation.leased").await;
    if operation.kind == Kind::Snapshot {
        return snapshots::run(app, operation).await;
    }
    let sandbox = app.store.sandbox_of_any_team(&operation.sandbox).await?;
    let Some(sandbox) = sandbox.filter(|sandbox| is_wanted(sandbox, operation)) else {
        return app.store.finish_operation(operation, &[]).await;
    };
    let is_over = operation.deadline.is_some_and(|deadline| chrono::Utc::now() > deadline);
    let seat = app.driver.seat(sandbox.host.as_ref().and_then(|placed| placed.owner));
    if seat.is_none() && !is_over {
        return app.store.put_off_unasked(operation, FULL_PAUSE, FULL).await;
    }
    match operation.kind {
        Kind::Run => run_sandbox(app, operation.clone(), sandbox, since).await,
        Kind::Pause => turn_sandbox(app, operation, &sandbox, &PAUSE).await,
        Kind::Resume => turn_sandbox(app, operation, &sandbox, &RESUME).await,
        Kind::Snapshot | Kind::Exit => Ok(()),
        Kind::Kill | Kind::Clean => end_sandbox(app, operation, &sandbox).await,
    }
}

/// A newer wish has an operation of its own.
fn is_wanted(sandbox: &Sandbox, operation: &Operation) -> bool {
    sandbox.revision == operation.revision
}

async fn run_sandbox(
    app: &App,
    mut operation: Operation,
    mut sandbox: Sandbox,
    since: Option<Instant>,
) -> Result<(), StoreError> {
    let mut own_ms = None;
    let began = Instant::now();
    let mut had_no_room = false;
    // A call that got no answer, of this attempt or one before, may have reached the host: then no other host may be asked, or there
    // would be two microVMs of one sandbox.
    let mut may_have_it = sandbox.host.as_ref().filter(|_| operation.attempts > 1).map(|placed| placed.host);
    loop {
        if operation.deadline.is_some_and(|deadline| chrono::Utc::now() > deadline) {
            let message = "the sandbox did not start in time";
            app.store.fail_run(&operation, "deadline_exceeded", message, &[]).await?;
            return Ok(());
        }
        let Some(placed) = sandbox.host.clone() else {
            if sandbox.snapshot.is_some() {
                // It begins with what lies on one host.
                app.store
                    .fail_run(&operation, "no_hosts_available", "its host has no room for the sandbox", &[])
                    .await?;
                return Ok(());
            }
            let refusals = operation.refused_hosts.len();
            let placed = if refusals < HOSTS_MAX { Some(app.store.place(&operation, &sandbox).await?) } else { None };
            if let None | Some(Err(_)) = placed {
                let shortage = placed.and_then(Result::err);
                match &shortage {
                    Some(shortage) => measures::not_placed(shortage),
                    None => measures::refused_by_hosts(),
                }
                let (code, message) = no_host(&operation, had_no_room, shortage);
                app.store.fail_run(&operation, code, &message, &[]).await?;
                return Ok(());
            }
            let Some(read) =
                app.store.sandbox_of_any_team(&operation.sandbox).await?.filter(|s| is_wanted(s, &operation))
            else {
                return app.store.finish_operation(&operation, &[]).await;
            };
            sandbox = read;
            continue;
        };
        point("cp.run.placed").await;
        if let Some(snapshot) = sandbox.snapshot {
            match snapshots::ensure(app, snapshot).await? {
                Taken::Ready(_) => {}
                Taken::Later => {
                    return app.store.put_off(&operation, pause(operation.attempts), "host_unavailable").await;
                }
                Taken::Never { code, message } => {
                    app.store.fail_run(&operation, code, &message, &[]).await?;
                    return Ok(());
                }
            }
            point("cp.fork.taken").await;
        }
        own_ms = own_ms.or(since.map(|since| since.elapsed().as_secs_f64() * 1000.0));
        match ensure_running(app, &operation, &sandbox, &placed).await {
            Ok(state) => match state.observed.parse::<Observed>() {
                Ok(Observed::Running) => {
                    point("cp.run.started").await;
                    let report = report(&state, Observed::Running, own_ms);
                    if app.store.finish_run(&operation, &report).await? == Update::Changed {
                        info!(host.id = %placed.host, "sandbox {} runs", operation.sandbox);
                    }
                    point("cp.run.finished").await;
                    return Ok(());
                }
                Ok(Observed::Starting | Observed::Resuming) => may_have_it = Some(placed.host),
                _ => {
                    let reason = if state.reason.is_empty() { "it did not start" } else { &state.reason };
                    warn!(host.id = %placed.host, "sandbox {} failed on its host: {reason}", operation.sandbox);
                    app.store.fail_run(&operation, code_of(&state.cause), reason, &timings(&state)).await?;
                    return Ok(());
                }
            },
            Err(AgentError::Unreachable) if began.elapsed() < REACH_TIME_MAX => tokio::time::sleep(REACH_AGAIN).await,
            Err(error @ (AgentError::Unreachable | AgentError::NoRoom))
                if may_have_it != Some(placed.host) && sandbox.snapshot.is_none()
                    || matches!(error, AgentError::NoRoom) =>
            {
                warn!(host.id = %placed.host, "host {} does not take sandbox {}: {error}", placed.host, operation.sandbox);
                if app.store.refuse_host(&operation, placed.host).await? == Update::Stale {
                    // Whoever works on it now may have reached the host that was not reached here.
                    return Ok(());
                }
                operation.refused_hosts.push(placed.host);
                sandbox.host = None;
                had_no_room |= matches!(error, AgentError::NoRoom);
            }
            Err(AgentError::Stale) => {
                // Of a newer wish nothing is changed by this; without one the host would refuse the same call for ever.
                app.store
                    .fail_run(&operation, "host_unavailable", "the host refused the call as out of date", &[])
                    .await?;
                return Ok(());
            }
            Err(AgentError::UnknownTemplate) => {
                app.store.fail_run(&operation, "not_found", "the host does not have the template", &[]).await?;
                return Ok(());
            }
            Err(AgentError::UnknownSnapshot) => {
                app.store.fail_run(&operation, "not_found", "the snapshot is not on its host any more", &[]).await?;
                return Ok(());
            }
            Err(AgentError::Refused { message, .. }) => {
                app.store.fail_run(&operation, "agent_error", &message, &[]).await?;
                return Ok(());
            }
            Err(AgentError::Misbehaved { message }) => {
                warn!(host.id = %placed.host, "sandbox {} failed on its host: {message}", operation.sandbox);
                app.store.fail_run(&operation, "agent_error", "the sandbox did not start", &[]).await?;
                return Ok(());
            }
            Err(error) => {
                let pause = pause(operation.attempts);
                warn!(host.id = %placed.host, "sandbox {} is not started yet: {error}", operation.sandbox);
                return app.store.put_off(&operation, pause, "host_unavailable").await;
            }
        }
    }
}

/// `shortage`: of the hosts that are left; none when there were enough refusals.
fn no_host(operation: &Operation, had_no_room: bool, shortage: Option<Shortage>) -> (&'static str, String) {
    if had_no_room {
        ("no_hosts_available", "no host has room for the sandbox".to_owned())
    } else if operation.refused_hosts.is_empty() {
        ("no_hosts_available", shortage.map_or_else(String::new, |shortage| shortage.to_string()))
    } else {
        ("host_unavailable", "no host that has room could be reached".to_owned())
    }
}

/// A wish for a sandbox that is on its host already and can be nowhere else.
struct Turn {
    to: Observed,
    /// What it is when the wish could not be fulfilled.
    from: Observed,
    under_way: [Observed; 3],
    begun: &'static str,
    answered: &'static str,
    finished: &'static str,
}

const PAUSE: Turn = Turn {
    to: Observed::Paused,
    from: Observed::Running,
    under_way: [Observed::Starting, Observed::Resuming, Observed::Pausing],
    begun: "cp.pause.begun",
    answered: "cp.pause.answered",
    finished: "cp.pause.finished",
};
const RESUME: Turn = Turn {
    to: Observed::Running,
    from: Observed::Paused,
    under_way: [Observed::Starting, Observed::Resuming, Observed::Pausing],
    begun: "cp.resume.begun",
    answered: "cp.resume.answered",
    finished: "cp.resume.finished",
};

/// Until the host has said what became of it. One that is silent may have done it, and is asked again for as long as that takes.
async fn turn_sandbox(app: &App, operation: &Operation, sandbox: &Sandbox, turn: &Turn) -> Result<(), StoreError> {
    let Some(placed) = &sandbox.host else {
        app.store.fail_sandbox(operation, "agent_error", "it is on no host").await?;
        return Ok(());
    };
    point(turn.begun).await;
    let answer = match turn.to {
        Observed::Paused => ensure_paused(app, operation, sandbox, placed).await,
        _ => ensure_running(app, operation, sandbox, placed).await,
    };
    point(turn.answered).await;
    let is = answer.as_ref().ok().and_then(|state| state.observed.parse::<Observed>().ok());
    match (answer, is) {
        (Ok(state), Some(is)) if is == turn.to => {
            let report = report(&state, is, None);
            let update = match is {
                Observed::Paused => app.store.finish_pause(operation, &report).await?,
                _ => app.store.finish_run(operation, &report).await?,
            };
            if update == Update::Changed {
                info!(host.id = %placed.host, "sandbox {} is {is}", operation.sandbox);
            }
            point(turn.finished).await;
        }
        (Ok(state), Some(is)) if is == turn.from => {
            let reason = if state.reason.is_empty() { "the host did not do it" } else { &state.reason };
            warn!(host.id = %placed.host, "sandbox {} stays {is}: {reason}", operation.sandbox);
            app.store.take_back(operation, is, code_of(&state.cause), reason, &timings(&state)).await?;
        }
        (Ok(_), Some(is)) if turn.under_way.contains(&is) => {
            app.store.put_off(operation, pause(1), "the host works on it").await?;
        }
        (Ok(state), None) => {
            // A word of a newer agent: what it means cannot be guessed.
            warn!(host.id = %placed.host, "the host says of sandbox {} that it is {:?}", operation.sandbox, state.observed);
            app.store
                .put_off(operation, pause(operation.attempts), "the host says what this control plane does not know")
                .await?;
        }
        (Ok(state), _) => {
            let reason = if state.reason.is_empty() { "the sandbox ended on its host" } else { &state.reason };
            warn!(host.id = %placed.host, "sandbox {} failed on its host: {reason}", operation.sandbox);
            app.store.fail_sandbox(operation, "agent_error", reason).await?;
        }
        (Err(AgentError::UnknownSandbox), _) => {
            app.store.fail_sandbox(operation, "agent_error", "the host no longer has it").await?;
        }
        (Err(AgentError::NoRoom), _) if turn.from == Observed::Paused => {
            app.store
                .take_back(operation, turn.from, "no_hosts_available", "its host has no room for it now", &[])
                .await?;
        }
        (Err(AgentError::Refused { message, .. }), _) => {
            app.store.take_back(operation, turn.from, "agent_error", &message, &[]).await?;
        }
        (Err(error), _) => {
            warn!(host.id = %placed.host, "sandbox {} is not {} yet: {error}", operation.sandbox, turn.to);
            app.store.put_off(operation, pause(operation.attempts), "host_unavailable").await?;
        }
    }
    Ok(())
}

async fn end_sandbox(app: &App, operation: &Operation, sandbox: &Sandbox) -> Result<(), StoreError> {
    let mut steps = Vec::new();
    if let Some(placed) = &sandbox.host {
        point("cp.kill.begun").await;
        match ensure_killed(app, operation, placed).await {
            Ok(took) => steps = took,
            Err(error) => {
                // A host that does not answer may be there again tomorrow, with the sandbox: the wish stays.
                warn!(host.id = %placed.host, "sandbox {} is not ended yet: {error}", operation.sandbox);
                return app.store.put_off(operation, pause(operation.attempts), "host_unavailable").await;
            }
        }
    }
    point("cp.kill.ended").await;
    if operation.kind == Kind::Clean {
        return app.store.finish_operation(operation, &steps).await;
    }
    if app.store.finish_kill(operation, &steps).await? == Update::Changed {
        info!("sandbox {} is killed", operation.sandbox);
    } else {
        // A second kill of what was killed already.
        app.store.finish_operation(operation, &steps).await?;
    }
    point("cp.kill.finished").await;
    Ok(())
}

async fn ensure_running(
    app: &App,
    operation: &Operation,
    sandbox: &Sandbox,
    placed: &Placed,
) -> Result<SandboxState, AgentError> {
    let shape = &sandbox.shape;
    let request = EnsureRunningRequest {
        sandbox_id: sandbox.id.to_string(),
        fence: fence(operation, placed).into(),
        must_exist: operation.kind == Kind::Resume,
        spec: SandboxSpec {
            template: sandbox.template.clone(),
            vcpus: shape.vcpus().into(),
            memory_mib: shape.memory().0,
            disk_mib: shape.disk().0,
            envs: sandbox.envs.clone().into_iter().collect(),
            default_user: sandbox.default_user.clone(),
            team_id: sandbox.team.to_string(),
            snapshot_id: sandbox.snapshot.map(|id| id.to_string()).unwrap_or_default(),
            ..Default::default()
        }
        .into(),
        ..Default::default()
    };
    let agent = app.agents.of(placed)?;
    let options = CallOptions::default().with_timeout(ENSURE_TIME_MAX);
    let answer = agent.ensure_running_with_options(request, options).await?.into_owned();
    answer.state.into_option().map(said::state).ok_or_else(missing_state)
}

async fn ensure_paused(
    app: &App,
    operation: &Operation,
    sandbox: &Sandbox,
    placed: &Placed,
) -> Result<SandboxState, AgentError> {
    let request = EnsurePausedRequest {
        sandbox_id: operation.sandbox.to_string(),
        fence: fence(operation, placed).into(),
        disk_only: sandbox.kept == Kept::Disk,
        ..Default::default()
    };
    let agent = app.agents.of(placed)?;
    let options = CallOptions::default().with_timeout(ENSURE_TIME_MAX);
    let answer = agent.ensure_paused_with_options(request, options).await?.into_owned();
    answer.state.into_option().map(said::state).ok_or_else(missing_state)
}

/// How long each step took.
async fn ensure_killed(app: &App, operation: &Operation, placed: &Placed) -> Result<Vec<(String, f64)>, AgentError> {
    let request = EnsureKilledRequest {
        sandbox_id: operation.sandbox.to_string(),
        fence: fence(operation, placed).into(),
        ..Default::default()
    };
    let agent = app.agents.of(placed)?;
    let options = CallOptions::default().with_timeout(ENSURE_TIME_MAX);
    let answer = match agent.ensure_killed_with_options(request, options).await.map_err(AgentError::from) {
        Ok(answer) => answer.into_owned(),
        Err(AgentError::UnknownSandbox) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let state = answer.state.into_option().map(said::state).ok_or_else(missing_state)?;
    match state.observed.parse() {
        Ok(Observed::Killed) => Ok(timings(&state)),
        _ => Err(AgentError::NotReady),
    }
}

/// The public code of what a host says.
fn code_of(cause: &str) -> &'static str {
    match cause {
        host::CAUSE_NO_DISK => "insufficient_storage",
        host::CAUSE_NO_ROOM => "no_hosts_available",
        host::CAUSE_INCOMPATIBLE => "snapshot_incompatible",
        host::CAUSE_DAMAGED => "snapshot_damaged",
        _ => "agent_error",
    }
}

fn missing_state() -> AgentError {
    AgentError::Misbehaved { message: "the host agent's answer has no state".to_owned() }
}

fn fence(operation: &Operation, placed: &Placed) -> Fence {
    Fence {
        host_epoch: placed.epoch,
        revision: u64::try_from(operation.revision).unwrap_or_default(),
        operation_id: operation.id.to_string(),
        ..Default::default()
    }
}

/// `own_ms`: from the arrival of the request to the first call of the host.
fn report(state: &SandboxState, observed: Observed, own_ms: Option<f64>) -> Report {
    let own = own_ms.map(|ms| ("control_plane".to_owned(), ms));
    Report {
        observed,
        reason: state.reason.clone(),
        incarnation: state.incarnation.clone(),
        isolation: state.isolation.clone(),
        versions: state.versions.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
        steps: own.into_iter().chain(timings(state)).collect(),
        // An agent that does not say knows of memory only.
        kept: state.kept.parse().unwrap_or_default(),
    }
}

pub(super) fn timings(state: &SandboxState) -> Vec<(String, f64)> {
    state.steps.iter().map(|step| (step.name.clone(), step.ms)).collect()
}

pub(super) fn pause(attempts: i32) -> Duration {
    let doublings = u32::try_from(attempts.clamp(1, 7) - 1).unwrap_or_default();
    (PUT_OFF_FIRST * 2u32.pow(doublings)).min(PUT_OFF_MAX)
}

/// A named point at which tests let the control plane die. An armed error has no meaning here: what may fail is the call after it.
pub(super) async fn point(name: &'static str) {
    let _ = crashpoint::hit(name);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end() {
        let said: Vec<u128> = [0, 1, 2, 3, 7, 8, i32::MAX].map(|attempts| pause(attempts).as_millis()).to_vec();
        assert_eq!(said, [500, 500, 1000, 2000, 30_000, 30_000, 30_000]);
    }
}
