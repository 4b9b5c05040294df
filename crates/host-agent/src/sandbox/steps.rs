//! Does the steps. Dumb on purpose: no step decides whether it is wanted; each may be repeated; what a create makes, taking down removes,
//! whether or not it was made.
//!
//! Before and after each step stands a crash point, `create.<step>.before`, `kill.<step>.after` and so on: `points`.

use std::error::Error as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use microvm::{Microvm, ProcessRecord};
use model::ids::{Incarnation, SandboxId};
use model::sandbox::Kept;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::console::Console;
use super::digests::{self, Before};
use super::fence::Wish;
use super::generation::{self, Files, GenerationError};
use super::journal::{Journal, JournalError};
use super::plan::{Create, Down, Progress, Step};
use super::points::{self, hit};
use super::shelf::{Lease, Making};
use super::snapshots::Snapshots;
use super::state::{Cause, Failure, FailureKind, Generation, Phase, Record, Run, Tombstone};
use super::template_generations::TemplateGenerations;
use crate::admission::{Admission, Need, NoRoom, Room};
use crate::durable;
use crate::ground::{Ground, GroundError, Places};
use crate::guest::{Guest, GuestError};
use crate::identity::Tag;
use crate::machines::{MachineError, Machines};
use crate::standby::Standbys;

/// How much of a console goes into a log line.
const CONSOLE_LOG_BYTES: usize = 2048;

/// A VMM answers in milliseconds; one that does not is killed all the same.
const LAST_WORDS_TIME_MAX: Duration = Duration::from_secs(2);

/// What all sandboxes of the host share.
pub struct Context {
    pub dir: PathBuf,
    pub tag: Tag,
    pub journal: Journal,
    pub ground: Arc<dyn Ground>,
    pub machines: Machines,
    /// None where every create boots.
    pub template_generations: Option<Arc<TemplateGenerations>>,
    pub snapshots: Arc<Snapshots>,
    pub digests: digests::Queue,
    /// None where creates claim nothing that was made ahead.
    pub standbys: Option<Arc<Standbys>>,
    pub admission: Admission,
    pub room: Box<dyn Fn() -> BoxFuture<'static, Room> + Send + Sync>,
    /// Woken when what the control plane should know has changed.
    pub changed: Arc<Notify>,
}

impl Context {
    /// Promises the sandbox what it needs. What is there for speed alone gives way.
    pub async fn admit(&self, id: &SandboxId, need: Need) -> Result<(), NoRoom> {
        let admitted = self.admission.admit(id, need, (self.room)().await);
        let is_short = matches!(admitted, Err(NoRoom::Disk { .. } | NoRoom::Memory { .. }));
        if is_short && self.admission.is_within_promises(need, (self.room)().await) {
            self.make_room().await;
            return self.admission.admit(id, need, (self.room)().await);
        }
        admitted
    }

    /// Ends and removes all that is there for speed alone.
    pub async fn make_room(&self) {
        // First, because they share their blocks with what they were made of.
        if let Some(standbys) = &self.standbys {
            standbys.make_room(self).await;
        }
        if let Some(generations) = self.template_generations.clone() {
            blocking(move || generations.make_room()).await;
        }
    }
}

