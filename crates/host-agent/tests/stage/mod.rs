//! A stage for sandboxes without kernel objects: slots, cgroups and disks are files, a microVM is a process of this very test program
//! that answers like envd. All of it outlives the one that made it, as the real things do.

#![allow(dead_code)] // Each test program uses its part of the stage.

use std::collections::HashSet;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::BoxFuture;
use host_agent::admission::{Admission, Room};
use host_agent::ground::{Ground, GroundError, Places};
use host_agent::guest::Dial;
use host_agent::identity::{self, Tag};
use host_agent::machines::Machines;
use host_agent::sandbox::journal::Journal;
use host_agent::sandbox::snapshots::Snapshots;
use host_agent::sandbox::state::{Fence, Spec, View};
use host_agent::sandbox::steps::Context;
use host_agent::sandbox::template_generations::TemplateGenerations;
use host_agent::sandbox::{Sandboxes, WishError};
use host_agent::standby::{self, Standbys};
use host_agent::sweep;
use model::ids::{SandboxId, SnapshotId};
use model::sandbox::Kept;
use model::shape::TemplateName;
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// The environment variable that makes a copy of the test program an envd.
const FAKE_ENVD: &str = "STAGE_FAKE_ENVD";

/// To be called by a test named `fake_envd`: serves until it is killed when it was started as a guest, else does nothing.
pub fn fake_envd() {
    let Some(port_file) = std::env::var_os(FAKE_ENVD) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        use axum::http::StatusCode;
        use axum::routing::{get, post};
        let app = axum::Router::new()
            .route("/health", get(|| async { StatusCode::NO_CONTENT }))
            .route("/snapshot/prepare", post(prepare))
            .route("/init", post(|| async { ([("x-envd-version", "test")], StatusCode::NO_CONTENT) }));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let temporary = PathBuf::from(&port_file).with_extension("tmp");
        std::fs::write(&temporary, port.to_string()).unwrap();
        std::fs::rename(&temporary, &port_file).unwrap();
        axum::serve(listener, app).await.unwrap();
    });
}

/// As envd says it, unless the stage holds [`UNFLUSHED`].
async fn prepare() -> impl axum::response::IntoResponse {
    let port_file = PathBuf::from(std::env::var_os(FAKE_ENVD).expect("it is a guest"));
    let is_flushed = !port_file.ancestors().nth(3).is_some_and(|stage| stage.join(UNFLUSHED).exists());
    ([("x-disk-flushed", if is_flushed { "yes" } else { "no" })], axum::http::StatusCode::NO_CONTENT)
}

pub type Driver = watch::Receiver<Option<Arc<dyn microvm::Driver>>>;

/// While this file is on the stage, whoever removes a cgroup panics.
pub const BOMB: &str = "bomb";

/// While this file is on the stage, guests do not get their disks flushed in time.
pub const UNFLUSHED: &str = "unflushed";
/// With this file on the stage templates have editions, and creates are restored where they can be.
pub const EDITION: &str = "edition";
/// While this file is on the stage, bases are in the making.
pub const SLOW_BASE: &str = "slow-base";

pub struct Stage {
    pub dir: PathBuf,
}

impl Stage {
    pub fn new(dir: &Path) -> Self {
        std::fs::create_dir_all(dir.join("images/minimal")).unwrap();
        std::fs::write(dir.join("images/minimal/rootfs.ext4"), "rootfs").unwrap();
        for kind in ["slots", "cgroups", "pool"] {
            std::fs::create_dir_all(dir.join(kind)).unwrap();
        }
        // Guests have uids of their own and must reach their files.
        for path in [dir.to_owned(), dir.join("slots")] {
            use std::os::unix::fs::PermissionsExt as _;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
        }
        Self { dir: dir.to_owned() }
    }

    /// An agent on this stage, as after a start.
    pub async fn agent(&self) -> Arc<Sandboxes> {
        self.agent_with(microvm::fake::Fake::with_body(body)).await.0
    }

    /// An agent that keeps microVMs ready, at most so many.
    pub async fn agent_with_standbys(&self, at_most: usize) -> Arc<Sandboxes> {
        // As a real agent does before anything else.
        let tag = identity::load_or_make(&self.dir, "machine").unwrap();
        for left in standby::left_in(&self.dir.join("pool")).unwrap() {
            let slot = standby::slot_of(left.file_name().unwrap().to_str().unwrap()).unwrap();
            sweep::sweep(tag.uid(slot)).unwrap();
            let _ = std::fs::remove_dir(self.dir.join("cgroups").join(left.file_name().unwrap()));
            std::fs::remove_dir_all(left).unwrap();
            let _ = std::fs::remove_dir_all(self.dir.join("slots").join(slot.to_string()));
        }
        let standbys = Standbys::open(&self.dir.join("pool"), at_most).unwrap();
        self.agent_of(microvm::fake::Fake::with_body(body), Some(Arc::new(standbys))).await.0
    }

