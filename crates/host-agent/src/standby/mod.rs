//! MicroVMs made ahead: restored from a template's booted state, or from a snapshot that is a template, made acquainted with an `/init`,
//! and stopped. They are nobody's until a create claims one, which is then the matter of a rename, a word to the VMM and one to the guest.
//! What users had running in a snapshot stands still all the while.
//!
//! ```text
//!  <pool>/standbys/standby-<slot>-<incarnation>/     laid out like a sandbox's directory: disk, memory, run/
//! ```
//!
//! There is no journal of them, because nothing of them is anybody's: a claim writes the sandbox's state into the directory and renames it to
//! the sandbox's own (`sandbox/claim.rs`). What an agent leaves here the next one ends, by the name of its directory.
//!
//! As many of each kind are kept as its creates have lately asked for at a time, as far as the host has memory that nobody needs. They
//! give way to everything else.

mod demand;
mod making;

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use futures::FutureExt as _;
use microvm::Microvm;
use model::ids::Incarnation;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::admission::Room;
use crate::sandbox::shelf::Lease;
use crate::sandbox::state::Spec;
use crate::sandbox::steps::{Context, StepError, blocking};
use demand::Demand;

pub const FOLDER: &str = "standbys";
const PREFIX: &str = "standby-";
/// Between looks at those that are ready.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// None is made while creates come: they need the processors themselves.
const AFTER_CREATES: Duration = Duration::from_millis(500);
/// After one has ended by itself.
const AFTER_DEATH: Duration = Duration::from_secs(10);
/// Of a snapshot in which none could be made.
const AFTER_FAILURE: Duration = Duration::from_secs(600);
/// After they had to give way, or one could not be made.
const PAUSE: Duration = Duration::from_secs(60);
/// Room in the pool that is left to sandboxes.
const DISK_LEFT_MIB: u64 = 2048;
/// Of the host's memory one part in so many stays free when one is made.
const MEMORY_LEFT: u64 = 4;
/// When only one part in so many is left, because guests have grown, all end.
const MEMORY_SHORT: u64 = 8;
/// Kinds whose demand is remembered, so many of templates and so many of snapshots; the one that was asked for longest ago is forgotten for a
/// new one.
const KINDS_MAX: usize = 32;

/// A microVM that stands still and is nobody's.
pub struct Standby {
    pub body: Husk,
    pub microvm: Arc<dyn Microvm>,
    /// By which its guest knows its host.
    pub control_token: String,
    /// The state that it was made of: the key of a template's, or the id of a snapshot.
    pub key: String,
    /// When its guest was last told the time: it takes no word that is older.
    told_at: SystemTime,
}

/// What a standby has on the host, made or not.
#[derive(Debug, Clone)]
pub struct Husk {
    /// Also of its control group.
    pub name: String,
    pub slot: u16,
    pub uid: u32,
    pub incarnation: Incarnation,
    pub place: PathBuf,
}

impl Husk {
    fn new(folder: &Path, slot: u16, uid: u32) -> Self {
        let incarnation = Incarnation::from_random(rand::random());
        let name = format!("{PREFIX}{slot}-{incarnation}");
        Self { place: folder.join(&name), name, slot, uid, incarnation }
    }
}

/// The slot of a standby, or of a sandbox that was one, by the name of its control group.
pub fn slot_of(name: &str) -> Option<u16> {
    name.strip_prefix(PREFIX)?.split_once('-')?.0.parse().ok()
}

/// The directories that an earlier agent has left in a pool.
pub fn left_in(pool: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(pool.join(FOLDER)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.map(|entry| entry.map(|entry| entry.path())).collect(),
    }
}

pub struct Standbys {
    folder: PathBuf,
    at_most: usize,
    books: Mutex<Books>,
    /// A create has come, or a standby has gone.
    wanted: Notify,
}

#[derive(Default)]
struct Books {
    ready: Vec<Standby>,
    kinds: HashMap<String, Kind>,
    /// Of all that are made, ready or being ended.
    slots: BTreeSet<u16>,
    /// Of which something would not go yet.
    stuck: Vec<Husk>,
    /// None is made before.
    not_before: Option<Instant>,
    /// How often all, or all of a kind, had to end: also the one that was being made then.
    ended: u64,
}

