//! Takes up what an earlier agent left: adopts what runs, undoes what was half made, finishes what was to be killed.
//!
//! ```text
//!  Making   -> when it was a standby: adopted, and the create goes on, or failed like Running; else everything undone, then failed "interrupted", or paused again; the same wish, sent again, starts anew under a new
//!              incarnation
//!  Running  -> adopted when its process is the one that was written down and answers; else failed
//!  Snapshotting -> adopted like Running, and it goes on; a snapshot that is not valid is gone
//!  Pausing  -> when the saved state is whole: paused; else adopted, and it goes on running
//!  Paused   -> what is left of its last run is taken down
//!  Failed   -> what is left of it is taken down
//!  Killing  -> goes on
//! ```
//!
//! A guest notices nothing: its microVM is neither stopped nor asked to.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use model::ids::SandboxId;
use tracing::{error, info, warn};

use super::actor::CREATE_TIME_MAX;
use super::generation;
use super::journal::{Found, JournalError, Unreadable};
use super::plan::{Create, Progress, Undone};
use super::state::{Cause, Failure, FailureKind, Phase, Record, Run};
use super::steps::{Body, blocking};
use super::{Sandboxes, wish_of};

/// Whose the slot is that a record names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Claim {
    /// Nobody's in this agent, or the record is not to be trusted.
    New,
    /// This sandbox's already.
    Kept,
}

impl Sandboxes {
    /// Reads every journal and starts the actors. Afterwards the list of this host is complete.
    pub async fn recover(self: &Arc<Self>) -> Result<(), JournalError> {
        let journal = self.context.journal.clone();
        let found = blocking(move || {
            journal.prune_tombstones(std::time::SystemTime::now());
            journal.scan()
        })
        .await?;
        let mut records = Vec::new();
        for one in found {
            match one {
                Found::Sandbox(record) => records.push(*record),
                Found::Quarantined { name, why, uids } => self.leave_alone(&name, &why, uids),
            }
        }
        // Of two that name the same slot the older claim counts; sorting makes the choice the same at each start.
        records.sort_by(|a, b| a.id.cmp(&b.id));
        let count = records.len();
        let begin = Instant::now();
        let adoptions = records.into_iter().map(|record| self.take_up(record, Claim::New));
        futures::future::join_all(adoptions).await;
        self.complete.store(true, Ordering::Release);
        self.context.changed.notify_one();
        info!(count, duration_ms = begin.elapsed().as_millis(), "took up {count} sandboxes");
        Ok(())
    }

    /// It is in no list from now on. Its VMM, if that lives, goes on.
    fn leave_alone(&self, name: &str, why: &Unreadable, uids: BTreeSet<u32>) {
        error!(sandbox.id = %name, ?uids, "sandbox {name} was put into quarantine: {why}; what runs of it is left alone");
        self.put_aside(uids);
    }

