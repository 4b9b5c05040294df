//! The agent as a whole: what all of its tasks share, and what it says of itself.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use api::host::{SandboxState, StepTiming};
use api::v1::hosts::{Heartbeat, HostFacts, ReportedSandbox};
use futures::future::BoxFuture;
use microvm::{Driver, Isolation};
use tokio::sync::watch;
use tracing::warn;

use crate::admission::Room;
use crate::credentials::Credentials;
use crate::gauges::Gauges;
use crate::heartbeat::Link;
use crate::idleness::Idleness;
use crate::sandbox::Sandboxes;
use crate::sandbox::state::View;
use crate::sandbox::steps::blocking;
use crate::template;

/// A heartbeat names at most so many sandboxes; the contract's bound.
const REPORTED_MAX: usize = 10_000;

/// What people must know of a host that has no KVM.
const EMULATION_NOTE: &str = "Sandboxes run by software emulation: QEMU's project promises no isolation for emulation; the jail is the \
     boundary. Use it for development, tests and trusted tenants.";

/// Reading files and the kernel's numbers takes milliseconds. A disk that hangs must not keep the host from saying that it lives.
const LOOK_TIME_MAX: Duration = Duration::from_secs(5);

pub struct Agent {
    pub sandboxes: Arc<Sandboxes>,
    pub idleness: Arc<Idleness>,
    pub gauges: Arc<Gauges>,
    pub credentials: watch::Receiver<Credentials>,
    pub link: watch::Receiver<Link>,
    /// Absent until it is known how this host runs microVMs.
    pub driver: watch::Receiver<Option<Arc<dyn Driver>>>,
    /// What was said when that was decided.
    pub vmm_notes: Arc<OnceLock<Vec<String>>>,
    pub cgroup_driver: String,
    /// Plain sentences about where sandboxes stand.
    pub ground_notes: Vec<String>,
    /// Counts of kernel objects and files, by kind.
    pub count: Box<dyn Fn() -> BoxFuture<'static, BTreeMap<String, u64>> + Send + Sync>,
    /// What the machine has.
    pub hardware: Box<dyn Fn() -> BoxFuture<'static, HostFacts> + Send + Sync>,
    /// What the last look saw.
    pub seen: Arc<Mutex<Seen>>,
    /// Held while somebody looks: behind a look that hangs no second one is begun.
    pub looking: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug, Clone, Default)]
pub struct Seen {
    facts: HostFacts,
    room: Room,
}

impl Agent {
    pub async fn facts(&self) -> HostFacts {
        let mut facts = (self.hardware)().await;
        facts.isolation = self.isolation();
        facts.agent_version = env!("CARGO_PKG_VERSION").to_owned();
        let dir = self.sandboxes.context().dir.clone();
        facts.templates = blocking(move || template::names(&dir)).await;
        facts
    }