struct Kind {
    spec: Spec,
    demand: Demand,
    /// One of it could not be made: until then no other is tried.
    not_before: Option<Instant>,
}

impl Kind {
    /// Of a snapshot only when more begin with it than a fork, which is one moment's.
    fn wanted(&mut self, now: Instant) -> usize {
        let wanted = self.demand.wanted(now);
        let is_once = self.spec.snapshot.is_some() && !self.demand.has_come_back();
        if is_once || self.not_before.is_some_and(|at| now < at) { 0 } else { wanted }
    }
}

impl Standbys {
    /// Keeps at most so many.
    pub fn open(pool: &Path, at_most: usize) -> io::Result<Self> {
        let folder = pool.join(FOLDER);
        DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        Ok(Self { folder, at_most, books: Mutex::default(), wanted: Notify::new() })
    }

    /// One of that kind, if one is ready; it is the caller's from now on. Either way the kind was asked for.
    pub fn claim(&self, key: &str, spec: &Spec) -> Option<Standby> {
        let now = Instant::now();
        let mut books = self.lock();
        books.note(key, spec, now);
        let is_it = |standby: &Standby| standby.key == key && standby.is_of_use();
        let found = books.ready.iter().position(is_it).map(|position| books.ready.remove(position));
        if let Some(standby) = &found {
            books.slots.remove(&standby.body.slot);
        }
        drop(books);
        self.wanted.notify_one();
        found
    }

    /// How many are ready.
    pub fn ready(&self) -> usize {
        self.lock().ready.len()
    }

    /// Network slots of all that are made, ready or being ended.
    pub fn slots(&self) -> BTreeSet<u16> {
        self.lock().slots.clone()
    }

    /// Ends all that are ready, for what is worth more, and makes none for a while.
    pub async fn make_room(&self, context: &Context) {
        let ended: Vec<Standby> = {
            let mut books = self.lock();
            books.not_before = Some(Instant::now() + PAUSE);
            books.ended += 1;
            books.ready.drain(..).collect()
        };
        futures::future::join_all(ended.into_iter().map(|standby| self.end(context, standby))).await;
    }

    /// Nobody is to begin any more with what was made of that state.
    pub async fn end_kind(&self, context: &Context, key: &str) {
        let ended: Vec<Standby> = {
            let mut books = self.lock();
            books.ended += 1;
            books.kinds.remove(key);
            books.ready.extract_if(.., |standby| standby.key == key).collect()
        };
        futures::future::join_all(ended.into_iter().map(|standby| self.end(context, standby))).await;
    }

