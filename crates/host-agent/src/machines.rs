//! From a sandbox's record to a microVM of the driver, and back after a restart of the agent.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use microvm::{Driver, Isolation, Jail, KernelImage, Launch, Microvm, ProcessRecord, Shape, Stamp, Start};
use tokio::sync::watch;

use crate::ground::{Ground, GroundError, Places};
use crate::sandbox::state::Spec;
use crate::sandbox::steps::blocking;
use crate::template::{self, Kernel};

/// How long a start waits for the agent to find out how this host runs microVMs.
const DRIVER_TIME_MAX: Duration = Duration::from_secs(60);

/// What is to be started.
pub struct Order<'a> {
    /// The control group.
    pub group: &'a str,
    pub spec: &'a Spec,
    pub slot: u16,
    pub uid: u32,
    pub places: &'a Places,
    /// With what it begins; none: it is booted.
    pub load: Option<Start>,
}

#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("there is no guest kernel on this host")]
    NoKernel,
    #[error("this host has not found out yet how it runs microVMs")]
    NoDriver,
    #[error("the microVM could not be started")]
    Start(#[source] microvm::Error),
    #[error("the microVM could not be adopted")]
    Adopt(#[source] microvm::Error),
    #[error("the microVM could not be saved")]
    Save(#[source] microvm::Error),
    #[error("the microVM could not be made to go on")]
    Continue(#[source] microvm::Error),
    #[error("the microVM could not be killed")]
    Kill(#[source] microvm::Error),
    #[error(transparent)]
    Ground(#[from] GroundError),
}

pub struct Machines {
    dir: PathBuf,
    ground: Arc<dyn Ground>,
    /// Starts; absent until it is known how this host runs microVMs.
    driver: watch::Receiver<Option<Arc<dyn Driver>>>,
}

impl Machines {
    pub fn new(dir: PathBuf, ground: Arc<dyn Ground>, driver: watch::Receiver<Option<Arc<dyn Driver>>>) -> Self {
        Self { dir, ground, driver }
    }

    pub async fn start(&self, order: Order<'_>) -> Result<Arc<dyn Microvm>, MachineError> {
        let driver = self.driver().await?;
        let start = match order.load {
            Some(load) => load,
            None => self.boot(driver.as_ref(), order.places).await?,
        };
        let disk = self.ground.attach_disk(order.slot, order.places, order.uid).await?;
        let launch = Launch {
            dir: order.places.run.clone(),
            shape: Shape { vcpus: order.spec.vcpus, memory_mib: order.spec.memory_mib },
            disk,
            memory: order.places.memory.clone(),
            tap: self.ground.tap(order.slot),
            jail: Jail { uid: order.uid, gid: order.uid, cgroups: self.ground.cgroup_files(order.group) },
        };
        driver.start(launch, start).await.map_err(MachineError::Start)
    }

    async fn boot(&self, driver: &dyn Driver, places: &Places) -> Result<Start, MachineError> {
        let dir = self.dir.clone();
        let kernel = match blocking(move || template::newest_kernel(&dir)).await {
            Some(kernel) => kernel,
            // A guest that does not exist needs none.
            None if driver.isolation() == Isolation::Fake => {
                Kernel { image: places.disk.clone(), initramfs: None, version: String::new() }
            }
            None => return Err(MachineError::NoKernel),
        };
        let kernel = KernelImage { vmlinux: kernel.image, initramfs: kernel.initramfs };
        Ok(Start::Boot { kernel, arguments: String::new() })
    }

    /// What a saved state of that microVM is made by.
    pub async fn stamp_of(&self, microvm: &dyn Microvm) -> Result<Stamp, MachineError> {
        Ok(self.driver().await?.stamp_of(microvm.record()))
    }

    /// Whatever has started it, and whether or not it is known yet how this host starts new ones.
    pub fn adopt(&self, record: &ProcessRecord) -> Result<Arc<dyn Microvm>, MachineError> {
        microvm::adopt(record).map_err(MachineError::Adopt)
    }

    /// Loads saved states, and says which.
    pub async fn driver(&self) -> Result<Arc<dyn Driver>, MachineError> {
        let mut driver = self.driver.clone();
        let known = tokio::time::timeout(DRIVER_TIME_MAX, driver.wait_for(Option::is_some)).await;
        match known {
            Ok(Ok(driver)) => driver.clone().ok_or(MachineError::NoDriver),
            _ => Err(MachineError::NoDriver),
        }
    }
}
