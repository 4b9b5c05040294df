//! One microVM process from spawn to exit: boot, stop and continue its vCPUs, save, load, kill, look at.
//!
//! It knows nothing of Wrenn: callers give files, descriptors, a user id and a directory, and get a handle. A microVM outlives the
//! program that started it: its [`ProcessRecord`] is all that another run of that program needs to take it over ([`Driver::adopt`]).
//! Called by the host agent alone.
//!
//! ```text
//!  firecracker/  Firecracker in its jailer, on KVM: for production
//!  qemu/         QEMU's microvm machine, with KVM where a real boot proves that it works, else software emulation
//!  drivers       several of them as one, for a host whose VMM was changed
//!  fake          a process that only exists: for tests of everything above this crate
//!  process       pidfds: exit is noticed, a reused pid is never touched
//! ```

mod cpu;
mod disk;
mod drivers;
pub mod fake;
pub mod firecracker;
mod log;
pub mod process;
mod proof;
pub mod qemu;
mod reflink;
mod session;
mod socket;
mod tap;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
pub use drivers::{Drivers, adopt};
pub use process::{ExitCause, ProcessRecord};
pub use tap::Tap;

/// What stands between a guest and its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isolation {
    /// Hardware virtualisation by KVM.
    Kvm,
    /// Software emulation: the VMM's project promises no isolation, the jail around it is the boundary.
    Emulation,
    /// No guest at all.
    Fake,
}

impl Isolation {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Emulation => "emulation",
            Self::Fake => "fake",
        }
    }
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Shape {
    pub vcpus: u8,
    pub memory_mib: u32,
}

/// An uncompressed ELF and, when its drivers are modules, an initramfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelImage {
    pub vmlinux: PathBuf,
    pub initramfs: Option<PathBuf>,
}

/// The rights under which the VMM runs from its first instruction on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Jail {
    /// Not used by anything else on the machine.
    pub uid: u32,
    pub gid: u32,
    /// `cgroup.procs` (or `tasks`) files of the groups it enters.
    pub cgroups: Vec<PathBuf>,
}

/// Everything that one start needs.
#[derive(Debug)]
pub struct Launch {
    /// Of this run alone; the control socket and the start's complaints lie here. It may be deep: no path of it goes into a socket address.
    pub dir: PathBuf,
    pub shape: Shape,
    /// Raw image, or the node of a block device, owned by the jail's uid; the only one that the guest's writes reach.
    pub disk: PathBuf,
    /// Owned by the jail's uid. A boot fills it; a load maps it privately and leaves it as it is.
    pub memory: PathBuf,
    /// The guest's network card; `None` for a guest without one.
    pub tap: Option<Tap>,
    pub jail: Jail,
}

#[derive(Debug)]
pub enum Start {
    /// `arguments` go to the end of the kernel's command line.
    Boot { kernel: KernelImage, arguments: String },
    /// From a device state that `save` wrote beside `Launch::memory`. The vCPUs stand still until `continue_vcpus`. `made_by` tells who
    /// wrote it where several can load; none: the present one.
    Load { device: PathBuf, made_by: Option<Stamp> },
}

/// Where a saved state goes: new files, in a directory on the file system of the present memory file.
#[derive(Debug, Clone)]
pub struct SaveTarget {
    pub memory: PathBuf,
    pub device: PathBuf,
}

impl SaveTarget {
    /// Said before anything is done; what [`Self::remove`] takes away later is of this save.
    async fn refuse_existing(&self) -> Result<(), Error> {
        for path in [&self.memory, &self.device] {
            if tokio::fs::try_exists(path).await.map_err(Error::io("look at the place of the saved state"))? {
                let cause = std::io::ErrorKind::AlreadyExists.into();
                return Err(Error::Io { what: "make the saved state", cause });
            }
        }
        Ok(())
    }