    /// An agent whose microVMs are what `fake` makes.
    pub async fn agent_with(&self, fake: microvm::fake::Fake) -> (Arc<Sandboxes>, Driver) {
        self.agent_of(fake, None).await
    }

    async fn agent_of(&self, fake: microvm::fake::Fake, standbys: Option<Arc<Standbys>>) -> (Arc<Sandboxes>, Driver) {
        let tag = identity::load_or_make(&self.dir, "machine").unwrap();
        let ground = Arc::new(FileGround { dir: self.dir.clone(), taken: Mutex::default() });
        let driver: Arc<dyn microvm::Driver> = Arc::new(fake);
        let (_, known) = watch::channel(Some(driver.clone()));
        let for_agent = known.clone();
        let templates = self.dir.join("pool");
        let journal = Journal::open(&self.dir.join("pool"), tag.as_str()).unwrap();
        let context = Context {
            standbys,
            digests: Default::default(),
            snapshots: Arc::new(Snapshots::open(&self.dir.join("pool"), &journal).unwrap()),
            template_generations: Some(Arc::new(TemplateGenerations::open(&templates, &self.dir).unwrap())),
            machines: Machines::new(self.dir.clone(), ground.clone(), known),
            ground,
            dir: self.dir.clone(),
            journal,
            admission: Admission::new(100),
            room: Box::new(|| {
                Box::pin(async {
                    Room {
                        memory_total_mib: 1 << 20,
                        memory_available_mib: 1 << 20,
                        disk_total_mib: 1 << 20,
                        disk_free_mib: 1 << 20,
                    }
                })
            }),
            changed: Arc::new(Notify::new()),
            tag,
        };
        let sandboxes = Sandboxes::new(Arc::new(context), 1);
        sandboxes.recover().await.unwrap();
        (sandboxes, for_agent)
    }

    /// Everything that a sandbox could have left.
    pub fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        for kind in ["slots", "cgroups", "pool/sandboxes", "pool/snapshots", "pool/quarantine"] {
            for entry in std::fs::read_dir(self.dir.join(kind)).unwrap().flatten() {
                found.push(format!("{kind}/{}", entry.file_name().to_string_lossy()));
            }
        }
        let tag = identity::load_or_make(&self.dir, "machine").unwrap();
        found.extend(processes_of(&tag).into_iter().map(|pid| format!("process {pid}")));
        found
    }
}

/// Where the port of a run's envd is written.
pub fn port_file(launch: &microvm::Launch) -> PathBuf {
    // The stage's slot is the low bits of the uid; its directory is five above the run's: pool/sandboxes/<id>/run/<incarnation>.
    let slot = launch.jail.uid & 0x7fff;
    launch.dir.ancestors().nth(5).unwrap().join("slots").join(slot.to_string()).join("port")
}

/// A copy of this test program that answers like envd, under the sandbox's uid.
pub fn body(launch: &microvm::Launch) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "fake_envd", "--nocapture"])
        .env_clear()
        .env(FAKE_ENVD, port_file(launch))
        .uid(launch.jail.uid);
    command
}

/// Living processes with a uid of this agent.
pub fn processes_of(tag: &Tag) -> Vec<i32> {
    let uids = tag.uid(0)..=tag.uid(0x7fff);
    procfs::process::all_processes()
        .unwrap()
        .flatten()
        .filter(|process| process.uid().is_ok_and(|uid| uids.contains(&uid)))
        .filter(|process| process.stat().is_ok_and(|stat| stat.state != 'Z'))
        .map(|process| process.pid)
        .collect()
}

pub fn id(n: u128) -> SandboxId {
    SandboxId::from_random(n)
}

pub fn fence(revision: u64) -> Fence {
    Fence { epoch: 1, revision, operation: format!("op-{revision}") }
}

pub fn spec() -> Spec {
    Spec {
        template: "minimal".parse().unwrap(),
        vcpus: 1,
        memory_mib: 256,
        disk_mib: 1024,
        envs: [("A".to_owned(), "b".to_owned())].into(),
        default_user: String::new(),
        team: String::new(),
        snapshot: None,
    }
}

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

pub async fn create(sandboxes: &Arc<Sandboxes>, id: &SandboxId, revision: u64) -> View {
    sandboxes.ensure_running(id, fence(revision), spec(), soon()).await.unwrap()
}

pub async fn pause(sandboxes: &Arc<Sandboxes>, id: &SandboxId, revision: u64) -> View {
    pause_keeping(Kept::Memory, sandboxes, id, revision).await
}

pub async fn pause_keeping(kept: Kept, sandboxes: &Arc<Sandboxes>, id: &SandboxId, revision: u64) -> View {
    sandboxes.ensure_paused(id, fence(revision), kept, soon()).await.unwrap()
}

