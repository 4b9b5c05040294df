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
use microvm::Microvm;
use model::ids::{Incarnation, SandboxId};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::claim;
use super::console::Console;
use super::digests::{self, Before};
use super::fence::Wish;
use super::generation::{self, Files, GenerationError};
use super::journal::{Journal, JournalError};
use super::pausing::Origin;
use super::plan::{Create, Down, Progress, Step};
use super::points::{self, hit};
use super::shelf::{Lease, Making};
use super::snapshots::Snapshots;
use super::state::{Cause, Failure, FailureKind, Generation, Phase, Record, Run, Tombstone};
use super::template_generations::{Booted, TemplateGenerations};
use crate::admission::{Admission, Need, NoRoom, Room};
use crate::durable;
use crate::ground::{Ground, GroundError, Places};
use crate::guest::{Guest, GuestError};
use crate::identity::Tag;
use crate::machines::{MachineError, Machines, Order};
use crate::standby::Standbys;

/// How much of a console goes into a log line.
const CONSOLE_LOG_BYTES: usize = 2048;

/// A VMM answers in milliseconds; one that does not is killed all the same.
const LAST_WORDS_TIME_MAX: Duration = Duration::from_secs(2);
/// Between looks at the console of a guest that is coming up: it may end at any moment.
const BOOT_LOOK_EVERY: Duration = Duration::from_millis(250);

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
    context: Arc<Context>,
    id: SandboxId,
    run: Option<Run>,
    /// The last saved state; none before the first pause.
    generation: Option<Generation>,
    guest: Option<Arc<Guest>>,
    microvm: Option<Arc<dyn Microvm>>,
    console: Arc<Console>,
    /// How long the vCPUs of the last save stood still for it.
    stopped: Duration,
    /// By which control token a guest that is being resumed still knows its host.
    known_by: String,
    /// The key of a template's booted state that is not there yet, and that this create can leave behind.
    wanted: Option<String>,
    /// On the state that this create is being restored from.
    lease: Option<Lease>,
    /// The place of the snapshot that is being made.
    making: Option<Making>,
    /// What is written down names a run, of which something may exist.
    is_run_noted: AtomicBool,
    /// What a claim has written comes onto the disk meanwhile.
    settling: Option<JoinHandle<Result<(), JournalError>>>,
    /// What is written down says that it is being made, and it runs: who finds that makes it run.
    is_behind: bool,
    /// The valid state of which digests are to be made yet.
    undigested: Option<(Files, Before)>,
}

