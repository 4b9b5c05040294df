//! The sandboxes of this host: finds the actor of each, makes one for a new wish, takes up at start what an earlier agent left.
//!
//! Called by `rpc`. It refuses older epochs for the whole host and wishes for sandboxes that were killed; what a wish means for one
//! sandbox is its actor's business.

pub mod actor;
mod claim;
pub mod console;
mod creating;
pub mod digests;
pub mod fence;
pub mod generation;
pub mod journal;
mod mark;
mod pausing;
pub mod plan;
pub mod points;
mod recovery;
pub mod shelf;
pub mod snapshots;
mod snapshotting;
pub mod state;
pub mod steps;
mod supervisor;
pub mod template_generations;

use std::collections::{BTreeSet, HashMap, hash_map};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use model::ids::{SandboxId, SnapshotId};
use model::sandbox::{Desired, Kept, Observed};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::NoRoom;
use crate::guest::Guest;
use crate::standby;
use actor::{Actor, MAILBOX_MAX, Message, NotTaken, Published};
use fence::{Refusal, Wish};
use plan::Progress;
use snapshots::Standing;
use state::{Fence, Record, Spec, Tombstone, View};
use steps::{Body, Context, blocking};

/// How often a call looks for the actor again when it was not there yet, or ended between being found and being asked.
const LOOKUPS_MAX: usize = 5;