    async fn take_up(self: &Arc<Self>, record: Record, claim: Claim) {
        let id = record.id.clone();
        if let Some(run) = record.phase.run()
            && !self.context.ground.claim_slot(run.slot)
            && claim == Claim::New
        {
            error!(sandbox.id = %id, slot = run.slot, "sandbox {id} names a network slot that another one has; it is put into quarantine");
            let journal = self.context.journal.clone();
            let path = journal.directory(&id);
            let result = blocking(move || {
                journal.put_aside(&path, path.file_name().and_then(|n| n.to_str()).unwrap_or("?"), &Unreadable::Foreign)
            });
            if let Err(cause) = result.await {
                error!(sandbox.id = %id, "{cause}");
            }
            return;
        }
        let mut body = Body::new(self.context.clone(), id.clone());
        let failing = |kind, reason: &str| Progress::Failing { failure: failure(kind, reason), done: None };
        let record_of = record.clone();
        let progress = match record.phase {
            Phase::Making { run } if run.standby.is_some() => {
                self.context.admission.remember(&id, record.spec.need(), is_unsaved(&run));
                // The agent that claimed it may have died before the disk had heard of it.
                let (journal, claimed) = (self.context.journal.clone(), id.clone());
                if let Err(error) = blocking(move || journal.settle(&claimed)).await {
                    warn!(sandbox.id = %id, "sandbox {id} may be lost with the host's power: {error}");
                }
                match body.adopt(run).await {
                    Ok(()) => {
                        // Perhaps it goes on already, and perhaps the guest knows who it is: both may be said again.
                        let give_up_at = Instant::now() + CREATE_TIME_MAX;
                        Progress::Making { done: Some(Create::Memory), give_up_at }
                    }
                    // It may have been acknowledged, and what it has written belongs to somebody.
                    Err(error) => {
                        warn!(sandbox.id = %id, cause = error.causes(), "sandbox {id} cannot be adopted: {error}");
                        failing(FailureKind::Exited, "the microVM ended while the host agent was away")
                    }
                }
            }
            Phase::Making { run } => {
                let begun_with = run.generation;
                body.take_run(run);
                match begun_with {
                    Some(generation) => {
                        let reason = "interrupted: the host agent ended while the sandbox was being resumed";
                        let failure = failure(FailureKind::Interrupted, reason);
                        Progress::Parking { generation, failure: Some(failure), done: None }
                    }
                    None => failing(
                        FailureKind::Interrupted,
                        "interrupted: the host agent ended while the sandbox was being made",
                    ),
                }
            }
            Phase::Pausing { run, to } => {
                self.context.admission.remember(&id, record.spec.need(), is_unsaved(&run));
                let directory = self.context.journal.directory(&id);
                if blocking(move || generation::is_sealed(&directory, to)).await.unwrap_or(false) {
                    body.take_run(run);
                    body.keep(to, None);
                    Progress::Parking { generation: to, failure: None, done: None }
                } else {
                    match body.adopt(run).await {
                        Ok(()) => {
                            let reason = "the host agent ended while the sandbox was being saved";
                            let failure = failure(FailureKind::Pause, reason);
                            Progress::Reverting { what: Undone::Pause { to, failure }, done: None }
                        }
                        Err(error) => {
                            warn!(sandbox.id = %id, cause = error.causes(), "sandbox {id} cannot be adopted: {error}");
                            failing(FailureKind::Exited, "the microVM ended while the host agent was away")
                        }
                    }
                }
            }
            Phase::Paused { generation, failure, leftovers } => {
                body.keep(generation, None);
                match leftovers {
                    Some(run) => {
                        body.take_run(run);
                        Progress::Parking { generation, failure, done: None }
                    }
                    None => Progress::Paused { generation, failure },
                }
            }
            phase @ (Phase::Running { .. } | Phase::Snapshotting { .. }) => {
                let stands_still = matches!(phase, Phase::Snapshotting { .. });
                let run = phase.run().cloned().expect("it has one while it runs");
                self.context.admission.remember(&id, record.spec.need(), is_unsaved(&run));
                match body.adopt(run).await {
                    Ok(()) if stands_still => Progress::Reverting { what: Undone::Snapshot, done: None },
                    Ok(()) => Progress::Running,
                    Err(error) => {
                        warn!(sandbox.id = %id, cause = error.causes(), "sandbox {id} cannot be adopted: {error}");
                        failing(FailureKind::Exited, "the microVM ended while the host agent was away")
                    }
                }
            }
            Phase::Failed { failure, leftovers } => match leftovers {
                Some(run) => {
                    body.take_run(run);
                    Progress::Failing { failure, done: None }
                }
                None => Progress::Failed { failure },
            },
            Phase::Killing { run } => {
                if let Some(run) = run {
                    body.take_run(run);
                }
                Progress::Killing { done: Some(super::plan::Down::Begin) }
            }
        };
        if let Some(generation) = body.generation() {
            let files = generation::sealed_files(&self.context.journal.directory(&id), generation);
            body.keep(generation, blocking(move || generation::kept(&files)).await.ok());
        }
        let wish = wish_of(&record_of, &progress);
        self.spawn(&mut self.lock(), &id, body, wish, progress);
    }

    /// After its task died, which had claimed the slot: it stays claimed meanwhile, because what uses it may run.
    pub(super) async fn take_up_again(self: &Arc<Self>, id: &SandboxId) -> Result<(), JournalError> {
        let journal = self.context.journal.clone();
        let wanted = id.clone();
        match blocking(move || journal.read_one(&wanted)).await? {
            Some(Found::Sandbox(record)) => self.take_up(*record, Claim::Kept).await,
            Some(Found::Quarantined { name, why, uids }) => {
                self.leave_alone(&name, &why, uids);
                self.forget(id);
            }
            None => self.forget(id),
        }
        self.context.changed.notify_one();
        Ok(())
    }
}

fn failure(kind: FailureKind, reason: &str) -> Failure {
    Failure { kind, reason: reason.to_owned(), cause: Cause::Other }
}

/// Whether its memory is in no file yet that holds room for it.
fn is_unsaved(run: &Run) -> bool {
    run.is_restored() || run.process.as_ref().is_some_and(|process| process.driver == microvm::firecracker::NAME)
}