    /// Keeps as many ready as are wanted, until `stop`; then none.
    pub async fn keep(self: Arc<Self>, context: Arc<Context>, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let room = (context.room)().await;
            if self.ready() > 0 && room.memory_available_mib < room.memory_total_mib / MEMORY_SHORT {
                info!("the host is short of memory: what stands by ends");
                self.make_room(&context).await;
            }
            let surplus = self.lock().take_surplus(Instant::now());
            for standby in surplus {
                if !standby.is_of_use() {
                    // What ends them may end the next one, too.
                    self.pause(AFTER_DEATH);
                }
                self.end(&context, standby).await;
            }
            let stuck = std::mem::take(&mut self.lock().stuck);
            for husk in stuck {
                self.end_husk(&context, &husk).await;
            }
            let sleep = match self.refill(&context).await {
                // Perhaps another one.
                Refilled::One => continue,
                Refilled::Later(at) => at.saturating_duration_since(Instant::now()).min(LOOK_EVERY),
                Refilled::Enough => LOOK_EVERY,
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = self.wanted.notified() => {}
                () = tokio::time::sleep(sleep) => {}
            }
        }
        self.make_room(&context).await;
    }

    async fn refill(&self, context: &Context) -> Refilled {
        let (key, spec) = match self.lock().next_wanted(self.at_most, Instant::now()) {
            Next::Make(key, spec) => (key, spec),
            Next::Wait(until) => return Refilled::Later(until),
            Next::Enough => return Refilled::Enough,
        };
        if !has_room(&spec, (context.room)().await) {
            return Refilled::Later(self.pause(PAUSE));
        }
        let Some(lease) = lease(context, &key, &spec).await else {
            // It is being made, or has given way: the next create of the kind says that it is wanted.
            self.lock().kinds.remove(&key);
            return Refilled::Enough;
        };
        let ended = self.lock().ended;
        match self.make(context, lease, &spec).await {
            Ok(standby) => {
                let slot = standby.body.slot;
                let given_back = self.lock().take_in(standby, ended);
                if let Some(standby) = given_back {
                    self.end(context, standby).await;
                    return Refilled::Enough;
                }
                info!(
                    slot,
                    "a microVM of template {} with {} vCPUs and {} MiB stands by",
                    spec.template,
                    spec.vcpus,
                    spec.memory_mib
                );
                Refilled::One
            }
            Err(error) => {
                warn!(cause = error.causes(), "no microVM of template {} stands by: {error}", spec.template);
                if spec.snapshot.is_some() {
                    // It is somebody's, and may be one in which no guest can stand by here: that is nobody else's trouble.
                    if let Some(kind) = self.lock().kinds.get_mut(&key) {
                        kind.not_before = Some(Instant::now() + AFTER_FAILURE);
                    }
                    return Refilled::One;
                }
                if let (StepError::Generation(_), Some(all)) = (&error, context.template_generations.clone()) {
                    blocking(move || all.remove(&key)).await;
                }
                Refilled::Later(self.pause(PAUSE))
            }
        }
    }

    fn pause(&self, time: Duration) -> Instant {
        let mut books = self.lock();
        let until = books.not_before.max(Some(Instant::now() + time));
        books.not_before = until;
        until.expect("one of them is a time")
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Standby {
    /// It lives, and the host's clock has not been set back behind what its guest knows.
    fn is_of_use(&self) -> bool {
        self.microvm.exited().now_or_never().is_none() && self.told_at <= SystemTime::now()
    }
}

enum Refilled {
    One,
    Later(Instant),
    Enough,
}

#[derive(Debug, PartialEq)]
enum Next {
    Make(String, Spec),
    Wait(Instant),
    Enough,
}

impl Books {
    fn note(&mut self, key: &str, spec: &Spec, now: Instant) {
        let is_alike = |kind: &Kind| kind.spec.snapshot.is_some() == spec.snapshot.is_some();
        if !self.kinds.contains_key(key) && self.kinds.values().filter(|kind| is_alike(kind)).count() >= KINDS_MAX {
            let alike = self.kinds.iter().filter(|(_, kind)| is_alike(kind));
            let oldest = alike.min_by_key(|(_, kind)| kind.demand.last()).map(|(key, _)| key.clone());
            self.kinds.remove(&oldest.unwrap_or_default());
        }
        let new = || Kind { spec: spec.clone(), demand: Demand::default(), not_before: None };
        self.kinds.entry(key.to_owned()).or_insert_with(new).demand.note(now);
    }

    /// Given back when all, or all of a kind, had to end since the books were at `ended`.
    fn take_in(&mut self, standby: Standby, ended: u64) -> Option<Standby> {
        if self.ended != ended {
            return Some(standby);
        }
        self.ready.push(standby);
        None
    }

    /// What has ended, and what nobody asks for any more.
    fn take_surplus(&mut self, now: Instant) -> Vec<Standby> {
        self.kinds.retain(|_, kind| kind.demand.wanted(now) > 0);
        let kinds = &mut self.kinds;
        let mut is_wanted = |standby: &Standby| kinds.get_mut(&standby.key).is_some_and(|kind| kind.wanted(now) > 0);
        self.ready.extract_if(.., |standby| !standby.is_of_use() || !is_wanted(standby)).collect()
    }

    fn next_wanted(&mut self, at_most: usize, now: Instant) -> Next {
        if self.ready.len() >= at_most {
            return Next::Enough;
        }
        let last = self.kinds.values().filter_map(|kind| kind.demand.last()).max();
        let ready = &self.ready;
        let short = self.kinds.iter_mut().filter_map(|(key, kind)| {
            let ready = ready.iter().filter(|standby| standby.key == *key).count();
            (ready < kind.wanted(now)).then_some((ready, key, kind))
        });
        // A first one of each kind, then the one that was asked for last.
        let first = short.min_by_key(|(ready, _, kind)| (*ready, Reverse(kind.demand.last())));
        let Some((_, key, kind)) = first else { return Next::Enough };
        let not_before = self.not_before.into_iter().chain(last.map(|last| last + AFTER_CREATES)).max();
        match not_before.filter(|at| *at > now) {
            Some(at) => Next::Wait(at),
            None => Next::Make(key.clone(), kind.spec.clone()),
        }
    }
}

/// On the state that standbys of a kind are made of.
async fn lease(context: &Context, key: &str, spec: &Spec) -> Option<Lease> {
    match spec.snapshot {
        Some(id) => {
            let snapshots = context.snapshots.clone();
            blocking(move || snapshots.lease(id)).await
        }
        None => context.template_generations.as_ref().and_then(|all| all.lease(key)),
    }
}

fn has_room(spec: &Spec, room: Room) -> bool {
    let memory = u64::from(spec.memory_mib);
    room.memory_available_mib >= room.memory_total_mib / MEMORY_LEFT + memory
        && room.disk_free_mib >= DISK_LEFT_MIB + memory
}

#[cfg(test)]
mod tests {
    use model::ids::SnapshotId;

    use super::*;

    #[test]
    fn a_name_tells_the_slot() {
        let husk = Husk::new(Path::new("/pool/standbys"), 17, 4711);
        assert_eq!(slot_of(&husk.name), Some(17));
        assert!(husk.place.starts_with("/pool/standbys"));
        for other in ["", "standby-", "standby-17", "standby-x-00", "standby-70000-00", "sb0123456789abcdefghijkl"] {
            assert_eq!(slot_of(other), None, "{other}");
        }
    }

    #[test]
    fn one_is_made_of_the_kind_that_is_short_when_no_creates_come() {
        let mut books = Books::default();
        let start = Instant::now();
        let later = start + AFTER_CREATES;
        let spec = |memory_mib| Spec { memory_mib, ..Spec::unknown() };
        assert_eq!(books.next_wanted(4, start), Next::Enough);
        books.note("small", &spec(256), start);
        assert_eq!(books.next_wanted(4, start), Next::Wait(later));
        assert_eq!(books.next_wanted(4, later), Next::Make("small".to_owned(), spec(256)));
        assert_eq!(books.next_wanted(0, later), Next::Enough);
        let snapshot = Spec { snapshot: Some(SnapshotId(Default::default())), ..spec(256) };
        books.note("a fork", &snapshot, start);
        assert_eq!(books.next_wanted(4, later), Next::Make("small".to_owned(), spec(256)));
        assert!(books.kinds.remove("a fork").is_some());
        books.note("large", &spec(2048), start + Duration::from_millis(1));
        let later = later + Duration::from_millis(1);
        assert_eq!(books.next_wanted(4, later), Next::Make("large".to_owned(), spec(2048)));
        books.not_before = Some(start + PAUSE);
        assert_eq!(books.next_wanted(4, later), Next::Wait(start + PAUSE));
        for n in 0..2 * KINDS_MAX {
            books.note(&n.to_string(), &spec(256), start + Duration::from_secs(1));
        }
        assert!(books.kinds.len() == KINDS_MAX && !books.kinds.contains_key("small"));
        // Forks of many take nothing from templates.
        for n in 0..2 * KINDS_MAX {
            books.note(&format!("snapshot {n}"), &snapshot, start + Duration::from_secs(2));
        }
        assert!(books.kinds.len() == 2 * KINDS_MAX && books.kinds.contains_key("63"));
    }

    #[test]
    fn they_leave_the_host_a_part_of_its_memory_and_pool() {
        let spec = Spec { memory_mib: 512, ..Spec::unknown() };
        let room = |memory_available_mib, disk_free_mib| Room {
            memory_total_mib: 8192,
            memory_available_mib,
            disk_total_mib: 100_000,
            disk_free_mib,
        };
        assert!(has_room(&spec, room(2560, 2560)));
        assert!(!has_room(&spec, room(2559, 2560)));
        assert!(!has_room(&spec, room(2560, 2559)));
        assert!(!has_room(&spec, Room::default()));
    }
}
