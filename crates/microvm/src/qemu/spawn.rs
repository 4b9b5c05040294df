//! From a launch to a running process: opens everything as the caller, hands it over as descriptors, gives up every right, becomes QEMU.
//!
//! Between fork and exec only system calls on prepared memory are made. The parent's copies of the descriptors are closed when this
//! returns: a copy of the disk's would keep its lock after QEMU is gone.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _, chown};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::command::{self, Accelerator, Beginning, Opened};
use super::{landlock, probe, qmp};
use crate::log::Log;
use crate::process::{self, ProcessRecord, Unborn};
use crate::session::{Session, check};
use crate::{Error, Jail, Launch, Start};

/// A VMM has some dozen open; the agent's own limit, which it would inherit, is far above.
const DESCRIPTORS_MAX: libc::rlim_t = 1024;
/// Highest capability number that a kernel may know.
const CAPABILITY_MAX: libc::c_ulong = 63;

/// Only downwards: raising a hard limit is a right that not every root has.
fn at_most(resource: libc::__rlimit_resource_t, limit: libc::rlim_t) -> Result<libc::rlimit, Error> {
    let mut present = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a whole rlimit.
    if unsafe { libc::getrlimit(resource, &raw mut present) } != 0 {
        return Err(Error::io("read a resource limit")(io::Error::last_os_error()));
    }
    let limit = limit.min(present.rlim_max);
    Ok(libc::rlimit { rlim_cur: limit, rlim_max: limit })
}

pub struct Plan {
    pub binary: PathBuf,
    pub accelerator: Accelerator,
    pub tsc_khz: u64,
    pub version: String,
    pub launch: Launch,
    pub start: Start,
}

pub struct Newborn {
    pub record: ProcessRecord,
    /// Until the start is over, dropping this leaves no process behind.
    pub unborn: Unborn,
    pub log: Log,
}

pub fn spawn(plan: Plan) -> Result<Newborn, Error> {
    let Plan { binary, accelerator, tsc_khz, version, launch, start } = plan;
    let Launch { dir, shape, disk, memory, tap, jail } = launch;
    let control = listen(&dir, &jail)?;
    let opened_disk = open(&disk, "open the disk")?;
    let opened_memory = open(&memory, "open the memory file")?;
    // Nothing that it may write is larger: a VMM that was taken over fills the pool with no file beyond what its guest may fill anyway.
    let disk_is_device = opened_disk.metadata().map_err(Error::io("look at the disk"))?.file_type().is_block_device();
    let disk_bytes = crate::disk::size(&disk).map_err(Error::io("look at the disk"))?;
    let file_bytes = disk_bytes.max(u64::from(shape.memory_mib) << 20);
    let mut handed: Vec<OwnedFd> = vec![control.into(), opened_disk.into(), opened_memory.into()];
    let by_path = |fd: &OwnedFd| format!("/proc/self/fd/{}", fd.as_raw_fd());
    let (control, disk_path, memory_path) = (handed[0].as_raw_fd(), by_path(&handed[1]), by_path(&handed[2]));
    let tap = match tap {
        Some(tap) => {
            handed.push(tap.open().map_err(Error::io("open the tap"))?);
            handed.last().map(|tap| tap.as_raw_fd())
        }
        None => None,
    };
    // What it was given it may open again, each in its way.
    let of_disk = if disk_is_device { landlock::READ_WRITE | landlock::IOCTL_DEV } else { landlock::READ_WRITE };
    let mut files = vec![(1, of_disk), (2, landlock::READ_WRITE)];
    let memory_private = matches!(start, Start::Load { .. });
    let what = match start {
        Start::Boot { kernel, arguments } => {
            let kernel_file = open(&kernel.vmlinux, "open the kernel")?;
            handed.push(kernel_file.into());
            files.push((handed.len() - 1, landlock::READ));
            let kernel_path = by_path(handed.last().expect("just pushed"));
            let initramfs = match &kernel.initramfs {
                None => None,
                Some(path) => {
                    handed.push(open(path, "open the initramfs")?.into());
                    files.push((handed.len() - 1, landlock::READ));
                    Some(by_path(handed.last().expect("just pushed")))
                }
            };
            Beginning::Boot { kernel: kernel_path, initramfs, arguments }
        }
        Start::Load { device, .. } => {
            handed.push(open(&device, "open the device state")?.into());
            Beginning::Load { device: handed.last().expect("just pushed").as_raw_fd() }
        }
    };
    let opened = Opened { control, tap, disk: disk_path, memory: memory_path, what };
    let log = Log::new().map_err(Error::io("create the VMM's log"))?;
    let complaints = log.handle().map_err(Error::io("create the VMM's log"))?;
    let kvm = accelerator == Accelerator::Kvm;
    let files: Vec<_> = files.iter().map(|(index, rights)| (handed[*index].as_fd(), *rights)).collect();
    let rules = landlock::rules(&binary, &files, kvm).map_err(Error::io("make the VMM's file rules"))?;

    let mut command = Command::new(&binary);
    command
        .args(command::arguments(accelerator, shape, &opened, tsc_khz))
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(complaints);
    let entrance = Entrance::of(
        &jail,
        handed.iter().map(|fd| fd.as_raw_fd()).collect(),
        rules.as_ref().map(|rules| rules.as_raw_fd()),
        if kvm { probe::kvm_access().ok().flatten() } else { None },
        file_bytes,
    )?;
    // SAFETY: `Entrance::enter` makes plain system calls on memory prepared before the fork.
    unsafe { command.pre_exec(move || entrance.enter()) };
    let child = command.spawn().map_err(|cause| Error::Start { reason: format!("run {}", binary.display()), cause })?;
    drop(handed);
    let pid = i32::try_from(child.id()).expect("a pid fits");
    let unborn = Unborn::of(pid).map_err(Error::io("hold the VMM's process"))?;
    // A child that has ended already still has its entry until it is collected.
    let start_ticks = process::start_ticks(pid).map_err(Error::io("read the VMM's start time"))?;
    let boot_id = process::boot_id().map_err(Error::io("read the boot id"))?;
    let record = ProcessRecord {
        driver: super::NAME.to_owned(),
        vmm_version: version,
        pid,
        start_ticks,
        boot_id,
        dir,
        memory,
        memory_private,
        memory_mib: shape.memory_mib,
        made_by: None,
    };
    Ok(Newborn { record, unborn, log })
}