impl Body {
    pub fn new(context: Arc<Context>, id: SandboxId) -> Self {
        let console = Arc::new(Console::new(context.journal.directory(&id)));
        Self {
            context,
            id,
            run: None,
            generation: None,
            guest: None,
            microvm: None,
            console,
            stopped: Duration::ZERO,
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

    pub(super) fn context(&self) -> &Context {
        &self.context
    }

    pub(super) fn shared_context(&self) -> Arc<Context> {
        self.context.clone()
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

    pub(super) fn known_by(&self) -> &str {
        &self.known_by
    }

    pub(super) fn note_known_by(&mut self, control_token: String) {
        self.known_by = control_token;
    }

    pub(super) fn wanted(&self) -> Option<&str> {
        self.wanted.as_deref()
    }

    pub(super) fn making(&self) -> Result<&Making, StepError> {
        self.making.as_ref().ok_or(StepError::NoRun)
    }

    pub(super) fn note_making(&mut self, making: Option<Making>) -> Option<Making> {
        std::mem::replace(&mut self.making, making)
    }

    pub fn stopped(&self) -> Duration {
        self.stopped
    }

    pub(super) fn note_stopped(&mut self, stopped: Duration) {
        self.stopped = stopped;
    }

    /// From now on that is the last saved state.
    pub fn keep(&mut self, generation: Generation) {
        self.generation = Some(generation);
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

    pub(super) fn leave_digests(&mut self, files: Files, before: Before) {
        self.undigested = Some((files, before));
    }

    pub(super) fn take_undigested(&mut self) -> Option<(Files, Before)> {
        self.undigested.take()
    }

    /// Its running is to be written down when there is nothing else to do.
    pub fn is_behind(&self) -> bool {
        self.is_behind
    }

    /// Takes over a running microVM. The guest is not asked and not stopped.
    pub async fn adopt(&mut self, run: Run) -> Result<(), StepError> {
        let process = run.process.clone();
        self.take_run(run);
        let microvm = self.context.machines.adopt(&process.ok_or(StepError::NoRun)?).await?;
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
                let to = match progress {
                    Progress::Pausing { to, .. } => *to,
                    _ => self.next_generation(),
                };
                self.pause(pause, to, wish).await?;
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

    async fn create(
        &mut self,
        step: Create,
        wish: &Wish,
        give_up_at: Instant,
        stop: &CancellationToken,
    ) -> Result<(), StepError> {
        let ground = self.context.ground.clone();
        if step == Create::Reserve {
            return self.reserve(wish).await;
        }
        let run = self.run.clone().ok_or(StepError::NoRun)?;
        let places = self.places(&run);
        match step {
            Create::Reserve => {}
            Create::Network | Create::Cgroup | Create::Disk if run.standby.is_some() => {}
            Create::Memory if run.standby.is_some() => self.context.admission.made(&self.id, run.is_restored()),
            Create::Start if run.standby.is_some() => self.wake(&run).await?,
            Create::Network => ground.ensure_network(run.slot).await?,
            Create::Cgroup => ground.ensure_cgroup(&run.group(&self.id), &wish.spec).await?,
            Create::Disk => match self.origin(&run) {
                Some(from) => ground.clone_file(&from.files().disk(), &places.disk, run.uid).await?,
                None => {
                    unless_stopped(ground.ensure_base(&wish.spec), give_up_at, stop).await?;
                    ground.make_disk(&wish.spec, &places, run.uid).await?;
                }
            },
            Create::Memory => {
                match self.origin(&run) {
                    Some(from) => ground.clone_file(&from.files().memory(), &places.memory, run.uid).await?,
                    None => ground.make_memory(&wish.spec, &places, run.uid).await?,
                }
                self.context.admission.made(&self.id, run.is_restored());
            }
            Create::Start => {
                let directory = places.run.clone();
                blocking(move || std::fs::create_dir_all(directory)).await.map_err(StepError::Files)?;
                let origin = self.origin(&run);
                let is_restored = origin.is_some();
                if let (Some(from), None) = (&origin, run.generation) {
                    self.console.follow(from.files().console()).await;
                }
                let files = origin.as_ref().map(Origin::files);
                let load = match origin {
                    Some(from) => Some(self.load(from, &run, wish).await?),
                    None => None,
                };
                let (group, slot, uid) = (run.group(&self.id), run.slot, run.uid);
                let order = Order { group: &group, spec: &wish.spec, slot, uid, places: &places, load };
                // A start that is given up half way leaves no process.
                let starting = unless_stopped(self.context.machines.start(order), give_up_at, stop);
                let checking = unless_stopped(self.check(files, &places), give_up_at, stop);
                let (started, checked) = tokio::join!(starting, checking);
                let microvm = started?;
                if let Err(damage) = checked {
                    // Not an instruction of it has run.
                    microvm.kill().await.map_err(MachineError::Kill)?;
                    return Err(damage);
                }
                let record = microvm.record().clone();
                // Kept first: if the write fails, taking down must know the process.
                self.microvm = Some(microvm);
                let run = Run { process: Some(record), ..run };
                self.run = Some(run.clone());
                // The guest boots meanwhile.
                self.write(wish, Phase::Making { run }).await?;
                self.open_guest();
                if let (true, Some(microvm)) = (is_restored, &self.microvm) {
                    microvm.continue_vcpus().await.map_err(MachineError::Continue)?;
                }
            }
            Create::Health | Create::Template if self.origin(&run).is_some() => {}
            Create::Health => {
                let guest = self.guest.clone().ok_or(StepError::NoRun)?;
                let healthy = async { guest.wait_healthy().await.map_err(|_| StepError::Stopped) };
                self.unless_ended(healthy, give_up_at, stop).await?;
            }
            Create::Template => self.keep_booted(wish, &run).await?,
            Create::Init => {
                let guest = self.guest.clone().ok_or(StepError::NoRun)?;
                let init = self.init(wish, &run)?;
                let envd_version = self.unless_ended(self.introduce(&guest, &init), give_up_at, stop).await?;
                self.run = Some(Run { envd_version, ..run });
            }
            Create::Commit => match self.settling.take().filter(|_| run.standby.is_some()) {
                Some(settling) => {
                    settling.await.map_err(|error| StepError::Files(std::io::Error::other(error)))??;
                    self.is_behind = true;
                }
                None => self.write(wish, Phase::Running { run }).await?,
            },
        }
        Ok(())
    }

    /// Compares what a run begins with by its digests, in the clones that it gets: a state of the sandbox's own each time, another's once.
    async fn check(&self, from: Option<Files>, places: &Places) -> Result<(), StepError> {
        let is_known = self.lease.as_ref().is_some_and(Lease::is_checked);
        let Some(from) = from.filter(|_| !is_known) else { return Ok(()) };
        let (memory, disk) = (places.memory.clone(), places.disk.clone());
        // Whoever does not wait to the end leaves nobody reading.
        let given_up = CancellationToken::new();
        let (_guard, reading) = (given_up.clone().drop_guard(), given_up);
        let is_checked = blocking(move || digests::check(&from, &memory, &disk, &reading)).await?;
        if let (true, Some(lease)) = (is_checked, &self.lease) {
            lease.note_checked();
        }
        Ok(())
    }

    /// A standby that was claimed goes on, and begins with what the guest of its template had said.
    async fn wake(&mut self, run: &Run) -> Result<(), StepError> {
        if let Some(standby) = &run.standby {
            self.known_by.clone_from(&standby.control_token);
        }
        self.open_guest();
        let microvm = self.microvm.clone().ok_or(StepError::NoRun)?;
        microvm.continue_vcpus().await.map_err(MachineError::Continue)?;
        if let Some(from) = self.origin(run) {
            let console = self.console.clone();
            tokio::spawn(async move { console.follow(from.files().console()).await });
        }
        Ok(())
    }

    async fn reserve(&mut self, wish: &Wish) -> Result<(), StepError> {
        // Of a create that failed before this one.
        (self.settling, self.is_behind) = (None, false);
        // A new sandbox was admitted by the call that brought it; one that begins anew gave its promise back when it failed.
        self.context.admit(&self.id, wish.spec.need()).await?;
        let snapshot = wish.spec.snapshot.filter(|_| self.generation.is_none());
        (self.lease, self.wanted) = match (self.generation, snapshot) {
            (Some(_), _) => (None, None),
            (None, Some(id)) => {
                let snapshots = self.context.snapshots.clone();
                let lease = blocking(move || snapshots.lease(id)).await;
                (Some(lease.ok_or(StepError::NoSnapshot)?), None)
            }
            (None, None) => {
                let key = self.booted_key(wish).await;
                if let Some(key) = &key
                    && self.claim(key, wish).await?
                {
                    return Ok(());
                }
                let looked = match key {
                    Some(key) => self.look_for_booted(key, wish).await,
                    None => None,
                };
                match looked {
                    Some(Booted::There(lease)) => (Some(lease), None),
                    Some(Booted::Missing(key)) => (None, Some(key)),
                    None => (None, None),
                }
            }
        };
        let of_template = self.lease.as_ref().filter(|_| snapshot.is_none());
        let template_generation = of_template.map(|lease| lease.key().to_owned());
        let slot = self.context.ground.reserve_slot()?;
        let run = Run {
            incarnation: Incarnation::from_random(rand::random()),
            slot,
            uid: self.context.tag.uid(slot),
            access_token: token()?,
            control_token: token()?,
            process: None,
            generation: self.generation,
            snapshot,
            template_generation,
            envd_version: String::new(),
            standby: None,
        };
        // One that boots takes the first identity that it hears.
        self.known_by.clone_from(&run.control_token);
        // Kept first: if the write fails, the slot must be given back.
        self.run = Some(run.clone());
        self.write(wish, Phase::Making { run }).await?;
        self.console.clear().await.map_err(StepError::Files)
    }

    /// Waits for the guest, but no longer than its microVM lives, the create may take, and nobody wishes it dead.
    async fn unless_ended<T>(
        &self,
        work: impl Future<Output = Result<T, StepError>>,
        give_up_at: Instant,
        stop: &CancellationToken,
    ) -> Result<T, StepError> {
        let look = async {
            loop {
                tokio::time::sleep(BOOT_LOOK_EVERY).await;
                self.console_text().await;
            }
        };
        let result = tokio::select! {
            biased;
            () = stop.cancelled() => Err(StepError::Stopped),
            how = self.exited() => Err(StepError::Ended(how)),
            result = work => result,
            () = tokio::time::sleep_until(give_up_at.into()) => Err(StepError::Silent),
            () = look => unreachable!("it looks for ever"),
        };
        if matches!(result, Err(StepError::Ended(_) | StepError::Silent | StepError::Init(_))) {
            let console = self.console_text().await;
            tracing::warn!(sandbox.id = %self.id, console, "the guest of sandbox {} did not come up", self.id);
        }
        result
    }

    pub(super) fn init(&self, wish: &Wish, run: &Run) -> Result<api::guest::Init, StepError> {
        use base64::Engine as _;
        Ok(api::guest::Init {
            incarnation: run.incarnation.to_string(),
            access_token: run.access_token.clone(),
            control_token: run.control_token.clone(),
            // It is told the time when it is told the rest.
            timestamp: String::new(),
            entropy: base64::engine::general_purpose::STANDARD.encode(random::<32>()?),
            env_vars: wish.spec.envs.clone(),
            default_user: wish.spec.default_user.clone(),
            default_workdir: String::new(),
            hostname: self.id.to_string(),
            sandbox_id: self.id.to_string(),
            template_id: wish.spec.template.to_string(),
        })
    }

    /// What is not to be restored from once more: a template's state whose guest does not come up.
    async fn distrust(&self, created: &Result<(), StepError>) {
        // A standby has shown that its state is good; what becomes of it then is its own fault.
        let run = self.run.as_ref().filter(|run| run.standby.is_none());
        let key = run.and_then(|run| run.template_generation.clone());
        let is_its_fault = matches!(
            created,
            Err(StepError::Generation(_)
                | StepError::Machine(_)
                | StepError::Ended(_)
                | StepError::Init(_)
                | StepError::Silent)
        );
        if let (true, Some(key), Some(generations)) = (is_its_fault, key, self.context.template_generations.clone()) {
            if let Some(standbys) = &self.context.standbys {
                standbys.distrust(&self.context, &key).await;
            }
            blocking(move || generations.remove(&key)).await;
        }
    }

    fn open_guest(&mut self) {
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
                    if let Ok(microvm) = self.context.machines.adopt(&process).await {
                        microvm.kill().await.map_err(MachineError::Kill)?;
                    }
                }
                if let Some(run) = &self.run {
                    self.context.ground.sweep(run.uid).await?;
                }
                self.microvm = None;
            }
            Down::Network => {
                if let Some(run) = &self.run {
                    self.context.ground.release_network(run.slot).await?;
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
                self.run = None;
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
                self.run = None;
            }
        }
        Ok(())
    }

    pub(super) async fn write(&self, wish: &Wish, phase: Phase) -> Result<(), StepError> {
        let was_standby = phase.run().is_some_and(|run| run.standby.is_some());
        let record = self.record(wish, phase);
        let journal = self.context.journal.clone();
        let names_run = record.phase.run().is_some();
        let written = blocking(move || {
            journal.write(&record)?;
            if was_standby && let Err(error) = claim::remove_mark(&journal.directory(&record.id)) {
                tracing::warn!(sandbox.id = %record.id, "the mark of a standby stays: {error}");
            }
            Ok::<_, JournalError>(())
        })
        .await;
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

/// Waits for what may be dropped in the middle, but no longer than the create may take and nobody wishes the sandbox dead.
async fn unless_stopped<T, E: Into<StepError>>(
    work: impl Future<Output = Result<T, E>>,
    give_up_at: Instant,
    stop: &CancellationToken,
) -> Result<T, StepError> {
    tokio::select! {
        biased;
        () = stop.cancelled() => Err(StepError::Stopped),
        result = work => result.map_err(Into::into),
        () = tokio::time::sleep_until(give_up_at.into()) => Err(StepError::Late),
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
