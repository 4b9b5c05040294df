//! The ground of a real host: network slots, the storage pool and control groups put together.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::v1::hosts::HostFacts;
use async_trait::async_trait;
use futures::future::BoxFuture;
use microvm::Tap;
use microvm::qemu::Qemu;
use model::shape::TemplateName;
use procfs::Current as _;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::admission::Room;
use crate::cgroup::{Cgroups, Limits};
use crate::config::Config;
use crate::denied::Denied;
use crate::disk::{DeviceMapper, DiskChoice, DiskError, Disks, Makings, Pool, PoolError};
use crate::ground::{Ground, GroundError, Places};
use crate::guest::{Dial, ENVD_PORT};
use crate::identity::Tag;
use crate::network::{Network, NetworkConfig, NetworkError, SlotId};
use crate::sandbox::journal::{Found, Journal, JournalError};
use crate::sandbox::state::Spec;
use crate::sandbox::steps::blocking;
use crate::{durable, leaks, standby, sweep};

/// Between looks at the rules that stand between guests and the host: other programs of a host flush and reload theirs.
const GUARD_EVERY: Duration = Duration::from_secs(30);

const NO_LANDLOCK: &str = "Jail: this kernel has no Landlock (Linux 5.13, security option lsm=landlock); a VMM that was taken over can \
     read what every user of this host can read.";