fn open(path: &Path, what: &'static str) -> Result<File, Error> {
    // Only a handle by which QEMU, as its own user, opens the file again: the right to write is checked there.
    File::open(path).map_err(Error::io(what))
}

/// The control socket listens before QEMU lives, so that there is nothing to wait for. Only root and the VMM's own user reach it.
fn listen(dir: &Path, jail: &Jail) -> Result<UnixListener, Error> {
    let failed = Error::io("make the control socket");
    let make = || -> io::Result<UnixListener> {
        let handle = File::open(dir)?;
        let path = format!("/proc/self/fd/{}/{}", handle.as_raw_fd(), qmp::SOCKET);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        chown(&path, Some(jail.uid), Some(jail.gid))?;
        Ok(listener)
    };
    make().map_err(failed)
}

/// What the child does to itself, with all memory prepared.
struct Entrance {
    session: Session,
    descriptors: Vec<RawFd>,
    rules: Option<RawFd>,
    /// The one group besides its own.
    group: Option<libc::gid_t>,
    uid: libc::uid_t,
    gid: libc::gid_t,
    descriptors_max: libc::rlimit,
    file_max: libc::rlimit,
}

impl Entrance {
    fn of(
        jail: &Jail,
        descriptors: Vec<RawFd>,
        rules: Option<RawFd>,
        group: Option<libc::gid_t>,
        file_bytes: u64,
    ) -> Result<Self, Error> {
        Ok(Self {
            session: Session::of(jail)?,
            descriptors,
            rules,
            group,
            uid: jail.uid,
            gid: jail.gid,
            descriptors_max: at_most(libc::RLIMIT_NOFILE, DESCRIPTORS_MAX)?,
            file_max: at_most(libc::RLIMIT_FSIZE, file_bytes)?,
        })
    }

    /// Only async-signal-safe calls; each that matters is checked.
    fn enter(&self) -> io::Result<()> {
        self.session.enter()?;
        // SAFETY: plain system calls; every pointer is to memory of `self` or of this frame.
        unsafe {
            check(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const self.descriptors_max))?;
            check(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const self.file_max))?;
            for fd in &self.descriptors {
                check(libc::fcntl(*fd, libc::F_SETFD, 0))?;
            }
            if libc::geteuid() == 0 {
                // A network with nothing in it: the tap it has been given is all it can speak through.
                check(libc::unshare(libc::CLONE_NEWNET))?;
                for capability in 0..=CAPABILITY_MAX {
                    // Refused for numbers that this kernel does not know.
                    libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
                }
                libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
                let groups = self.group.as_slice();
                check(libc::setgroups(groups.len(), groups.as_ptr()))?;
                check(libc::setresgid(self.gid, self.gid, self.gid))?;
                check(libc::setresuid(self.uid, self.uid, self.uid))?;
            }
            check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
            if let Some(rules) = self.rules {
                landlock::enter(rules)?;
            }
            if libc::getuid() != self.uid || libc::geteuid() != self.uid || libc::getgid() != self.gid {
                return Err(io::Error::from_raw_os_error(libc::EPERM));
            }
        }
        Ok(())
    }
}