#[derive(Debug, thiserror::Error)]
pub enum WishError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("the call stands at epoch {epoch}, this host is at {seen}")]
    StaleEpoch { epoch: u64, seen: u64 },
    #[error("there is no such sandbox on this host")]
    UnknownSandbox,
    #[error("there is no template {0} on this host")]
    UnknownTemplate(String),
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    #[error("the sandbox cannot take a call now; try again")]
    Busy,
    #[error("the sandbox is being taken up again")]
    Restarting,
    #[error("the agent is about to end")]
    Stopping,
    #[error("the sandbox is {0}: only one that runs or is paused has a snapshot made of it")]
    NoState(Observed),
    /// A sentence for a person; the sandbox is what it was.
    #[error("{}", .0.reason)]
    NotSaved(state::Failure),
    #[error("the snapshot is not on this host")]
    SnapshotRemoved,
    #[error("look up the snapshot's files")]
    Snapshot(#[source] std::io::Error),
    #[error("look up the sandbox's journal")]
    Journal(#[from] journal::JournalError),
}

#[derive(Clone)]
struct Handle {
    mailbox: mpsc::Sender<Message>,
    published: watch::Receiver<Published>,
}

/// What stands for a sandbox in the map.
enum Entry {
    Actor(Handle),
    /// Its actor died. What it showed last is still what is there, and it is taken up again: a sandbox that runs is never absent.
    Restarting(watch::Receiver<Published>),
    /// It is being found out whether it was here before. Cancelled when that is known.
    Opening(CancellationToken),
}

impl Entry {
    fn published(&self) -> Option<&watch::Receiver<Published>> {
        match self {
            Self::Actor(handle) => Some(&handle.published),
            Self::Restarting(published) => Some(published),
            Self::Opening(_) => None,
        }
    }
}

enum Spawned {
    New(Handle),
    /// Another call was faster.
    Other,
    Buried(Tombstone),
}

/// All sandboxes of this host.
pub struct Sandboxes {
    context: Arc<Context>,
    entries: Mutex<HashMap<SandboxId, Entry>>,
    /// Users of VMMs whose journals cannot be acted on and could not be moved away.
    set_aside: Mutex<BTreeSet<u32>>,
    /// The highest epoch of this host that anybody named.
    epoch: AtomicU64,
    /// The start-up scan is done: a sandbox that is not here is not on this host.
    complete: AtomicBool,
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl Sandboxes {
    pub fn new(context: Arc<Context>, epoch: u64) -> Arc<Self> {
        Arc::new(Self {
            context,
            entries: Mutex::default(),
            set_aside: Mutex::default(),
            epoch: epoch.into(),
            complete: AtomicBool::new(false),
            tracker: TaskTracker::new(),
            stop: CancellationToken::new(),
        })
    }

    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Takes note of an epoch; the highest one stays.
    pub fn see_epoch(&self, epoch: u64) {
        self.epoch.fetch_max(epoch, Ordering::AcqRel);
    }

    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// What there is, in the order of the ids.
    pub fn list(&self) -> Vec<View> {
        let mut views = self.shown(|published| published.view.clone());
        views.sort_by(|a, b| a.id.cmp(&b.id));
        views
    }

    /// Whether a control group of this name is that of a sandbox, in whatever state, or of a standby.
    pub fn has_group(&self, name: &str) -> bool {
        match standby::slot_of(name) {
            Some(slot) => self.uids().contains(&self.context.tag.uid(slot)),
            None => name.parse::<SandboxId>().is_ok_and(|id| self.lock().contains_key(&id)),
        }
    }

    /// The users that VMMs have or may have, of sandboxes and of what stands by.
    pub fn uids(&self) -> BTreeSet<u32> {
        let slots = self.context.standbys.iter().flat_map(|standbys| standbys.slots());
        let of_standbys: BTreeSet<u32> = slots.map(|slot| self.context.tag.uid(slot)).collect();
        // One that is being claimed is in neither for a moment: whoever looks for what belongs to nobody looks twice.
        self.shown(|published| published.uid).into_iter().flatten().chain(of_standbys).collect()
    }

    /// The users of VMMs that are in no list because their journals cannot be acted on: whoever finds them living leaves them alone.
    pub async fn set_aside(&self) -> Result<BTreeSet<u32>, journal::JournalError> {
        let journal = self.context.journal.clone();
        let mut uids = blocking(move || journal.quarantined_uids()).await?;
        uids.extend(self.set_aside.lock().unwrap_or_else(PoisonError::into_inner).iter());
        Ok(uids)
    }

    fn put_aside(&self, uids: BTreeSet<u32>) {
        self.set_aside.lock().unwrap_or_else(PoisonError::into_inner).extend(uids);
    }

    pub async fn get(&self, id: &SandboxId) -> Result<Option<Published>, WishError> {
        if let Some(published) = self.lock().get(id).and_then(Entry::published) {
            return Ok(Some(published.borrow().clone()));
        }
        Ok(self.tombstone(id).await?.map(|tombstone| buried(&tombstone)))
    }

    /// The guest of a running sandbox; what it is instead, when it does not run.
    pub fn guest(&self, id: &SandboxId) -> Result<Arc<Guest>, Option<Observed>> {
        let entries = self.lock();
        let entry = entries.get(id).ok_or(None)?;
        let published = entry.published().ok_or(Some(Observed::Starting))?.borrow();
        published.guest.clone().ok_or(Some(published.view.observed))
    }

    /// Takes the wish that the sandbox runs and waits until it is settled, or `deadline`. The work goes on without the caller.
    pub async fn ensure_running(
        self: &Arc<Self>,
        id: &SandboxId,
        fence: Fence,
        spec: Spec,
        deadline: Instant,
    ) -> Result<View, WishError> {
        self.check_epoch(&fence)?;
        for _ in 0..LOOKUPS_MAX {
            let handle = match self.handle(id, deadline).await? {
                Some(handle) => handle,
                None => {
                    if let Some(tombstone) = self.tombstone(id).await? {
                        return late(&tombstone, &fence);
                    }
                    self.has_origin(&spec).await?;
                    self.admit(id, &spec).await?;
                    let wish = Wish { desired: Desired::Running, fence: fence.clone(), spec: spec.clone() };
                    match self.spawn_new(id, wish).await? {
                        Spawned::New(handle) => return Ok(settled(handle.published, &fence, deadline).await),
                        Spawned::Buried(tombstone) => return late(&tombstone, &fence),
                        Spawned::Other => continue,
                    }
                }
            };
            let (reply, answer) = oneshot::channel();
            self.send(&handle, Message::Run { fence: fence.clone(), spec: spec.clone(), reply })?;
            match answer.await {
                Ok(verdict) => {
                    verdict?;
                    return Ok(settled(handle.published, &fence, deadline).await);
                }
                // The actor ended meanwhile; the next look finds a tombstone or its successor.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
        Err(WishError::Busy)
    }

    /// Takes the wish that `kept` of the sandbox is saved and its microVM ended, and waits until it is so, or has turned out not to be possible, or
    /// `deadline`.
    pub async fn ensure_paused(
        self: &Arc<Self>,
        id: &SandboxId,
        fence: Fence,
        kept: Kept,
        deadline: Instant,
    ) -> Result<View, WishError> {
        self.check_epoch(&fence)?;
        for _ in 0..LOOKUPS_MAX {
            let Some(handle) = self.handle(id, deadline).await? else {
                return match self.tombstone(id).await? {
                    Some(tombstone) => late(&tombstone, &fence),
                    None => Err(WishError::UnknownSandbox),
                };
            };
            let (reply, answer) = oneshot::channel();
            self.send(&handle, Message::Pause { fence: fence.clone(), kept, reply })?;
            match answer.await {
                Ok(verdict) => {
                    verdict?;
                    return Ok(settled(handle.published, &fence, deadline).await);
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
        Err(WishError::Busy)
    }

    /// What a new sandbox begins with is here.
    async fn has_origin(&self, spec: &Spec) -> Result<(), WishError> {
        if let Some(id) = spec.snapshot {
            return match self.snapshot_standing(id).await? {
                Standing::Ready(_) => Ok(()),
                Standing::Absent | Standing::Removed => Err(WishError::SnapshotRemoved),
            };
        }
        let (dir, template) = (self.context.dir.clone(), spec.template.clone());
        match blocking(move || crate::template::rootfs(&dir, &template)).await {
            Some(_) => Ok(()),
            None => Err(WishError::UnknownTemplate(spec.template.to_string())),
        }
    }

    async fn snapshot_standing(&self, id: SnapshotId) -> Result<Standing, WishError> {
        let snapshots = self.context.snapshots.clone();
        blocking(move || snapshots.standing(id)).await.map_err(WishError::Snapshot)
    }

    /// Makes a snapshot of what runs, which goes on, or is paused, and waits until it is valid, or `deadline`; the bytes that it takes, and
    /// whether this call had it made. Repeated, it is the same snapshot. None at the deadline: it is still under way.
    ///
    /// The call changes nothing of the sandbox, so it has an epoch and no revision.
    pub async fn ensure_snapshot(
        self: &Arc<Self>,
        id: &SandboxId,
        epoch: u64,
        snapshot: SnapshotId,
        deadline: Instant,
    ) -> Result<Option<(u64, bool)>, WishError> {
        self.check_epoch(&Fence { epoch, ..Fence::default() })?;
        let (mut refused, mut is_made) = (None, false);
        for _ in 0..LOOKUPS_MAX {
            // Looked at anew each time: what somebody else has made meanwhile is what is asked for.
            match self.snapshot_standing(snapshot).await? {
                Standing::Ready(bytes) => return Ok(Some((bytes, is_made))),
                Standing::Removed => return Err(WishError::SnapshotRemoved),
                Standing::Absent => {}
            }
            if let Some(refused) = refused {
                return Err(refused);
            }
            let Some(handle) = self.handle(id, deadline).await? else {
                return match self.tombstone(id).await? {
                    Some(_) => Err(WishError::NoState(Observed::Killed)),
                    None => Err(WishError::UnknownSandbox),
                };
            };
            let (reply, answer) = oneshot::channel();
            self.send(&handle, Message::Snapshot { id: snapshot, reply })?;
            match tokio::time::timeout_at(deadline, answer).await {
                Err(_) => return Ok(None),
                Ok(Ok(Ok(()))) => is_made = true,
                Ok(Ok(Err(NotTaken::State(observed)))) => refused = Some(WishError::NoState(observed)),
                Ok(Ok(Err(NotTaken::Busy))) => return Err(WishError::Busy),
                Ok(Ok(Err(NotTaken::Failed(failure)))) => refused = Some(WishError::NotSaved(failure)),
                // The actor ended meanwhile.
                Ok(Err(_)) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
        Err(WishError::Busy)
    }

    /// Nobody begins with the snapshot any more. Repeatable, also for one that was never here.
    pub async fn remove_snapshot(&self, id: SnapshotId) -> Result<(), WishError> {
        let snapshots = self.context.snapshots.clone();
        blocking(move || snapshots.remove(id)).await.map_err(WishError::Snapshot)?;
        if let Some(standbys) = &self.context.standbys {
            standbys.end_kind(&self.context, &id.to_string()).await;
        }
        Ok(())
    }

    /// Takes the wish that nothing of the sandbox is left and waits until it is so, or `deadline`.
    pub async fn ensure_killed(
        self: &Arc<Self>,
        id: &SandboxId,
        fence: Fence,
        deadline: Instant,
    ) -> Result<View, WishError> {
        self.check_epoch(&fence)?;
        for _ in 0..LOOKUPS_MAX {
            let Some(handle) = self.handle(id, deadline).await? else {
                // Also for a sandbox that nobody knows there is an actor: a create that is still under way to us must find it or its grave.
                let wish = Wish { desired: Desired::Killed, fence: fence.clone(), spec: Spec::unknown() };
                match self.spawn_new(id, wish).await? {
                    Spawned::New(handle) => return Ok(settled(handle.published, &fence, deadline).await),
                    Spawned::Buried(known) if known.fence.revision > fence.revision => {
                        return Err(stale(&fence, &known.fence).into());
                    }
                    Spawned::Buried(known) => return Ok(buried(&known).view),
                    Spawned::Other => continue,
                }
            };
            let (reply, answer) = oneshot::channel();
            self.send(&handle, Message::Kill { fence: fence.clone(), reply })?;
            match answer.await {
                Ok(verdict) => {
                    verdict?;
                    return Ok(settled(handle.published, &fence, deadline).await);
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
        Err(WishError::Busy)
    }

    /// Takes no more wishes and waits until what is under way is settled, but not longer than `at_most`. What runs goes on running.
    pub async fn stop(&self, at_most: Duration) {
        let unsettled = || -> Vec<watch::Receiver<Published>> {
            let entries = self.lock();
            let all = entries.values().filter_map(Entry::published);
            all.filter(|published| !published.borrow().view.settled).cloned().collect()
        };
        self.tracker.close();
        let _ = tokio::time::timeout(at_most, async {
            for mut published in unsettled() {
                let _ = published.wait_for(|published| published.view.settled).await;
            }
        })
        .await;
        self.stop.cancel();
        let _ = tokio::time::timeout(Duration::from_secs(1), self.tracker.wait()).await;
    }

    fn check_epoch(&self, fence: &Fence) -> Result<(), WishError> {
        if self.tracker.is_closed() {
            return Err(WishError::Stopping);
        }
        let seen = self.epoch();
        if fence.epoch < seen {
            return Err(WishError::StaleEpoch { epoch: fence.epoch, seen });
        }
        self.see_epoch(fence.epoch);
        Ok(())
    }

    async fn admit(&self, id: &SandboxId, spec: &Spec) -> Result<(), WishError> {
        Ok(self.context.admit(id, spec.need()).await?)
    }

    fn send(&self, handle: &Handle, message: Message) -> Result<(), WishError> {
        match handle.mailbox.try_send(message) {
            Err(mpsc::error::TrySendError::Full(_)) => Err(WishError::Busy),
            // Closed: the reply's other end is dropped with the message, which the caller sees.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
        }
    }

    /// None when the sandbox is not here, as far as this map knows.
    async fn handle(&self, id: &SandboxId, deadline: Instant) -> Result<Option<Handle>, WishError> {
        for _ in 0..LOOKUPS_MAX {
            let opened = match self.lock().get(id) {
                None => return Ok(None),
                Some(Entry::Actor(handle)) => return Ok(Some(handle.clone())),
                Some(Entry::Restarting(_)) => return Err(WishError::Restarting),
                Some(Entry::Opening(opened)) => opened.clone(),
            };
            tokio::time::timeout_at(deadline, opened.cancelled()).await.map_err(|_| WishError::Busy)?;
        }
        Err(WishError::Busy)
    }

    async fn tombstone(&self, id: &SandboxId) -> Result<Option<Tombstone>, journal::JournalError> {
        let (journal, id) = (self.context.journal.clone(), id.clone());
        blocking(move || journal.tombstone(&id)).await
    }

    fn shown<T>(&self, part: impl Fn(&Published) -> T) -> Vec<T> {
        self.lock().values().filter_map(Entry::published).map(|published| part(&published.borrow())).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<SandboxId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An actor for a sandbox that was not here. Whoever finds that it was gives back what it was promised.
    async fn spawn_new(self: &Arc<Self>, id: &SandboxId, wish: Wish) -> Result<Spawned, WishError> {
        // In the map first, the look for a grave then: an actor is buried before it leaves the map, so nothing slips between the two.
        let opened = CancellationToken::new();
        match self.lock().entry(id.clone()) {
            hash_map::Entry::Occupied(_) => return Ok(Spawned::Other),
            hash_map::Entry::Vacant(place) => place.insert(Entry::Opening(opened.clone())),
        };
        let door = Door { sandboxes: self.clone(), id: id.clone(), opened };
        // A task of its own: a caller that leaves must not leave the door half open.
        match self.tracker.spawn(door.open(wish)).await {
            Ok(spawned) => spawned,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    fn spawn(
        self: &Arc<Self>,
        entries: &mut HashMap<SandboxId, Entry>,
        id: &SandboxId,
        body: Body,
        wish: Wish,
        progress: Progress,
    ) -> Handle {
        let (sender, mailbox) = mpsc::channel(MAILBOX_MAX);
        let (actor, published) = Actor::new(mailbox, self.context.changed.clone(), body, wish, progress);
        let handle = Handle { mailbox: sender, published };
        entries.insert(id.clone(), Entry::Actor(handle.clone()));
        self.tracker.spawn(supervisor::supervise(self.clone(), id.clone(), actor));
        handle
    }

    /// The actor has died; what it had is still there.
    fn hold(&self, id: &SandboxId) {
        if let Some(entry) = self.lock().get_mut(id)
            && let Entry::Actor(handle) = entry
        {
            *entry = Entry::Restarting(handle.published.clone());
        }
    }

    /// The actor has ended for good.
    fn forget(&self, id: &SandboxId) {
        self.lock().remove(id);
        self.context.admission.release(id);
    }
}

/// A sandbox's place in the map while it is found out whether it was here before.
struct Door {
    sandboxes: Arc<Sandboxes>,
    id: SandboxId,
    opened: CancellationToken,
}

impl Door {
    async fn open(self, wish: Wish) -> Result<Spawned, WishError> {
        let Self { sandboxes, id, .. } = &self;
        let opened = self.look(wish).await;
        if !matches!(opened, Ok(Spawned::New(_))) {
            sandboxes.context.admission.release(id);
        }
        opened
    }

    async fn look(&self, wish: Wish) -> Result<Spawned, WishError> {
        let Self { sandboxes, id, .. } = self;
        if let Some(tombstone) = sandboxes.tombstone(id).await? {
            return Ok(Spawned::Buried(tombstone));
        }
        // Of an actor that died and could not be taken up again.
        let directory = sandboxes.context.journal.directory(id);
        if blocking(move || directory.try_exists()).await.unwrap_or(true) {
            return Err(WishError::Busy);
        }
        let body = Body::new(sandboxes.context.clone(), id.clone());
        Ok(Spawned::New(sandboxes.spawn(&mut sandboxes.lock(), id, body, wish, Progress::Absent)))
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let mut entries = self.sandboxes.lock();
        if matches!(entries.get(&self.id), Some(Entry::Opening(_))) {
            entries.remove(&self.id);
        }
        self.opened.cancel();
    }
}

/// Waits until what the fence wished has come to its end, or the deadline; answers what is true then.
async fn settled(mut published: watch::Receiver<Published>, fence: &Fence, deadline: Instant) -> View {
    let end = published.wait_for(|p| p.view.settled && p.view.fence.revision >= fence.revision);
    let _ = tokio::time::timeout_at(deadline, end).await;
    let now = published.borrow();
    now.view.clone()
}

/// The answer to a wish for a sandbox that was killed.
fn late(tombstone: &Tombstone, fence: &Fence) -> Result<View, WishError> {
    if fence.revision > tombstone.fence.revision {
        Ok(buried(tombstone).view)
    } else {
        Err(stale(fence, &tombstone.fence).into())
    }
}

fn stale(fence: &Fence, seen: &Fence) -> Refusal {
    Refusal::Stale {
        epoch: fence.epoch,
        revision: fence.revision,
        seen_epoch: seen.epoch,
        seen_revision: seen.revision,
    }
}

fn buried(tombstone: &Tombstone) -> Published {
    let view = View {
        id: tombstone.id.clone(),
        observed: Observed::Killed,
        reason: String::new(),
        cause: state::Cause::Other,
        fence: tombstone.fence.clone(),
        incarnation: None,
        steps: Vec::new(),
        host_ip: String::new(),
        envd_version: String::new(),
        vcpus: 0,
        process: None,
        kept: None,
        settled: true,
    };
    Published { view, guest: None, microvm: None, console: None, uid: None }
}

/// The wish that a record holds, by what is made of it.
fn wish_of(record: &Record, progress: &Progress) -> Wish {
    let desired = match progress {
        Progress::Killing { .. } | Progress::Killed => Desired::Killed,
        Progress::Parking { .. } | Progress::Paused { .. } => Desired::Paused,
        _ => Desired::Running,
    };
    Wish { desired, fence: record.fence.clone(), spec: record.spec.clone() }
}