    async fn remove(&self) {
        for path in [&self.memory, &self.device] {
            let _ = tokio::fs::remove_file(path).await;
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Saved {
    /// Bytes that had to be copied, because this microVM had changed them since its memory file was written.
    pub copied_bytes: u64,
    /// From the first to the last moment at which the vCPUs stood still.
    pub stopped: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    pub rss_bytes: u64,
    pub cpu: Duration,
}

/// What a saved state was made by. It is loaded by the like alone.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Stamp {
    pub driver: String,
    pub version: String,
    pub isolation: String,
    /// Of the host's time stamp counter, where the guest sees it as its own; 0 where it does not.
    pub tsc_khz: u64,
    /// The host's processor, where the guest sees it as its own; empty where it does not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cpu: String,
}

impl Stamp {
    /// What stands between a guest and its host: `firecracker/kvm`, `qemu/kvm`, `qemu/emulated`, `fake`.
    pub fn level(&self) -> String {
        match self.isolation.as_str() {
            "emulation" => format!("{}/emulated", self.driver),
            "fake" => "fake".to_owned(),
            other => format!("{}/{other}", self.driver),
        }
    }

    fn of(driver: &dyn Driver) -> Self {
        Self {
            driver: driver.name().to_owned(),
            version: driver.version().to_owned(),
            isolation: driver.isolation().to_string(),
            tsc_khz: 0,
            cpu: String::new(),
        }
    }

    /// Whether this one loads what `saved` has made; a sentence when it does not.
    pub fn loads(&self, saved: &Self) -> Result<(), String> {
        if (&self.driver, &self.version) != (&saved.driver, &saved.version) {
            return Err(format!(
                "{} {} made it, and here is {} {}",
                saved.driver, saved.version, self.driver, self.version
            ));
        }
        if self.isolation != saved.isolation {
            return Err(format!("it was made under {}, and here is {}", saved.isolation, self.isolation));
        }
        // States of before say nothing of it.
        if !saved.cpu.is_empty() && self.cpu != saved.cpu {
            return Err(format!("its guest knows the processor {:?}, and here is {:?}", saved.cpu, self.cpu));
        }
        // Each boot of a host measures it a little differently.
        if self.tsc_khz.abs_diff(saved.tsc_khz) > saved.tsc_khz / TSC_TOLERANCE {
            return Err(format!(
                "its guest's clock runs at {} kHz, and this host's counter at {}",
                saved.tsc_khz, self.tsc_khz
            ));
        }
        Ok(())
    }
}

/// One part in so many. A guest whose clock is off by this much is put right by its clock daemon.
const TSC_TOLERANCE: u64 = 2000;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the VMM could not be started: {reason}")]
    Start {
        reason: String,
        #[source]
        cause: std::io::Error,
    },
    #[error("the VMM ended while it was starting: {0}")]
    Stillborn(String),
    #[error("the VMM did not answer {command} within {limit:?}")]
    Silent { command: &'static str, limit: Duration },
    #[error("the VMM refused {command}: {reason}")]
    Refused { command: &'static str, reason: String },
    #[error("the VMM's control socket broke at {command}")]
    Control {
        command: &'static str,
        #[source]
        cause: std::io::Error,
    },
    #[error("the recorded process is gone or is another one now")]
    Gone,
    #[error("{what}")]
    Io {
        what: &'static str,
        #[source]
        cause: std::io::Error,
    },
}

impl Error {
    /// The disk has no room for what was to be written.
    pub fn is_full(&self) -> bool {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self, Self::Io { cause, .. } if matches!(cause.kind(), StorageFull | QuotaExceeded))
    }

    fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |cause| Self::Io { what, cause }
    }
}

/// A way of running microVMs on this machine.
#[async_trait]
pub trait Driver: Send + Sync + 'static {
    /// `firecracker`, `qemu`, `fake`
    fn name(&self) -> &'static str;
    fn version(&self) -> &str;
    fn isolation(&self) -> Isolation;

    /// What saved states of this driver are made by.
    fn stamp(&self) -> Stamp;

    /// What a saved state of that microVM is made by, which may be another one than what makes new ones.
    fn stamp_of(&self, record: &ProcessRecord) -> Stamp {
        // Without it an earlier version of this program has started it, which knew one driver.
        record.made_by.clone().unwrap_or_else(|| Stamp { version: record.vmm_version.clone(), ..self.stamp() })
    }

