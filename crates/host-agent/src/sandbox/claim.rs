//! A create that begins with a standby: its directory becomes the sandbox's, with what is written down of it, by one rename.
//!
//! Before the rename it is nobody's, and an agent that dies leaves it to be ended. After it the journal says `Making` with a run that was a
//! standby: whoever finds that adopts the microVM and goes on with the create, instead of undoing it. The disk hears of all this while the
//! guest takes its identity; the create is acknowledged when both are done.
//!
//! A host that goes down in between may keep the rename and lose what was written before it. [`mark`] tells that from a sandbox whose
//! state was damaged: its microVM ended with the host, and nobody had been told of it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use crashpoint::hit;
use microvm::ProcessRecord;
use model::ids::{Incarnation, SandboxId};

use super::fence::Wish;
use super::journal::{Journal, JournalError, STATE_FILE, encode};
use super::mark;
use super::state::{Phase, Record, Run, WasStandby};
use super::steps::{Body, StepError, blocking, token};
use crate::durable;
use crate::standby::{self, Standby};

impl Body {
    /// Takes over a standby, if one is ready. False: the create goes the long way.
    pub(super) async fn claim(&mut self, key: &str, wish: &Wish) -> Result<bool, StepError> {
        let Some(standbys) = self.context.standbys.clone() else { return Ok(false) };
        let directory = self.directory();
        // Of one that begins anew there is one already.
        if blocking(move || directory.try_exists()).await.map_err(StepError::Files)? {
            return Ok(false);
        }
        let Some(standby) = standbys.claim(key, &wish.spec) else { return Ok(false) };
        let claimed = self.take_standby(&standby, wish).await;
        if claimed.is_err() {
            // It is still nobody's.
            let context = self.context.clone();
            tokio::spawn(async move { standbys.end(&context, standby).await });
        }
        match claimed {
            // Its microVM ended in this very moment: the long way is open.
            Err(StepError::Machine(_)) => Ok(false),
            claimed => claimed.map(|()| true),
        }
    }

    async fn take_standby(&mut self, standby: &Standby, wish: &Wish) -> Result<(), StepError> {
        hit("standby.claim.before")?;
        let husk = &standby.body;
        let directory = self.directory();
        let inside =
            |path: &Path| path.strip_prefix(&husk.place).map_or_else(|_| path.to_owned(), |rest| directory.join(rest));
        let before = standby.microvm.record();
        let process = ProcessRecord { dir: inside(&before.dir), memory: inside(&before.memory), ..before.clone() };
        let run = Run {
            incarnation: Incarnation::from_random(rand::random()),
            slot: husk.slot,
            uid: husk.uid,
            access_token: token()?,
            control_token: token()?,
            process: Some(process.clone()),
            generation: None,
            snapshot: wish.spec.snapshot,
            template_generation: wish.spec.snapshot.is_none().then(|| standby.key.clone()),
            envd_version: String::new(),
            from_disk: false,
            standby: Some(WasStandby { name: husk.name.clone(), control_token: standby.control_token.clone() }),
        };
        // It finds the process by its number, so it does not matter that its files are still elsewhere.
        let microvm = self.context.machines.adopt(&process)?;
        let (journal, from) = (self.context.journal.clone(), husk.place.clone());
        let record = self.record(wish, Phase::Making { run: run.clone() });
        blocking(move || journal.claim(&record, &from)).await?;
        self.note_claimed(run, microvm);
        hit("standby.claim.after")?;
        Ok(())
    }
}

impl Journal {
    /// Makes the directory of a standby the sandbox's, whose there must be none. Nothing of it need be on the disk yet: [`Self::settle`].
    fn claim(&self, record: &Record, from: &Path) -> Result<(), JournalError> {
        let claimed = || -> io::Result<()> {
            mark::put(from)?;
            let mut state = File::options();
            let mut state = state.write(true).create_new(true).mode(0o600).open(from.join(STATE_FILE))?;
            io::Write::write_all(&mut state, &encode(record))?;
            fs::rename(from, self.directory(&record.id))
        };
        claimed().map_err(|cause| JournalError::Write { id: record.id.clone(), cause })
    }

    /// When this returns, a power loss cannot take back what [`Self::claim`] has done.
    pub(super) fn settle(&self, id: &SandboxId) -> Result<(), JournalError> {
        let directory = self.directory(id);
        let settled = || -> io::Result<()> {
            File::open(directory.join(STATE_FILE))?.sync_all()?;
            durable::sync_directory(&directory)?;
            durable::sync_directory(&self.sandboxes)?;
            // From where it was renamed: on some file systems it could be there again.
            match self.sandboxes.parent().map(|pool| durable::sync_directory(&pool.join(standby::FOLDER))) {
                Some(Err(error)) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        };
        settled().map_err(|cause| JournalError::Write { id: id.clone(), cause })
    }
}
