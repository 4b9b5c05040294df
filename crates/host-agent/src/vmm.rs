//! How this host runs microVMs: by Firecracker where it is installed and KVM boots a guest, else by QEMU, with KVM where a real boot has
//! proved it, else by emulation. A proof takes seconds, so it is kept until the machine boots again or something of it is another one.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use microvm::firecracker::{self, Firecracker, Release};
use microvm::qemu::{Accelerator, Qemu};
use microvm::{Driver, Drivers, Jail, KernelImage};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::config::{BadSetting, Config, bad};
use crate::sandbox::steps::blocking;
use crate::{durable, sweep, template};

/// In WRENN_DIR, each with a release beside its jailer: what saved states of before are loaded by.
const OLDER: &str = "vmms";

/// In the pool, while a guest is booted to find something out.
const PROBE: &str = "firecracker-probe";

/// Ends what an agent that was killed while it looked has left.
pub fn end_probe(pool: &Path, uid: u32) -> io::Result<()> {
    sweep::sweep(uid)?;
    durable::remove_tree(&pool.join(PROBE))
}

#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    #[error("no VMM: install Firecracker (WRENN_FIRECRACKER_BIN) or QEMU (Debian: apt-get install qemu-system-x86)")]
    None(#[source] microvm::Error),
    #[error(transparent)]
    Setting(#[from] BadSetting),
    /// It may boot one at the next try: a machine that has just started is busy, and its modules may still be on their way.
    #[error("no guest boots here: {0}")]
    NotProven(String),
}

impl VmmError {
    /// Starting again does not help: somebody has to change something first.
    pub fn is_config(&self) -> bool {
        !matches!(self, Self::NotProven(_))
    }
}

/// What is installed here.
pub struct Vmms {
    dir: PathBuf,
    /// Where sandboxes lie, and so what is tried: a file system may forbid what another allows.
    pool: PathBuf,
    choice: VmmChoice,
    /// Told by a sentence when it is installed and may not be used.
    firecracker: Result<Arc<Firecracker>, String>,
    qemu: Option<Qemu>,
    /// Nobody else's on this machine.
    uid: u32,
}

/// What was decided, and sentences for people about it.
#[derive(Clone)]
pub struct Settled {
    pub driver: Arc<dyn Driver>,
    pub notes: Vec<String>,
}

impl Vmms {
    /// `uid`: for guests that are booted to find something out, in `pool`.
    pub async fn find(config: &Config, pool: PathBuf, uid: u32) -> Result<Self, VmmError> {
        let qemu = Qemu::new(None, Accelerator::Tcg).await;
        let firecracker = match config.vmm.choice {
            VmmChoice::Qemu => Err(String::new()),
            _ => releases(config)
                .await
                .map(|(release, older)| Arc::new(Firecracker::new(release, older, config.vmm.options.clone()))),
        };
        if let (VmmChoice::Firecracker, Err(why)) = (config.vmm.choice, &firecracker) {
            let cure = "install what is missing, or set WRENN_VMM=auto";
            return Err(bad("WRENN_VMM", format!("is firecracker, which cannot be used: {why}"), cure).into());
        }
        let qemu = match qemu {
            Ok(qemu) => Some(qemu),
            Err(error) if firecracker.is_err() => return Err(VmmError::None(error)),
            Err(_) => None,
        };
        Ok(Self { dir: config.dir.clone(), pool, choice: config.vmm.choice, firecracker, qemu, uid })
    }

    /// Proves by a real boot what can be used here, and decides.
    pub async fn settle(self) -> Result<Settled, VmmError> {
        let firecracker = match &self.firecracker {
            Ok(firecracker) => self.proven_firecracker(firecracker).await,
            Err(why) => Err(why.clone()),
        };
        let qemu: Option<Arc<dyn Driver>> = match &self.qemu {
            Some(qemu) => Some(Arc::new(self.proven_qemu(qemu).await?)),
            None => None,
        };
        let why = match (firecracker, &self.firecracker) {
            (Ok(()), Ok(firecracker)) => {
                let driver = Arc::new(Drivers::new(firecracker.clone(), qemu.into_iter().collect()));
                return Ok(Settled { driver, notes: Vec::new() });
            }
            (Err(why), _) => why,
            (Ok(()), Err(why)) => why.clone(),
        };
        match (self.choice, qemu) {
            (VmmChoice::Firecracker, _) => Err(VmmError::NotProven(format!(
                "WRENN_VMM is firecracker, which does not boot a guest here: {why}; see what `wrenn doctor` says of KVM, or set WRENN_VMM=auto"
            ))),
            (_, Some(qemu)) => {
                let notes = Some(format!("Firecracker is not used: {why}.")).filter(|_| !why.is_empty());
                // What it had saved before is still its own, should KVM come back.
                let others = self.firecracker.iter().map(|firecracker| firecracker.clone() as Arc<dyn Driver>);
                let driver = Arc::new(Drivers::new(qemu, others.collect()));
                Ok(Settled { driver, notes: notes.into_iter().collect() })
            }
            (_, None) => Err(VmmError::NotProven(format!(
                "{why}; give the host KVM, or install QEMU (Debian: apt-get install qemu-system-x86)"
            ))),
        }
    }

    async fn proven_qemu(&self, qemu: &Qemu) -> Result<Qemu, VmmError> {
        let kvm = match proof(&self.dir, qemu) {
            Some(proof) => proof.kvm,
            None => match kernel(&self.dir) {
                Some(kernel) => {
                    let begin = std::time::Instant::now();
                    let kvm = Qemu::probe(None, &kernel).await == Accelerator::Kvm;
                    info!(kvm, duration_ms = begin.elapsed().as_millis(), "looked whether KVM boots a guest here");
                    keep(&self.dir, qemu, kvm).await;
                    kvm
                }
                None => false,
            },
        };
        let accelerator = if kvm { Accelerator::Kvm } else { Accelerator::Tcg };
        Qemu::new(None, accelerator).await.map_err(VmmError::None)
    }

    /// A sentence where it is not.
    async fn proven_firecracker(&self, firecracker: &Arc<Firecracker>) -> Result<(), String> {
        if proof(&self.dir, firecracker.as_ref()).is_some_and(|proof| proof.kvm) {
            return Ok(());
        }
        let kernel = kernel(&self.dir).ok_or("there is no guest kernel to try it with")?;
        let place = self.pool.join(PROBE);
        let jail = Jail { uid: self.uid, gid: self.uid, cgroups: Vec::new() };
        let made = place.clone();
        let made = blocking(move || {
            durable::remove_tree(&made)?;
            std::fs::create_dir(&made)?;
            std::fs::set_permissions(&made, std::fs::Permissions::from_mode(0o711))
        });
        made.await.map_err(|error| format!("{}: {error}", place.display()))?;
        let begin = std::time::Instant::now();
        let booted = firecracker.probe(&kernel, place.clone(), jail).await;
        let kvm = booted.is_ok();
        info!(kvm, duration_ms = begin.elapsed().as_millis(), "looked whether Firecracker boots a guest here");
        if let Err(error) = blocking(move || durable::remove_tree(&place)).await {
            warn!("what Firecracker was tried with stays: {error}");
        }
        // What has failed may be cured without a boot of the machine, so the next start tries again.
        if kvm {
            keep(&self.dir, firecracker.as_ref(), kvm).await;
        }
        booted
    }
}

/// The release for new sandboxes and those before it; a sentence where there is none that may be used.
async fn releases(config: &Config) -> Result<(Release, Vec<Release>), String> {
    let vmm = &config.vmm;
    if !vmm.firecracker.exists() {
        // Nobody has asked for it.
        let why = format!("{} is not there", vmm.firecracker.display());
        return Err(if vmm.choice == VmmChoice::Firecracker || vmm.is_named { why } else { String::new() });
    }
    if !Path::new("/dev/kvm").exists() {
        return Err("this machine has no /dev/kvm".to_owned());
    }
    let release = Release::find(&vmm.firecracker, &vmm.jailer).await.map_err(|error| error.to_string())?;
    release.version.check(&vmm.allowed)?;
    let mut older = Vec::new();
    for entry in std::fs::read_dir(config.dir.join(OLDER)).into_iter().flatten().flatten() {
        let place = entry.path();
        match Release::find(&place.join("firecracker"), &place.join("jailer")).await {
            Ok(found) if found.version == release.version => {}
            Ok(found) => match found.version.check(&vmm.allowed) {
                Ok(()) => older.push(found),
                Err(why) => warn!("{} is not used: {why}", place.display()),
            },
            Err(error) => warn!("{} is not used: {error}", place.display()),
        }
    }
    Ok((release, older))
}

#[derive(Serialize, Deserialize, Clone, PartialEq)]
struct Proof {
    driver: String,
    vmm_version: String,
    boot_id: String,
    kernel: String,
    kvm: bool,
}

/// What an earlier look found, if nothing has changed since.
fn proof(dir: &Path, driver: &dyn Driver) -> Option<Proof> {
    let wanted = wanted(dir, driver)?;
    proofs(dir).into_iter().find(|proof| Proof { kvm: false, ..proof.clone() } == wanted)
}

async fn keep(dir: &Path, driver: &dyn Driver, kvm: bool) {
    let Some(wanted) = wanted(dir, driver) else { return };
    let mut all = proofs(dir);
    all.retain(|proof| proof.driver != driver.name());
    all.push(Proof { kvm, ..wanted });
    let bytes = serde_json::to_vec(&all).expect("proofs are plain data");
    let path = path(dir);
    if let Err(error) = blocking(move || durable::write(&path, &bytes, 0o644)).await {
        warn!("the next start will look for KVM again: {error}");
    }
}

fn wanted(dir: &Path, driver: &dyn Driver) -> Option<Proof> {
    Some(Proof {
        driver: driver.name().to_owned(),
        vmm_version: driver.version().to_owned(),
        boot_id: microvm::process::boot_id().ok()?,
        kernel: template::newest_kernel(dir)?.version,
        kvm: false,
    })
}

fn proofs(dir: &Path) -> Vec<Proof> {
    durable::read(&path(dir), 64 * 1024).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

fn path(dir: &Path) -> PathBuf {
    dir.join("agent-vmm.json")
}

fn kernel(dir: &Path) -> Option<KernelImage> {
    let Some(found) = template::newest_kernel(dir) else {
        warn!("there is no guest kernel below {}; until there is one, sandboxes cannot start", dir.display());
        return None;
    };
    Some(KernelImage { vmlinux: found.image, initramfs: found.initramfs })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmmChoice {
    /// Firecracker where it is installed and works, else QEMU.
    Auto,
    Firecracker,
    Qemu,
}

/// Settings about the VMM.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub choice: VmmChoice,
    pub firecracker: PathBuf,
    pub jailer: PathBuf,
    /// The operator has named it, so that it is missed when it is not there.
    pub is_named: bool,
    /// Holes by their CVE that the operator puts up with.
    pub allowed: Vec<String>,
    pub options: firecracker::Options,
}