    /// What there is now; when that cannot be had in time, what there was.
    async fn look(self: &Arc<Self>) -> Seen {
        if let Ok(turn) = self.looking.clone().try_lock_owned() {
            let agent = self.clone();
            // A task, so that a look that comes late is of use to the next report.
            let look = tokio::spawn(async move {
                let facts = agent.facts().await;
                let room = (agent.sandboxes.context().room)().await;
                *agent.seen.lock().unwrap_or_else(PoisonError::into_inner) = Seen { facts, room };
                drop(turn);
            });
            if tokio::time::timeout(LOOK_TIME_MAX, look).await.is_err() {
                warn!("looking at the host takes longer than {LOOK_TIME_MAX:?}; what was seen last is reported");
            }
        }
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub async fn objects(&self) -> BTreeMap<String, u64> {
        (self.count)().await
    }

    /// Of new sandboxes: `firecracker/kvm`, `qemu/kvm`, `qemu/emulated` or `fake`; empty while nobody knows.
    pub fn isolation(&self) -> String {
        self.driver.borrow().as_ref().map(|driver| driver.stamp().level()).unwrap_or_default()
    }

    /// What makes new sandboxes: its name and version; empty while nobody knows.
    pub fn vmm(&self) -> (String, String) {
        let driver = self.driver.borrow();
        driver.as_ref().map(|driver| (driver.name().to_owned(), driver.version().to_owned())).unwrap_or_default()
    }

    /// Plain sentences about how this host runs sandboxes.
    pub fn notes(&self) -> Vec<String> {
        let isolation = self.driver.borrow().as_ref().map(|driver| driver.isolation());
        let first = match isolation {
            Some(Isolation::Kvm) => "Sandboxes run with KVM, which a real boot has proved to work here.",
            Some(Isolation::Emulation) => EMULATION_NOTE,
            Some(Isolation::Fake) => "There are no guests: microVMs are fakes for tests.",
            None => "It is being found out whether KVM works here.",
        };
        let vmm = self.vmm_notes.get().into_iter().flatten();
        std::iter::once(first.to_owned()).chain(vmm.chain(&self.ground_notes).cloned()).collect()
    }

    pub async fn kernel_version(&self) -> String {
        let dir = self.sandboxes.context().dir.clone();
        let newest = blocking(move || template::newest_kernel(&dir)).await;
        newest.map(|kernel| kernel.version).unwrap_or_default()
    }

    /// What the control plane is told of a sandbox.
    pub fn state(&self, view: &View, kernel_version: &str) -> SandboxState {
        let mut versions: BTreeMap<&str, String> = BTreeMap::new();
        versions.insert("kernel_version", kernel_version.to_owned());
        // Its own, which may be another one than the next sandbox's.
        let (vmm, vmm_version) = match &view.process {
            Some(process) => (process.driver.clone(), process.vmm_version.clone()),
            None => self.vmm(),
        };
        let isolation = match &view.process {
            Some(process) => {
                self.driver.borrow().as_ref().map(|driver| driver.stamp_of(process).level()).unwrap_or_default()
            }
            None => self.isolation(),
        };
        versions.insert("vmm", vmm);
        versions.insert("vmm_version", vmm_version);
        versions.insert("agent_version", env!("CARGO_PKG_VERSION").to_owned());
        versions.insert("envd_version", view.envd_version.clone());
        SandboxState {
            sandbox_id: view.id.to_string(),
            observed: view.observed.to_string(),
            reason: view.reason.clone(),
            incarnation: view.incarnation.as_ref().map(ToString::to_string).unwrap_or_default(),
            revision: view.fence.revision,
            isolation,
            versions: versions.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
            steps: view
                .steps
                .iter()
                .map(|(name, time)| StepTiming {
                    name: (*name).to_owned(),
                    ms: time.as_secs_f64() * 1000.0,
                    ..Default::default()
                })
                .collect(),
            host_ip: view.host_ip.clone(),
            cause: view.cause.word().to_owned(),
            kept: view.kept.map(|kept| kept.to_string()).unwrap_or_default(),
            ..Default::default()
        }
    }

    /// A heartbeat without what the heart itself adds.
    pub async fn report(self: &Arc<Self>) -> Heartbeat {
        let Seen { facts, room } = self.look().await;
        // Read first: a scan that ends in between must not declare the older list complete.
        let complete = self.sandboxes.is_complete();
        let views = self.sandboxes.list();
        let told = views.len() <= REPORTED_MAX;
        Heartbeat {
            facts,
            memory_free_mb: i64::try_from(room.memory_available_mib).unwrap_or(i64::MAX),
            disk_free_mb: i64::try_from(room.disk_free_mib).unwrap_or(i64::MAX),
            complete: complete && told,
            sandboxes: views
                .into_iter()
                .take(REPORTED_MAX)
                .map(|view| ReportedSandbox {
                    idle_sec: self.sandboxes.guest(&view.id).ok().and_then(|guest| self.idleness.of(&view.id, &guest)),
                    id: view.id.to_string(),
                    observed: view.observed.to_string(),
                    revision: view.fence.revision,
                    incarnation: view.incarnation.map(|incarnation| incarnation.to_string()).unwrap_or_default(),
                    reason: view.reason,
                })
                .collect(),
            ..Default::default()
        }
    }
}