/// A step failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error(transparent)]
    Ground(#[from] GroundError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    #[error(transparent)]
    Generation(#[from] GenerationError),
    #[error("a saved state may take {wanted} MiB and {left} MiB of disk are left on the host")]
    NoDisk { wanted: u64, left: u64 },
    #[error("the snapshot that it is made of is not on this host any more")]
    NoSnapshot,
    #[error("the snapshot is being made already, or was removed")]
    SnapshotTaken,
    #[error("the guest does not let itself be saved")]
    Prepare(#[source] GuestError),
    #[error("the guest has not written all to its disk in time")]
    NotFlushed,
    #[error("the guest did not take its identity")]
    Init(#[source] GuestError),
    #[error("the guest did not answer in time")]
    Silent,
    #[error("the host did not get it made in time")]
    Late,
    #[error("the microVM ended while it was starting: {0}")]
    Ended(String),
    #[error("stopped by a kill")]
    Stopped,
    #[error(transparent)]
    Injected(#[from] crashpoint::Injected),
    #[error("make or remove the files of the run")]
    Files(#[source] std::io::Error),
    #[error("the journal has no run for this step")]
    NoRun,
}

impl StepError {
    /// For the sandbox's owner: says what, not where on the host.
    pub fn public(&self) -> String {
        match self {
            Self::Journal(error) if error.is_full() => "the host's disk is full".to_owned(),
            Self::Generation(error) if error.is_full() => "the host's disk is full".to_owned(),
            Self::Machine(MachineError::Save(error)) if error.is_full() => "the host's disk is full".to_owned(),
            Self::Journal(_) | Self::Files(_) | Self::NoRun => "the host could not write its files".to_owned(),
            other => other.to_string(),
        }
    }

    pub fn cause(&self) -> Cause {
        match self {
            Self::NoDisk { .. } => Cause::NoDisk,
            Self::NoRoom(_) => Cause::NoRoom,
            Self::Journal(error) if error.is_full() => Cause::NoDisk,
            Self::Generation(error) if error.is_full() => Cause::NoDisk,
            Self::Machine(MachineError::Save(error)) if error.is_full() => Cause::NoDisk,
            Self::Ground(error) if error.is_full() => Cause::NoDisk,
            Self::Generation(GenerationError::Incompatible(_)) => Cause::Incompatible,
            Self::Generation(GenerationError::Damaged(_) | GenerationError::Read(_)) => Cause::Damaged,
            _ => Cause::Other,
        }
    }

    /// The causes below, for the log.
    pub fn causes(&self) -> String {
        let mut text = String::new();
        let mut cause = self.source();
        while let Some(error) = cause {
            text = format!("{text}{}{error}", if text.is_empty() { "" } else { ": " });
            cause = error.source();
        }
        text
    }
}

/// What becomes of a sandbox whose run is taken down.
enum Fate {
    /// It stays known, and its saved state, if it has one.
    Paused(Generation, Option<Failure>),
    /// It stays known, and its disk too if it ever ran.
    Failed(Failure),
    Killed,
}

impl Fate {
    fn phase(&self, leftovers: Option<Run>) -> Phase {
        match self {
            Self::Paused(generation, failure) => {
                Phase::Paused { generation: *generation, failure: failure.clone(), leftovers }
            }
            Self::Failed(failure) => Phase::Failed { failure: failure.clone(), leftovers },
            Self::Killed => Phase::Killing { run: leftovers },
        }
    }
}

/// What a sandbox has on the host, and the hands that make and remove it.
pub struct Body {
    pub(super) context: Arc<Context>,
    pub(super) id: SandboxId,
    pub(super) run: Option<Run>,
    /// The last saved state; none before the first pause.
    pub(super) generation: Option<Generation>,
    kept: Option<Kept>,
    pub(super) guest: Option<Arc<Guest>>,
    pub(super) microvm: Option<Arc<dyn Microvm>>,
    pub(super) console: Arc<Console>,
    /// How long the vCPUs of the last save stood still for it.
    pub(super) stopped: Duration,
    /// How long the VMM took at the last start: to be there, and to let its vCPUs go on.
    pub(super) started: Duration,
    /// Something is being written down that the create waits for.
    pub(super) is_reading_held: Arc<AtomicBool>,
    /// The last guest that was to be saved let its users' processes stand still.
    pub(super) is_quiet: bool,
    /// By which control token a guest that is being resumed still knows its host.
    pub(super) known_by: String,
    /// The key of a template's booted state that is not there yet, and that this create can leave behind.
    pub(super) wanted: Option<String>,
    /// On the state that this create is being restored from.
    pub(super) lease: Option<Lease>,
    /// The place of the snapshot that is being made.
    pub(super) making: Option<Making>,
    /// What is written down names a run, of which something may exist.
    is_run_noted: AtomicBool,
    /// What a claim has written comes onto the disk meanwhile.
    pub(super) settling: Option<JoinHandle<Result<(), JournalError>>>,
    /// What is written down says that it is being made, and it runs: who finds that makes it run.
    pub(super) is_behind: bool,
    /// The valid state of which digests are to be made yet.
    pub(super) undigested: Option<(Files, Before)>,
}

impl Body {
    pub fn new(context: Arc<Context>, id: SandboxId) -> Self {
        let console = Arc::new(Console::new(context.journal.directory(&id)));
        Self {
            context,
            id,
            run: None,
            generation: None,
            kept: None,
            guest: None,
            microvm: None,
            console,
            stopped: Duration::ZERO,
            started: Duration::ZERO,
            is_reading_held: Arc::default(),
            is_quiet: false,
            known_by: String::new(),
            wanted: None,
            lease: None,
            making: None,
            is_run_noted: AtomicBool::new(false),
            settling: None,
            is_behind: false,
            undigested: None,
        }
    }

    pub fn id(&self) -> &SandboxId {
        &self.id
    }

    pub(super) fn directory(&self) -> PathBuf {
        self.context.journal.directory(&self.id)
    }

    pub(super) fn run(&self) -> Result<&Run, StepError> {
        self.run.as_ref().ok_or(StepError::NoRun)
    }

    pub fn generation(&self) -> Option<Generation> {
        self.generation
    }

    pub(super) fn making(&self) -> Result<&Making, StepError> {
        self.making.as_ref().ok_or(StepError::NoRun)
    }

    pub fn stopped(&self) -> Duration {
        self.stopped
    }

    pub fn started(&self) -> Duration {
        self.started
    }

    /// From now on that is the last saved state, and so much of the sandbox is in it, if that is known.
    pub fn keep(&mut self, generation: Generation, kept: Option<Kept>) {
        self.generation = Some(generation);
        self.kept = kept;
    }

    /// What the last saved state is of; none where there is none, or it is not known.
    pub fn kept(&self) -> Option<Kept> {
        self.kept
    }

    pub fn incarnation(&self) -> Option<&Incarnation> {
        self.run.as_ref().map(|run| &run.incarnation)
    }

    pub fn uid(&self) -> Option<u32> {
        self.run.as_ref().map(|run| run.uid)
    }

    pub fn guest(&self) -> Option<&Arc<Guest>> {
        self.guest.as_ref()
    }

    pub fn microvm(&self) -> Option<&Arc<dyn Microvm>> {
        self.microvm.as_ref()
    }

    pub fn console(&self) -> &Arc<Console> {
        &self.console
    }

    pub fn envd_version(&self) -> String {
        self.run.as_ref().map(|run| run.envd_version.clone()).unwrap_or_default()
    }

    pub fn process(&self) -> Option<ProcessRecord> {
        self.run.as_ref().and_then(|run| run.process.clone())
    }

    pub fn host_ip(&self) -> String {
        self.run.as_ref().map(|run| self.context.ground.host_ip(run.slot)).unwrap_or_default()
    }

    /// A run that a journal names; whether anything of it exists is not known.
    pub fn take_run(&mut self, run: Run) {
        self.generation = self.generation.or(run.generation);
        self.run = Some(run);
        *self.is_run_noted.get_mut() = true;
    }

    /// A standby is this sandbox's from now on.
    pub(super) fn note_claimed(&mut self, run: Run, microvm: Arc<dyn Microvm>) {
        self.take_run(run);
        self.microvm = Some(microvm);
        let (journal, id) = (self.context.journal.clone(), self.id.clone());
        self.settling = Some(tokio::task::spawn_blocking(move || journal.settle(&id)));
    }

    /// Its running is to be written down when there is nothing else to do.
    pub fn is_behind(&self) -> bool {
        self.is_behind
    }

    /// Takes over a running microVM. The guest is not asked and not stopped.
    pub async fn adopt(&mut self, run: Run) -> Result<(), StepError> {
        let process = run.process.clone();
        self.take_run(run);
        let microvm = self.context.machines.adopt(&process.ok_or(StepError::NoRun)?)?;
        self.microvm = Some(microvm);
        self.open_guest();
        Ok(())
    }

    /// Returns when the microVM has ended, and how.
    pub async fn exited(&self) -> String {
        match &self.microvm {
            Some(microvm) => microvm.exited().await.to_string(),
            None => std::future::pending().await,
        }
    }

    /// The end of the guest's console, for the log.
    pub async fn console_text(&self) -> String {
        let tail = self.console.tail(self.microvm.as_ref(), CONSOLE_LOG_BYTES).await.unwrap_or_default();
        String::from_utf8_lossy(&tail).chars().filter(|c| !c.is_control() || *c == '\n').collect()
    }

    /// Writes down that the sandbox runs, and at which revision.
    pub async fn note_running(&mut self, wish: &Wish) -> Result<(), StepError> {
        let run = self.run.clone().ok_or(StepError::NoRun)?;
        self.write(wish, Phase::Running { run }).await?;
        self.is_behind = false;
        Ok(())
    }

    pub async fn perform(
        &mut self,
        step: Step,
        wish: &Wish,
        progress: &Progress,
        give_up_at: Instant,
        stop: &CancellationToken,
    ) -> Result<(), StepError> {
        if !matches!(step, Step::Create(_)) {
            self.lease = None;
        }
        if !matches!(step, Step::Snapshot(_) | Step::Revert(_)) {
            self.abandon_snapshot().await;
        }
        let [before, after] = points::around(step);
        hit(before)?;
        match step {
            Step::Create(create) => {
                let created = self.create(create, wish, give_up_at, stop).await;
                if create == Create::Commit || created.is_err() {
                    self.distrust(&created).await;
                    self.lease = None;
                }
                created?;
            }
            Step::GiveUp => {}
            Step::Pause(pause) => {
                if let Progress::Pausing { to, kept, .. } = progress {
                    self.pause(pause, *to, *kept, wish).await?;
                }
            }
            Step::Snapshot(snapshot) => {
                if let Progress::Snapshotting { to, .. } = progress {
                    self.snapshot(snapshot, *to, wish).await?;
                }
            }
            Step::Copy => {
                if let Progress::Copying { to, generation, .. } = progress {
                    self.copy(*generation, *to).await?;
                }
            }
            Step::Revert(revert) => {
                if let Progress::Reverting { what, .. } = progress {
                    self.revert(revert, what, wish).await?;
                }
            }
            Step::Park(down) => {
                if let Progress::Parking { generation, failure, .. } = progress {
                    self.down(down, wish, &Fate::Paused(*generation, failure.clone())).await?;
                }
            }
            Step::Fail(down) => {
                let failure = match progress {
                    Progress::Failing { failure, .. } => failure.clone(),
                    _ => Failure { kind: FailureKind::Create, reason: "unknown".to_owned(), cause: Cause::Other },
                };
                self.down(down, wish, &Fate::Failed(failure)).await?;
            }
            Step::Kill(down) => self.down(down, wish, &Fate::Killed).await?,
        }
        hit(after)?;
        Ok(())
    }

    pub(super) fn open_guest(&mut self) {
        if let Some(run) = &self.run {
            let dial = self.context.ground.dial(run.slot);
            self.guest = Some(Arc::new(Guest::new(dial, run.incarnation.clone(), &run.access_token)));
        }
    }

    /// Takes down one kind of thing.
    async fn down(&mut self, step: Down, wish: &Wish, fate: &Fate) -> Result<(), StepError> {
        match step {
            Down::Begin => {
                let phase = fate.phase(self.run.clone());
                match self.write(wish, phase).await {
                    // A kill is what makes room; the wish comes again if we die before its end.
                    Err(StepError::Journal(error)) if error.is_full() => {
                        tracing::warn!(sandbox.id = %self.id, "{error}: taking down sandbox {} goes on without it", self.id);
                    }
                    other => other?,
                }
            }
            Down::Guest => {
                if let Some(guest) = self.guest.take() {
                    guest.close();
                }
            }
            Down::Microvm => {
                if matches!(fate, Fate::Failed(_) | Fate::Paused(_, Some(_))) {
                    // The sandbox stays known, and its last words are what people ask for; a VMM that no longer speaks has none.
                    let _ = tokio::time::timeout(LAST_WORDS_TIME_MAX, self.console_text()).await;
                }
                if let Some(microvm) = &self.microvm {
                    microvm.kill().await.map_err(MachineError::Kill)?;
                } else if let Some(process) = self.run.as_ref().and_then(|run| run.process.clone()) {
                    // Written down by an earlier agent, not adopted because it was to end anyway.
                    if let Ok(microvm) = self.context.machines.adopt(&process) {
                        microvm.kill().await.map_err(MachineError::Kill)?;
                    }
                }
                if let Some(run) = &self.run {
                    self.context.ground.sweep(run.uid).await?;
                    self.context.ground.detach_disk(run.slot).await?;
                }
                self.microvm = None;
            }
            Down::Network => {
                if let Some(run) = &self.run {
                    match fate {
                        // Whoever waits for a pause waits for what is kept.
                        Fate::Paused(_, None) => self.context.ground.release_network_soon(run.slot).await?,
                        _ => self.context.ground.release_network(run.slot).await?,
                    }
                }
            }
            Down::Cgroup => {
                let group = self.run.as_ref().map_or_else(|| self.id.to_string(), |run| run.group(&self.id));
                self.context.ground.release_cgroup(&group).await?;
            }
            Down::Files => {
                let keeps_disk = matches!(fate, Fate::Failed(failure) if failure.kind == FailureKind::Exited);
                let (is_paused, is_killed) = (matches!(fate, Fate::Paused(..)), matches!(fate, Fate::Killed));
                let generation = self.generation;
                let directory = self.directory();
                blocking(move || {
                    durable::remove_tree(&directory.join("run"))?;
                    durable::remove(&directory.join("memory"))?;
                    if is_paused && generation.is_some() {
                        generation::keep_only(&directory, generation)?;
                    } else if is_killed {
                        // Before the tombstone is written: on a full disk this is what makes room for it.
                        generation::keep_only(&directory, None)?;
                    }
                    if keeps_disk { Ok(()) } else { durable::remove(&directory.join("disk")) }
                })
                .await
                .map_err(StepError::Files)?;
            }
            Down::Settle => {
                match self.write(wish, fate.phase(None)).await {
                    // What stands there is as true: the run that was to be was never written down.
                    Err(StepError::Journal(error)) if error.is_full() && !self.is_run_noted.load(Ordering::Relaxed) => {
                        tracing::warn!(sandbox.id = %self.id, "{error}: why sandbox {} is what it was is not written down", self.id);
                    }
                    other => other?,
                }
                self.leave_slot();
                self.context.admission.release(&self.id);
                self.make_digests();
            }
            Down::Tombstone => {
                let tombstone = Tombstone { id: self.id.clone(), fence: wish.fence.clone() };
                let journal = self.context.journal.clone();
                blocking(move || journal.bury(&tombstone)).await?;
            }
            Down::Directory => {
                let journal = self.context.journal.clone();
                let id = self.id.clone();
                blocking(move || journal.remove(&id)).await?;
                self.leave_slot();
            }
        }
        Ok(())
    }

    /// Nothing names the run any more, and its slot may be another's.
    fn leave_slot(&mut self) {
        if let Some(run) = self.run.take() {
            self.context.ground.free_slot(run.slot);
        }
    }

    pub(super) async fn write(&self, wish: &Wish, phase: Phase) -> Result<(), StepError> {
        let record = self.record(wish, phase);
        let journal = self.context.journal.clone();
        let names_run = record.phase.run().is_some();
        let written = blocking(move || journal.write(&record)).await;
        match &written {
            Ok(()) => self.is_run_noted.store(names_run, Ordering::Relaxed),
            // It has failed before what was there was exchanged.
            Err(error) if error.is_full() => {}
            Err(_) => _ = self.is_run_noted.fetch_or(names_run, Ordering::Relaxed),
        }
        Ok(written?)
    }

    pub(super) fn record(&self, wish: &Wish, phase: Phase) -> Record {
        Record {
            id: self.id.clone(),
            tag: self.context.tag.to_string(),
            fence: wish.fence.clone(),
            spec: wish.spec.clone(),
            phase,
        }
    }

    pub(super) fn places(&self, run: &Run) -> Places {
        Places::new(&self.context.journal.directory(&self.id), &run.incarnation)
    }
}

/// File work off the async threads. A panic in it is a panic here.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// 256 bits from the kernel, as hex digits.
pub fn token() -> Result<String, StepError> {
    Ok(hex::encode(random::<32>()?))
}

pub fn random<const N: usize>() -> Result<[u8; N], StepError> {
    use rand::TryRngCore as _;
    let mut bytes = [0; N];
    rand::rngs::OsRng
        .try_fill_bytes(&mut bytes)
        .map_err(|error| GroundError::new("the host has no random numbers", error))?;
    Ok(bytes)
}