/// Of a sandbox that runs, or is paused.
pub async fn snapshot(sandboxes: &Arc<Sandboxes>, id: &SandboxId, snapshot: SnapshotId) -> Result<(), WishError> {
    let taken = sandboxes.ensure_snapshot(id, 1, snapshot, soon()).await?;
    assert!(taken.is_some_and(|(bytes, _)| bytes > 0), "{taken:?}");
    Ok(())
}

pub fn snapshot_id(n: u128) -> SnapshotId {
    SnapshotId(uuid::Uuid::from_u128(n))
}

/// A sandbox that begins with a snapshot.
pub fn forked(snapshot: SnapshotId) -> Spec {
    Spec { snapshot: Some(snapshot), ..spec() }
}

pub async fn kill(sandboxes: &Arc<Sandboxes>, id: &SandboxId, revision: u64) -> View {
    sandboxes.ensure_killed(id, fence(revision), soon()).await.unwrap()
}

struct FileGround {
    dir: PathBuf,
    taken: Mutex<HashSet<u16>>,
}

fn failed(error: io::Error) -> GroundError {
    GroundError::new("the stage failed", error)
}

fn gone_is_fine(result: io::Result<()>) -> Result<(), GroundError> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(failed),
    }
}

struct PortFile(PathBuf);

impl Dial for PortFile {
    fn dial(&self) -> BoxFuture<'static, io::Result<TcpStream>> {
        let path = self.0.clone();
        Box::pin(async move {
            let port: u16 = std::fs::read_to_string(path)?.parse().map_err(io::Error::other)?;
            TcpStream::connect(("127.0.0.1", port)).await
        })
    }
}

#[async_trait]
impl Ground for FileGround {
    fn reserve_slot(&self) -> Result<u16, GroundError> {
        let mut taken = self.taken.lock().unwrap();
        let free = (1..100).find(|slot| !taken.contains(slot)).unwrap();
        taken.insert(free);
        Ok(free)
    }

    fn claim_slot(&self, slot: u16) -> bool {
        self.taken.lock().unwrap().insert(slot)
    }

    fn free_slot(&self, slot: u16) {
        self.taken.lock().unwrap().remove(&slot);
    }

    async fn ensure_network(&self, slot: u16) -> Result<(), GroundError> {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.dir.join("slots").join(slot.to_string());
        std::fs::create_dir_all(&path).map_err(failed)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).map_err(failed)
    }

    async fn release_network(&self, slot: u16) -> Result<(), GroundError> {
        gone_is_fine(std::fs::remove_dir_all(self.dir.join("slots").join(slot.to_string())))
    }

    fn tap(&self, _: u16) -> Option<microvm::Tap> {
        None
    }

    fn dial(&self, slot: u16) -> Arc<dyn Dial> {
        Arc::new(PortFile(self.dir.join("slots").join(slot.to_string()).join("port")))
    }

    fn host_ip(&self, _: u16) -> String {
        "127.0.0.1".to_owned()
    }

    async fn ensure_cgroup(&self, group: &str, _: &Spec) -> Result<(), GroundError> {
        std::fs::create_dir_all(self.dir.join("cgroups").join(group)).map_err(failed)
    }

    fn cgroup_files(&self, _: &str) -> Vec<PathBuf> {
        Vec::new()
    }

    async fn release_cgroup(&self, group: &str) -> Result<(), GroundError> {
        assert!(!self.dir.join(BOMB).exists(), "the test wants the task to die here");
        gone_is_fine(std::fs::remove_dir(self.dir.join("cgroups").join(group)))
    }

    async fn edition(&self, _template: &TemplateName) -> Result<Option<String>, GroundError> {
        match std::fs::read_to_string(self.dir.join(EDITION)) {
            Ok(edition) => Ok(Some(edition)),
            Err(_) => Ok(None),
        }
    }

    async fn ensure_base(&self, _: &Spec) -> Result<(), GroundError> {
        while self.dir.join(SLOW_BASE).exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    async fn make_disk(&self, _: &Spec, places: &Places, _: u32) -> Result<(), GroundError> {
        std::fs::write(&places.disk, "disk").map_err(failed)
    }

    async fn make_memory(&self, _: &Spec, places: &Places, _: u32, _: bool) -> Result<(), GroundError> {
        std::fs::create_dir_all(&places.run).map_err(failed)?;
        std::fs::write(&places.memory, "memory").map_err(failed)
    }

    async fn clone_file(&self, from: &Path, to: &Path, uid: u32) -> Result<(), GroundError> {
        std::fs::copy(from, to).map_err(failed)?;
        std::os::unix::fs::chown(to, Some(uid), Some(uid)).map_err(failed)
    }

    async fn sweep(&self, uid: u32) -> Result<(), GroundError> {
        tokio::task::spawn_blocking(move || sweep::sweep(uid)).await.unwrap().map_err(failed).map(drop)
    }
}