#[derive(Debug, thiserror::Error)]
pub enum GroundOpen {
    #[error("open the network of the sandboxes")]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Pool(#[from] PoolError),
    #[error("WRENN_DISK is device-mapper, but {0}; put that right (docs/how-to/disks.md), or set WRENN_DISK=reflink")]
    NoDeviceMapper(String),
    #[error("take up the disks' devices")]
    Devices(#[source] io::Error),
    #[error("make the journals' directories")]
    Directories(#[source] io::Error),
    #[error(transparent)]
    Journals(#[from] JournalError),
    #[error("end what stood by")]
    Standbys(#[source] io::Error),
    #[error("look for living microVMs")]
    Living(#[source] io::Error),
    #[error("remove the control groups")]
    Cgroups(#[source] io::Error),
}

impl GroundOpen {
    /// Starting again does not help: somebody has to change something first.
    pub fn is_config(&self) -> bool {
        match self {
            Self::Pool(error) => error.is_config(),
            Self::Journals(error) => error.is_config(),
            Self::NoDeviceMapper(_) => true,
            _ => false,
        }
    }
}

pub struct RealGround {
    tag: Tag,
    pool: Arc<Pool>,
    disks: Arc<Disks>,
    makings: Makings,
    cgroups: Arc<Cgroups>,
    network: Arc<Network>,
    denied: tokio::sync::Mutex<Denied>,
    /// Slots that were in use at the start and nobody has claimed yet.
    unclaimed: Mutex<BTreeSet<u16>>,
}

/// What journals name and what lives. Nothing is moved here: the scan that takes sandboxes up does that.
struct InUse {
    slots: BTreeSet<u16>,
    /// Names of directories, also of sandboxes that cannot be read; and what else control groups are named by.
    groups: BTreeSet<String>,
}

impl RealGround {
    /// The pool first: its journals say which slots and groups are in use.
    pub async fn open(config: &Config, tag: &Tag) -> Result<Self, GroundOpen> {
        let (dir, pool_mib, choice, own) = (config.dir.clone(), config.pool_mib, config.disk, tag.clone());
        let closing = config.stop_all;
        let (pool, disks, cgroups, in_use) = blocking(move || -> Result<_, GroundOpen> {
            if choice == DiskChoice::DeviceMapper
                && !closing
                && let Some(lack) = DeviceMapper::missing()
            {
                return Err(GroundOpen::NoDeviceMapper(lack));
            }
            let pool = if closing { Pool::open_to_close(&dir)? } else { Pool::open(&dir, pool_mib)? };
            if choice == DiskChoice::DeviceMapper && !closing && !pool.has_devices() {
                return Err(GroundOpen::NoDeviceMapper("the file system of the pool is mounted nodev".to_owned()));
            }
            DeviceMapper::resume_all(own.as_str()).map_err(GroundOpen::Devices)?;
            let in_use = in_use(pool.path(), &own)?;
            let disks = Disks::open(&pool, own.as_str(), &in_use.slots, choice).map_err(GroundOpen::Devices)?;
            let cgroups = Cgroups::open(&dir, own.as_str());
            cgroups.remove_orphans(|name| in_use.groups.contains(name));
            match pool.remove_unused_bases() {
                Ok(0) => {}
                Ok(count) => tracing::info!("removed {count} bases of templates that are no longer published"),
                Err(error) => warn!("bases that nobody needs stay: {error}"),
            }
            Ok((pool, disks, cgroups, in_use))
        })
        .await?;
        let mut denied = Denied::new(config);
        let network = Network::open(NetworkConfig {
            tag: tag.to_string(),
            premade: usize::from(config.slot_pool),
            in_use: in_use.slots.iter().copied().filter_map(SlotId::new).collect(),
            deny: denied.look().await,
        })
        .await?;
        let pool = Arc::new(pool);
        Ok(Self {
            tag: tag.clone(),
            makings: Makings::new(pool.clone()),
            pool,
            disks: Arc::new(disks),
            cgroups: Arc::new(cgroups),
            network,
            denied: tokio::sync::Mutex::new(denied),
            unclaimed: Mutex::new(in_use.slots),
        })
    }

    pub fn pool_dir(&self) -> PathBuf {
        self.pool.path().to_owned()
    }

    /// Keeps network slots made ahead until `stop`.
    pub async fn keep_ready(self: Arc<Self>, stop: CancellationToken) {
        tokio::select! {
            () = self.network.clone().keep_ready() => {}
            () = stop.cancelled() => {}
        }
    }

    /// Keeps the rules of the host in force, and up with the addresses of the host and the control plane, until `stop`.
    pub async fn guard(self: Arc<Self>, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(GUARD_EVERY) => {}
                () = stop.cancelled() => return,
            }
            let deny = self.denied.lock().await.look().await;
            if let Err(error) = self.network.guard(deny).await {
                tracing::error!("the rules that keep guests from this host cannot be checked: {error}");
            }
        }
    }

    /// Takes down everything in the kernel. Only when no sandbox is left.
    pub async fn close(&self) -> Result<(), GroundOpen> {
        self.network.close_all().await?;
        let (cgroups, disks, pool) = (self.cgroups.clone(), self.disks.clone(), self.pool.clone());
        blocking(move || -> Result<(), GroundOpen> {
            cgroups.close().map_err(GroundOpen::Cgroups)?;
            disks.close().map_err(GroundOpen::Devices)?;
            Ok(pool.close()?)
        })
        .await
    }

    /// Nothing where the kernel does not tell, so that nothing is admitted on a guess.
    pub async fn room(&self) -> Room {
        let pool = self.pool.clone();
        blocking(move || {
            let memory = procfs::Meminfo::current().ok();
            let mib = |bytes: u64| bytes >> 20;
            Room {
                memory_total_mib: memory.as_ref().map_or(0, |memory| mib(memory.mem_total)),
                memory_available_mib: memory.as_ref().and_then(|memory| memory.mem_available).map_or(0, mib),
                disk_total_mib: pool.total_mib(),
                disk_free_mib: pool.free_mib(),
            }
        })
        .await
    }

    pub fn cgroup_driver(&self) -> String {
        self.cgroups.driver()
    }

    /// Plain sentences about where sandboxes stand.
    pub fn notes(&self) -> Vec<String> {
        let landlock = (!Qemu::files_are_confined()).then(|| NO_LANDLOCK.to_owned());
        self.pool.notes().iter().chain(self.cgroups.notes()).cloned().chain(landlock).collect()
    }

    /// Removes the empty control groups of sandboxes that nobody knows.
    pub async fn remove_orphan_groups(&self, is_known: impl Fn(&str) -> bool + Send + 'static) {
        let cgroups = self.cgroups.clone();
        blocking(move || cgroups.remove_orphans(is_known)).await;
    }

    /// `standbys`: the slots of what is counted by nobody, because how many there are at an instant says nothing.
    pub async fn count(&self, sandboxes: usize, standbys: impl Fn() -> BTreeSet<u16>) -> BTreeMap<String, u64> {
        // Also of those that are gone after the look.
        let before = standbys();
        let census = self.network.census(|| before.iter().copied().chain(standbys()).filter_map(SlotId::new).collect());
        let network = census.await.inspect_err(|error| warn!("the network was not counted: {error}")).ok();
        let before = standbys();
        let (pool, disks, cgroups, tag) =
            (self.pool.clone(), self.disks.clone(), self.cgroups.clone(), self.tag.clone());
        let look =
            move || (leaks::living(&tag), leaks::groups(&cgroups), disks.devices(), leaks::count(&pool, network));
        let (living, groups, devices, mut counts) = blocking(look).await;
        let apart: BTreeSet<u16> = before.into_iter().chain(standbys()).collect();
        let mut add =
            |kind: &str, count: usize| counts.insert(kind.to_owned(), u64::try_from(count).unwrap_or(u64::MAX));
        if let Some(living) = living {
            let uids: BTreeSet<u32> = apart.iter().map(|slot| self.tag.uid(*slot)).collect();
            add("microvms", living.difference(&uids).count());
        }
        if let Ok(devices) = devices {
            add("disk_devices", devices.iter().filter(|slot| !apart.contains(slot)).count());
        }
        let is_apart = |name: &String| standby::slot_of(name).is_some_and(|slot| apart.contains(&slot));
        add("cgroups", groups.iter().filter(|name| !is_apart(name)).count());
        counts.insert("sandboxes".to_owned(), u64::try_from(sandboxes).unwrap_or(u64::MAX));
        counts
    }

    /// What the machine has; what only the agent knows is left empty.
    pub async fn hardware(&self) -> HostFacts {
        let room = self.room().await;
        let pool = self.pool_dir();
        let disk = blocking(move || rustix::fs::statvfs(&pool).map_or(0, |fs| fs.f_blocks * fs.f_frsize)).await;
        let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
        HostFacts {
            arch: std::env::consts::ARCH.to_owned(),
            cpu_cores: i64::try_from(cores).unwrap_or(i64::MAX),
            memory_mb: i64::try_from(room.memory_total_mib).unwrap_or(i64::MAX),
            disk_gb: i64::try_from(disk >> 30).unwrap_or(i64::MAX),
            ..HostFacts::default()
        }
    }
}

fn in_use(pool: &Path, tag: &Tag) -> Result<InUse, GroundOpen> {
    let journal = Journal::open(pool, tag.as_str()).map_err(GroundOpen::Directories)?;
    let mut used = InUse { slots: BTreeSet::new(), groups: BTreeSet::new() };
    let mut uids = journal.quarantined_uids()?;
    for found in journal.look()? {
        match found {
            Found::Sandbox(record) => {
                if let Some(run) = record.phase.run() {
                    used.slots.insert(run.slot);
                    used.groups.insert(run.group(&record.id));
                }
                used.groups.insert(record.id.to_string());
            }
            Found::Quarantined { name, uids: its, .. } => {
                uids.extend(its);
                used.groups.insert(name);
            }
        }
    }
    end_standbys(pool, tag, &used.slots, &uids).map_err(GroundOpen::Standbys)?;
    // A slot in which something lives is in use, whatever the journals say, and so is one whose files lie in quarantine.
    uids.extend(sweep::living(tag.uids()).map_err(GroundOpen::Living)?);
    used.slots.extend(uids.into_iter().filter_map(|uid| tag.slot(uid)));
    Ok(used)
}

/// What an earlier agent kept ready is nobody's. Of a slot that somebody has, only the directory goes.
fn end_standbys(pool: &Path, tag: &Tag, taken: &BTreeSet<u16>, not_ours: &BTreeSet<u32>) -> io::Result<()> {
    for place in standby::left_in(pool)? {
        let slot = place.file_name().and_then(|name| standby::slot_of(name.to_str()?));
        if let Some(slot) = slot.filter(|slot| !taken.contains(slot) && !not_ours.contains(&tag.uid(*slot))) {
            // In what does not end there is still something: it keeps its slot, and its directory for the next start.
            if let Err(error) = sweep::sweep(tag.uid(slot)) {
                warn!("what stood by in slot {slot} does not end: {error}");
                continue;
            }
        }
        durable::remove_tree(&place)?;
    }
    Ok(())
}

/// The way to envd of the guest in one slot.
struct SlotDial {
    network: Arc<Network>,
    slot: SlotId,
}

impl Dial for SlotDial {
    fn dial(&self) -> BoxFuture<'static, io::Result<TcpStream>> {
        let (network, slot) = (self.network.clone(), self.slot);
        Box::pin(async move { network.connect(slot, ENVD_PORT).await })
    }
}

fn number(slot: u16) -> SlotId {
    SlotId::new(slot).expect("slots come from the network or from a journal that was checked")
}

fn network_failed(error: NetworkError) -> GroundError {
    match error {
        NetworkError::Exhausted => GroundError::new("the host has no network slot left", error),
        error => GroundError::new("the host could not set up the sandbox's network", error),
    }
}

#[async_trait]
impl Ground for RealGround {
    fn reserve_slot(&self) -> Result<u16, GroundError> {
        self.network.reserve().map(SlotId::number).map_err(network_failed)
    }

    fn claim_slot(&self, slot: u16) -> bool {
        let named = self.unclaimed.lock().unwrap_or_else(PoisonError::into_inner).remove(&slot);
        named || SlotId::new(slot).is_some_and(|slot| self.network.claim(slot))
    }

    fn free_slot(&self, slot: u16) {
        self.network.free(number(slot));
    }

    async fn ensure_network(&self, slot: u16) -> Result<(), GroundError> {
        self.network.ensure(number(slot)).await.map(drop).map_err(network_failed)
    }

    async fn release_network(&self, slot: u16) -> Result<(), GroundError> {
        self.network.release(number(slot)).await.map_err(network_failed)
    }

    async fn release_network_soon(&self, slot: u16) -> Result<(), GroundError> {
        self.network.release_soon(number(slot)).await.map_err(network_failed)
    }

    fn tap(&self, slot: u16) -> Option<Tap> {
        Some(self.network.slot(number(slot)).tap())
    }

    fn dial(&self, slot: u16) -> Arc<dyn Dial> {
        Arc::new(SlotDial { network: self.network.clone(), slot: number(slot) })
    }

    fn host_ip(&self, slot: u16) -> String {
        number(slot).host_ip().to_string()
    }

    async fn ensure_cgroup(&self, group: &str, spec: &Spec) -> Result<(), GroundError> {
        let (cgroups, group) = (self.cgroups.clone(), group.to_owned());
        let limits = Limits { vcpus: spec.vcpus, memory_mib: spec.memory_mib };
        blocking(move || cgroups.ensure(&group, limits))
            .await
            .map_err(|error| GroundError::new("the host could not limit the sandbox", error))
    }

    fn cgroup_files(&self, group: &str) -> Vec<PathBuf> {
        self.cgroups.entrances(group)
    }

    async fn release_cgroup(&self, group: &str) -> Result<(), GroundError> {
        let (cgroups, group) = (self.cgroups.clone(), group.to_owned());
        blocking(move || cgroups.release(&group))
            .await
            .map_err(|error| GroundError::new("the host could not remove the sandbox's limits", error))
    }

    async fn edition(&self, template: &TemplateName) -> Result<Option<String>, GroundError> {
        let (pool, template) = (self.pool.clone(), template.clone());
        let edition = blocking(move || pool.edition(&template)).await;
        edition.map_err(|error| GroundError::new("the host could not read the template", error))
    }

    async fn ensure_base(&self, spec: &Spec) -> Result<(), GroundError> {
        let made = self.makings.ensure(&spec.template, spec.disk_mib).await;
        made.map_err(|error| GroundError::new(disk_fault(&error), error))
    }

    async fn open_base(&self, spec: &Spec) -> Option<std::fs::File> {
        let (pool, template, mib) = (self.pool.clone(), spec.template.clone(), spec.disk_mib);
        blocking(move || pool.open_base(&template, mib)).await.ok().flatten()
    }

    async fn make_disk(&self, spec: &Spec, places: &Places, uid: u32) -> Result<(), GroundError> {
        let (pool, disks) = (self.pool.clone(), self.disks.clone());
        let (template, mib, disk) = (spec.template.clone(), spec.disk_mib, places.disk.clone());
        let made = blocking(move || pool.make_disk(disks.chosen(), &template, mib, &disk, uid)).await;
        made.map_err(|error| GroundError::new(disk_fault(&error), error))
    }

    fn disk_driver(&self) -> &'static str {
        self.disks.choice().name()
    }

    async fn attach_disk(&self, slot: u16, places: &Places, uid: u32) -> Result<PathBuf, GroundError> {
        let (disks, disk, node) = (self.disks.clone(), places.disk.clone(), places.run.join("disk"));
        // Gone when nobody waits any more: what is taken down then is not shown behind the back of whoever does that.
        let waiting = Arc::new(());
        let is_wanted = Arc::downgrade(&waiting);
        let attached = blocking(move || disks.attach(slot, &disk, &node, uid, &|| is_wanted.strong_count() > 0)).await;
        drop(waiting);
        attached.map_err(|error| file_failed("the host could not show the sandbox its disk", error))
    }

    async fn detach_disk(&self, slot: u16) -> Result<(), GroundError> {
        let disks = self.disks.clone();
        let detached = blocking(move || disks.detach(slot)).await;
        detached.map_err(|error| file_failed("the host could not take the sandbox's disk away", error))
    }

    async fn flush_disk(&self, slot: u16, disk: &Path) -> Result<(), GroundError> {
        let (disks, disk) = (self.disks.clone(), disk.to_owned());
        let flushed = blocking(move || disks.flush(slot, &disk)).await;
        flushed.map_err(|error| file_failed("the host could not write the sandbox's disk", error))
    }

    async fn save_disk(&self, slot: u16, spec: &Spec, disk: &Path, to: &Path) -> Result<(), GroundError> {
        let (disks, disk, to, mib) = (self.disks.clone(), disk.to_owned(), to.to_owned(), spec.disk_mib);
        let saved = blocking(move || disks.snapshot(slot, &disk, &to, mib)).await;
        saved.map_err(|error| file_failed("the host could not copy the sandbox's disk", error))
    }

    async fn restore_disk(&self, from: &Path, disk: &Path, uid: u32) -> Result<(), GroundError> {
        let (disks, from, disk) = (self.disks.clone(), from.to_owned(), disk.to_owned());
        let restored = blocking(move || disks.restore(&from, &disk, uid)).await;
        restored.map_err(|error| file_failed("the host could not make the sandbox's disk", error))
    }

    async fn make_memory(&self, spec: &Spec, places: &Places, uid: u32, is_filled: bool) -> Result<(), GroundError> {
        let path = places.memory.clone();
        let bytes = u64::from(spec.memory_mib) << 20;
        let made = blocking(move || make_memory(&path, bytes, uid, is_filled)).await;
        made.map_err(|error| file_failed("the host could not make the sandbox's memory file", error))
    }

    async fn clone_file(&self, from: &Path, to: &Path, uid: u32) -> Result<(), GroundError> {
        let (from, to) = (from.to_owned(), to.to_owned());
        let cloned = blocking(move || crate::disk::clone(&std::fs::File::open(from)?, &to, uid)).await;
        cloned.map_err(|error| file_failed("the host could not clone a file of the sandbox", error))
    }

    async fn sweep(&self, uid: u32) -> Result<(), GroundError> {
        blocking(move || sweep::sweep(uid))
            .await
            .map(drop)
            .map_err(|error| GroundError::new("the sandbox's processes could not be ended", error))
    }
}

const FULL: &str = "the host's disk is full";

fn file_failed(public: &'static str, error: io::Error) -> GroundError {
    let is_full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    GroundError::new(if is_full { FULL } else { public }, error)
}

fn disk_fault(error: &DiskError) -> &'static str {
    match error {
        error if error.is_full() => FULL,
        DiskError::NoTemplate(_) => "the host no longer has the template",
        DiskError::TooSmall { .. } => "the template does not fit into a disk of this size",
        DiskError::Damaged { .. } => "the template is damaged on this host",
        DiskError::Base { .. } | DiskError::Clone(_) => "the host could not make the sandbox's disk",
    }
}

/// Anew each time: what an interrupted create left in it must not be a guest's memory. Preallocated: a guest that first touches a page
/// when the pool has become full would be killed.
fn make_memory(path: &Path, bytes: u64, uid: u32, is_filled: bool) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    crate::durable::remove(path)?;
    let file = std::fs::File::options().write(true).create_new(true).mode(0o600).open(path)?;
    if is_filled {
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes)?;
    } else {
        file.set_len(bytes)?;
    }
    std::os::unix::fs::fchown(&file, Some(uid), Some(uid))
}
