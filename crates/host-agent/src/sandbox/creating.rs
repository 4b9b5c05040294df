//! The steps of a create, and of a resume, which is a create that begins with the sandbox's own saved state. As dumb as the others: `steps`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use model::ids::Incarnation;
use model::sandbox::Kept;
use tokio_util::sync::CancellationToken;

use super::digests;
use super::fence::Wish;
use super::generation::{self, Files};
use super::pausing::Origin;
use super::plan::Create;
use super::shelf::{GENERATION, Lease};
use super::state::{Phase, Run};
use super::steps::{Body, StepError, blocking, random, token};
use super::template_generations::Booted;
use crate::disk::extents::{self, PIECE};
use crate::ground::Places;
use crate::machines::{MachineError, Order};

/// A guest that has just booted has less; of a larger one this is a beginning.
const WARM_MIB_MAX: usize = 128;
/// Between looks at the console of a guest that is coming up: it may end at any moment.
const BOOT_LOOK_EVERY: Duration = Duration::from_millis(250);
/// Of what reads ahead and is held; a part of what it is held for.
const HELD_LOOK_EVERY: Duration = Duration::from_micros(300);
/// It answers within milliseconds, and no guest depends on it.
const METADATA_TIME_MAX: Duration = Duration::from_secs(1);

impl Body {
    pub(super) async fn create(
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
                let is_filled = match self.origin(&run).filter(|_| run.is_restored()) {
                    Some(from) => {
                        ground.clone_file(&from.files().memory(), &places.memory, run.uid).await?;
                        false
                    }
                    None => {
                        let is_filled = self.context.machines.driver().await?.boots_into_its_file();
                        ground.make_memory(&wish.spec, &places, run.uid, is_filled).await?;
                        is_filled
                    }
                };
                self.context.admission.made(&self.id, !is_filled);
            }
            Create::Start => {
                let directory = places.run.clone();
                blocking(move || std::fs::create_dir_all(directory)).await.map_err(StepError::Files)?;
                let origin = self.origin(&run);
                let is_restored = run.is_restored();
                let earlier = origin.as_ref().filter(|_| run.generation.is_none() && is_restored);
                let (console, earlier) = (self.console.clone(), earlier.map(|from| from.files().console()));
                let files = origin.as_ref().map(Origin::files);
                let load = match origin {
                    Some(from) => self.load(from, &run, wish).await?,
                    None => None,
                };
                let (group, slot, uid) = (run.group(&self.id), run.slot, run.uid);
                let order = Order { group: &group, spec: &wish.spec, slot, uid, places: &places, load };
                let began = Instant::now();
                // A start that is given up half way leaves no process.
                let starting = unless_stopped(self.context.machines.start(order), give_up_at, stop);
                let checking = unless_stopped(self.check(files, &places), give_up_at, stop);
                let (started, checked) = if is_restored {
                    let following = async {
                        if let Some(earlier) = earlier {
                            console.follow(earlier).await;
                        }
                    };
                    let (started, checked, ()) = tokio::join!(starting, checking, following);
                    (started, checked)
                } else {
                    // It runs, and writes to its disk, as soon as it is there.
                    checking.await?;
                    (starting.await, Ok(()))
                };
                self.started = began.elapsed();
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
                let reading_on = Held::hold(&self.is_reading_held);
                self.write(wish, Phase::Making { run }).await?;
                drop(reading_on);
                self.open_guest();
                if let (true, Some(microvm)) = (is_restored, &self.microvm) {
                    let began = Instant::now();
                    microvm.continue_vcpus().await.map_err(MachineError::Continue)?;
                    self.started += began.elapsed();
                }
            }
            Create::Health | Create::Template if run.is_restored() => {}
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
                self.describe_to_guest(wish).await;
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
        let Some(from) = from else { return Ok(()) };
        let (memory, disk) = (places.memory.clone(), places.disk.clone());
        if self.lease.as_ref().is_some_and(Lease::is_checked) {
            // What the comparison would have done besides; nobody waits for it.
            let is_held = self.is_reading_held.clone();
            tokio::task::spawn_blocking(move || warm(&memory, &is_held));
            return Ok(());
        }
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
        let began = Instant::now();
        microvm.continue_vcpus().await.map_err(MachineError::Continue)?;
        self.started = began.elapsed();
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
        let mut from_disk = false;
        (self.lease, self.wanted) = match (self.generation, snapshot) {
            (Some(generation), _) => {
                from_disk = is_disk_alone(generation::sealed_files(&self.directory(), generation)).await?;
                (None, None)
            }
            (None, Some(id)) => {
                let snapshots = self.context.snapshots.clone();
                let lease = blocking(move || snapshots.lease(id)).await.ok_or(StepError::NoSnapshot)?;
                from_disk = is_disk_alone(generation::sealed_files(lease.place(), GENERATION)).await?;
                let files = generation::sealed_files(lease.place(), GENERATION);
                if blocking(move || generation::stands_still(&files)).await?
                    && self.claim(&id.to_string(), wish).await?
                {
                    return Ok(());
                }
                (Some(lease), None)
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
            from_disk,
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

    /// For software in the guest that asks the VMM's metadata service who it is, where there is one. envd does not need it.
    async fn describe_to_guest(&self, wish: &Wish) {
        let Some(microvm) = &self.microvm else { return };
        let metadata =
            serde_json::json!({ "instanceID": self.id.to_string(), "envID": wish.spec.template.to_string() });
        match tokio::time::timeout(METADATA_TIME_MAX, microvm.set_metadata(&metadata)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(sandbox.id = %self.id, "the metadata service of the guest was not told: {error}");
            }
            Err(_) => tracing::warn!(sandbox.id = %self.id, "the metadata service of the guest does not answer"),
        }
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
    pub(super) async fn distrust(&self, created: &Result<(), StepError>) {
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
                standbys.end_kind(&self.context, &key).await;
            }
            blocking(move || generations.remove(&key)).await;
        }
    }
}

/// While it is there, nothing is read ahead: what the create waits for would stand in line behind it (9 ms measured, of 12).
struct Held(Arc<AtomicBool>);

impl Held {
    fn hold(is_held: &Arc<AtomicBool>) -> Self {
        is_held.store(true, Ordering::Relaxed);
        Self(is_held.clone())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// Brings what the guest will touch first into the page cache while its VMM starts. A clone has none of its own, and each page that the guest
/// has to wait for costs it many times what reading them in order does.
fn warm(memory: &Path, is_held: &AtomicBool) {
    let read = || -> io::Result<()> {
        let file = File::open(memory)?;
        let mut piece = vec![0; usize::try_from(PIECE).expect("a MiB fits")];
        for at in extents::data(&file)?.into_iter().take(WARM_MIB_MAX) {
            while is_held.load(Ordering::Relaxed) {
                std::thread::sleep(HELD_LOOK_EVERY);
            }
            // Short at the end of the file.
            let _ = file.read_at(&mut piece, at * PIECE)?;
        }
        Ok(())
    };
    if let Err(error) = read() {
        tracing::debug!("read the memory ahead: {error}");
    }
}

/// Whether what begins with that state is booted from its disk.
async fn is_disk_alone(files: Files) -> Result<bool, StepError> {
    Ok(blocking(move || generation::kept(&files)).await? == Kept::Disk)
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