    /// Whether a boot fills [`Launch::memory`], so that its room has to be there before.
    fn boots_into_its_file(&self) -> bool {
        true
    }

    /// Whether this driver loads what `saved` has made; a sentence when it does not.
    fn loads(&self, saved: &Stamp) -> Result<(), String> {
        self.stamp().loads(saved)
    }

    /// Returns when the VMM answers: a booting guest runs, a loaded one stands still. On an error nothing is left of it.
    async fn start(&self, launch: Launch, start: Start) -> Result<Arc<dyn Microvm>, Error>;

    /// Takes over what another run of this program started, without touching the guest.
    async fn adopt(&self, record: &ProcessRecord) -> Result<Arc<dyn Microvm>, Error>;
}

/// A running VMM. Dropping the handle leaves it running.
#[async_trait]
pub trait Microvm: Send + Sync + 'static {
    fn record(&self) -> &ProcessRecord;

    async fn stop_vcpus(&self) -> Result<(), Error>;
    async fn continue_vcpus(&self) -> Result<(), Error>;

    /// Stops the vCPUs and writes device state and memory, which whoever keeps them syncs. They stay stopped: the caller continues them or
    /// kills the VMM.
    /// After an error they may be continued: nothing of the microVM has been changed.
    async fn save(&self, target: &SaveTarget) -> Result<Saved, Error>;

    /// SIGKILL, and waits until the process is gone. Also for one that is gone.
    async fn kill(&self) -> Result<(), Error>;

    async fn stats(&self) -> Result<Stats, Error>;

    /// The last bytes of the guest's console, at most `bytes`.
    async fn console_tail(&self, bytes: usize) -> Result<Vec<u8>, Error>;

    /// Waits for the end of the process, which is noticed at once.
    async fn exited(&self) -> ExitCause;

    /// Whether the guest goes on writing into [`ProcessRecord::memory`], with which what it saves may share blocks.
    fn writes_into_its_file(&self) -> bool {
        !self.record().memory_private
    }

    /// What the guest reads from its metadata service, where the VMM has one. Not kept in a saved state.
    async fn set_metadata(&self, _metadata: &serde_json::Value) -> Result<(), Error> {
        Ok(())
    }

    /// What the VMM itself counts, in its own words; none where it counts nothing.
    async fn counters(&self) -> Result<Option<serde_json::Value>, Error> {
        Ok(None)
    }
}

/// Fixed for every guest: a restored one keeps its neighbours' addresses.
pub const GUEST_MAC: &str = "02:fc:00:00:00:05";

fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_loads_its_like() {
        let stamp = |version: &str, isolation: Isolation, tsc_khz| Stamp {
            driver: "qemu".to_owned(),
            version: version.to_owned(),
            isolation: isolation.to_string(),
            tsc_khz,
            cpu: String::new(),
        };
        let saved = stamp("7.2.22", Isolation::Emulation, 2_600_000);
        for (here, loads) in [
            (stamp("7.2.22", Isolation::Emulation, 2_600_000), true),
            (stamp("7.2.22", Isolation::Emulation, 2_601_000), true),
            (stamp("7.2.22", Isolation::Emulation, 2_602_000), false),
            (stamp("7.2.22", Isolation::Emulation, 0), false),
            (stamp("7.2.22", Isolation::Kvm, 2_600_000), false),
            (stamp("10.0.2", Isolation::Emulation, 2_600_000), false),
        ] {
            assert_eq!(here.loads(&saved).is_ok(), loads, "{here:?}");
        }
        let on = |cpu: &str| Stamp { cpu: cpu.to_owned(), ..stamp("7.2.22", Isolation::Kvm, 0) };
        for (here, saved, loads) in [
            ("GenuineIntel 6-143-8", "GenuineIntel 6-143-8", true),
            ("GenuineIntel 6-143-8", "AuthenticAMD 25-1-1", false),
            ("GenuineIntel 6-143-8", "", true),
        ] {
            assert_eq!(on(here).loads(&on(saved)).is_ok(), loads, "{here:?} {saved:?}");
        }
    }
}
