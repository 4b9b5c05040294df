//! Lets a sandbox run again because a call needs that, where its policy says so (`auto_resume`). Whoever calls while it is under way waits
//! for the same resume. Of the disk alone nothing runs again by itself: what would answer the call has ended with the memory.

use std::time::Duration;

use model::ids::{SandboxId, TeamId};
use model::sandbox::Status;
use store::StoreError;
use store::audit::Actor;
use store::operations::Phase;
use store::quotas::Exceeded;
use store::sandboxes::Sandbox;
use store::wishes::{ResumeOf, Turned};
use tokio::time::Instant;

use crate::app::App;
use crate::reconcile::driver;

/// Between looks at a resume of which nobody knows the operation any more.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
pub enum NotAwake {
    /// It neither runs nor would run again for a call.
    #[error("the sandbox is {0}")]
    State(Status),
    #[error("its host has no room for it now")]
    NoRoom,
    #[error("its team has as much as it may have")]
    OverQuota(Exceeded),
    /// As the resume's operation says it.
    #[error("{message}")]
    Failed { code: String, message: String },
    #[error("the sandbox was not resumed in time")]
    Late,
    #[error("the sandbox is gone")]
    Gone,
    #[error("the control plane made a mistake")]
    Mistake,
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The sandbox when it runs, at once if it does. `deadline` is that of the caller, not of the resume, which goes on without it.
pub async fn awake(app: &App, sandbox: Sandbox, actor: &Actor, deadline: Instant) -> Result<Sandbox, NotAwake> {
    let mut sandbox = sandbox;
    let mut is_asked = false;
    loop {
        match sandbox.status() {
            Status::Running => return Ok(sandbox),
            Status::Resuming => {}
            // Once: who has paused it since then wishes that it stay so.
            Status::Pausing | Status::Paused if sandbox.runs_again() && !is_asked => {}
            other => return Err(NotAwake::State(other)),
        }
        if std::mem::replace(&mut is_asked, true) {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        if Instant::now() >= deadline {
            return Err(NotAwake::Late);
        }
        let wished = wish(app, sandbox.team, &sandbox.id, ResumeOf::Call, actor).await?;
        let operation = match wished {
            Turned::Opened(operation) => Some(operation.id),
            Turned::UnderWay(operation) => Some(operation),
            Turned::Is => None,
            Turned::Wrong(status) => return Err(NotAwake::State(status)),
            Turned::NoRoom => return Err(NotAwake::NoRoom),
            Turned::OverQuota(exceeded) => return Err(NotAwake::OverQuota(exceeded)),
            Turned::Missing => return Err(NotAwake::Gone),
        };
        if let Some(operation) = operation {
            let ended = app.outcomes.wait(operation, deadline).await?;
            if let Some(Phase::Failed { code, message }) = ended.map(|operation| operation.phase) {
                return Err(NotAwake::Failed { code, message });
            }
        }
        sandbox = app.store.sandbox(sandbox.team, &sandbox.id).await?.ok_or(NotAwake::Gone)?;
    }
}

/// Writes the wish that a sandbox run again, and sets to work on it. Who asked may go; what is answered is how it stands then.
pub async fn wish(app: &App, team: TeamId, id: &SandboxId, of: ResumeOf, actor: &Actor) -> Result<Turned, NotAwake> {
    let (worker, actor, id) = (app.clone(), actor.clone(), id.clone());
    let wished = app.tracker.spawn(async move {
        let wished = worker.store.wish_resumed(team, &id, of, &worker.lease(), &actor).await?;
        let _ = crashpoint::hit("cp.resume.written");
        if let Turned::Opened(operation) = &wished {
            driver::work(&worker, operation.clone(), None);
        }
        Ok(wished)
    });
    wished.await.map_err(|_| NotAwake::Mistake)?
}
