//! Lets a sandbox run again because a call needs that, where its policy says so (`auto_resume`). Whoever calls while it is under way waits
//! for the same resume. Of the disk alone nothing runs again by itself: what would answer the call has ended with the memory.

use model::sandbox::{Kept, Status};
use store::StoreError;
use store::audit::Actor;
use store::operations::Phase;
use store::sandboxes::{Sandbox, Turned};
use tokio::time::Instant;

use crate::app::App;
use crate::reconcile::driver;

#[derive(Debug, thiserror::Error)]
pub enum NotAwake {
    /// It neither runs nor would run again for a call.
    #[error("the sandbox is {0}")]
    State(Status),
    #[error("its host has no room for it now")]
    NoRoom,
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
    loop {
        let status = sandbox.status();
        match status {
            Status::Running => return Ok(sandbox),
            Status::Pausing | Status::Paused | Status::Resuming if wakes(&sandbox) => {}
            other => return Err(NotAwake::State(other)),
        }
        if Instant::now() >= deadline {
            return Err(NotAwake::Late);
        }
        let (worker, actor, team, id) = (app.clone(), actor.clone(), sandbox.team, sandbox.id.clone());
        let wished = app.tracker.spawn(async move {
            let wished = worker.store.wish_resumed(team, &id, &worker.lease(), &actor).await?;
            if let Turned::Opened(operation) = &wished {
                driver::work(&worker, operation.clone(), None);
            }
            Ok::<_, StoreError>(wished)
        });
        let operation = match wished.await.map_err(|_| NotAwake::Mistake)?? {
            Turned::Opened(operation) => Some(operation.id),
            Turned::UnderWay(operation) => Some(operation),
            Turned::Is => None,
            Turned::Wrong(status) => return Err(NotAwake::State(status)),
            Turned::NoRoom => return Err(NotAwake::NoRoom),
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

fn wakes(sandbox: &Sandbox) -> bool {
    sandbox.policy.auto_resume && sandbox.kept == Kept::Memory
}
