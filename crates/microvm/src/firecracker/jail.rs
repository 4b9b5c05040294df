//! From a launch to a jailed process: lays out what the VMM may see, has the jailer build the walls, and finds the process behind them.
//!
//! ```text
//!   <launch dir>/jail            a link to root, so that a takeover need not know the program's name
//!   <launch dir>/<program>/vm/root/
//!       disk memory kernel ...   names of the files given, or copies: nothing else of the machine has a name in here
//!       api.sock serial metrics  made before the VMM lives, so that there is nothing to wait for but the socket
//! ```
//!
//! The root is the VMM's own directory: whatever is done in it later follows no links (`socket::within`).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown, fchown, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::stat::{Mode, SFlag, mknod};
use rustix::fs::OFlags;

use super::api;
use super::versions::Release;
use crate::log::Log;
use crate::process::{self, ProcessRecord, Unborn};
use crate::session::{Session, check};
use crate::{Error, Jail, KernelImage, Launch, Start, path_text, reflink, socket};

/// In the launch directory.
pub const LINK: &str = "jail";
/// The jailer's name for the microVM; one jail lies in each launch directory.
const ID: &str = "vm";
/// A jailer that works is through in 50 ms.
const JAILER_LIMIT: Duration = Duration::from_secs(20);
/// Between looks at a process that is about to be ready: a part of the few milliseconds that it takes.
const LOOK_AGAIN: Duration = Duration::from_micros(100);
/// So long is looked for the control socket here, where looks are close (4 to 20 ms measured). Then whoever waits looks on, and can give up.
const SOCKET_SOON: Duration = Duration::from_millis(50);
/// A VMM has some dozen open.
const DESCRIPTORS_MAX: u32 = 1024;

/// Names in the jail's root.
pub mod name {
    pub const DISK: &str = "disk";
    pub const MEMORY: &str = "memory";
    pub const DEVICE: &str = "device";
    pub const KERNEL: &str = "kernel";
    pub const INITRAMFS: &str = "initramfs";
    pub const SERIAL: &str = "serial";
    pub const METRICS: &str = "metrics";
}

pub struct Newborn {
    pub record: ProcessRecord,
    /// Until the start is over, dropping this leaves no process behind.
    pub unborn: Unborn,
    pub log: Log,
    /// It has made its socket, and can make nothing more: [`close`].
    pub is_closed: bool,
}

/// Blocks. Given up half way, it leaves no process: what it has made carries its own end.
pub fn spawn(release: &Release, launch: &Launch, start: &Start) -> Result<Newborn, Error> {
    let program = release.firecracker.file_name().expect("a release's program is a file").to_owned();
    let root = launch.dir.join(&program).join(ID).join("root");
    let file_bytes = furnish(&root, launch, start)?;
    symlink(Path::new(&program).join(ID).join("root"), launch.dir.join(LINK)).map_err(Error::io("name the jail"))?;

    let log = Log::new().map_err(Error::io("create the VMM's log"))?;
    let complaints = || log.handle().map_err(Error::io("create the VMM's log"));
    let mut command = Command::new(&release.jailer);
    command
        .args(arguments(release, launch, file_bytes))
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(complaints()?)
        .stderr(complaints()?);
    let session = Session::of(&launch.jail)?;
    let parent = std::process::id();
    // SAFETY: plain system calls on memory prepared before the fork.
    unsafe {
        command.pre_exec(move || {
            session.enter()?;
            // A jailer that outlived the caller would make a VMM of which nobody knows.
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            if libc::getppid().cast_unsigned() == parent {
                Ok(())
            } else {
                Err(io::Error::from_raw_os_error(libc::ESRCH))
            }
        })
    };
    let mut jailer =
        command.spawn().map_err(|cause| Error::Start { reason: format!("run {}", release.jailer.display()), cause })?;
    let outcome = wait(&mut jailer).and_then(|status| match status {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(Error::Stillborn(format!("the jailer ended with {status}: {}", log.complaints()))),
        None => Err(Error::Silent { command: "jailer", limit: JAILER_LIMIT }),
    });
    let born = outcome.and_then(|()| find(&root, &program, launch.jail.uid));
    let (pid, unborn) = match born {
        Ok(born) => born,
        Err(error) => {
            end_all_within(&root);
            return Err(error);
        }
    };
    let record = ProcessRecord {
        driver: super::NAME.to_owned(),
        vmm_version: release.version.to_string(),
        pid,
        start_ticks: process::start_ticks(pid).map_err(|_| Error::Stillborn(log.complaints()))?,
        boot_id: process::boot_id().map_err(Error::io("read the boot id"))?,
        dir: launch.dir.clone(),
        memory: launch.memory.clone(),
        memory_private: matches!(start, Start::Load { .. }),
        memory_mib: launch.shape.memory_mib,
        made_by: None,
    };
    let is_closed = has_socket_soon(&root, &unborn);
    if is_closed {
        close(&root).map_err(Error::io("close the jail"))?;
    }
    Ok(Newborn { record, unborn, log, is_closed })
}

/// Puts everything into the root that the VMM is to find there. Answers how large the largest file is that it may write.
fn furnish(root: &Path, launch: &Launch, start: &Start) -> Result<u64, Error> {
    let Jail { uid, gid, .. } = launch.jail;
    // Each by itself: a launch directory that was taken away meanwhile is not made again.
    let levels = [root.ancestors().nth(2), root.parent(), Some(root)];
    for level in levels.into_iter().flatten() {
        fs::create_dir(level).map_err(Error::io("make the jail"))?;
    }
    let put =
        |file: &Path, name: &str, what: &'static str| give(file, &root.join(name), uid, gid).map_err(Error::io(what));
    put(&launch.disk, name::DISK, "open the disk")?;
    let disk_bytes = size(&launch.disk).map_err(Error::io("look at the disk"))?;
    // Also of a boot, which has no use for it yet.
    let memory = File::open(&launch.memory).map_err(Error::io("open the memory file"))?;
    match start {
        Start::Boot { kernel: KernelImage { vmlinux, initramfs }, .. } => {
            lend(vmlinux, &root.join(name::KERNEL)).map_err(Error::io("open the kernel"))?;
            if let Some(initramfs) = initramfs {
                lend(initramfs, &root.join(name::INITRAMFS)).map_err(Error::io("open the initramfs"))?;
            }
        }
        Start::Load { device, .. } => {
            put(&launch.memory, name::MEMORY, "open the memory file")?;
            let copy = root.join(name::DEVICE);
            let copied = fs::copy(device, &copy).and_then(|_| own(&copy, uid, gid));
            copied.map_err(Error::io("open the device state"))?;
        }
    }
    drop(memory);
    for pipe in [name::SERIAL, name::METRICS] {
        let path = root.join(pipe);
        let made = nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).map_err(io::Error::from);
        made.and_then(|()| own(&path, uid, gid)).map_err(Error::io("make the VMM's pipes"))?;
    }
    Ok(disk_bytes.max(u64::from(launch.shape.memory_mib) << 20))
}

/// Another name in the jail for a file that is the VMM's own user's; a device gets a node of its own.
fn give(file: &Path, to: &Path, uid: u32, gid: u32) -> io::Result<()> {
    let about = fs::metadata(file)?;
    if about.file_type().is_block_device() {
        mknod(to, SFlag::S_IFBLK, Mode::S_IRUSR | Mode::S_IWUSR, about.rdev())?;
        return own(to, uid, gid);
    }
    fs::hard_link(file, to)
}

/// A file of the host's for reading: a name where that can be, else a copy.
fn lend(file: &Path, to: &Path) -> io::Result<()> {
    let from = File::open(file)?;
    // What only root may read, the VMM could not read by another name either.
    let is_for_all = from.metadata()?.permissions().mode() & 0o004 != 0;
    if is_for_all && fs::hard_link(file, to).is_ok() {
        return Ok(());
    }
    let target = File::create_new(to)?;
    reflink::clone(&from, &target)?;
    target.set_permissions(fs::Permissions::from_mode(0o444))
}

fn own(path: &Path, uid: u32, gid: u32) -> io::Result<()> {
    chown(path, Some(uid), Some(gid))
}

fn size(disk: &Path) -> io::Result<u64> {
    let about = fs::metadata(disk)?;
    if !about.file_type().is_block_device() {
        return Ok(about.len());
    }
    use std::io::Seek as _;
    File::open(disk)?.seek(io::SeekFrom::End(0))
}

fn arguments(release: &Release, launch: &Launch, file_bytes: u64) -> Vec<String> {
    let jail = &launch.jail;
    let mut line: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| line.extend(words.iter().map(|word| (*word).to_owned()));
    add(&["--id", ID, "--exec-file", &path_text(&release.firecracker)]);
    add(&["--uid", &jail.uid.to_string(), "--gid", &jail.gid.to_string()]);
    add(&["--chroot-base-dir", &path_text(&launch.dir)]);
    if let Some(tap) = &launch.tap {
        add(&["--netns", &path_text(&tap.namespace)]);
    }
    add(&["--new-pid-ns"]);
    add(&["--resource-limit", &format!("fsize={file_bytes}")]);
    add(&["--resource-limit", &format!("no-file={DESCRIPTORS_MAX}")]);
    // The groups were entered before. Told of a version 2 group the jailer moves into it once more; told of none it would look for one
    // of its own name, and move there.
    match jail.cgroups.iter().find_map(|entrance| unified(entrance)) {
        Some(group) => add(&["--cgroup-version", "2", "--parent-cgroup", &group]),
        None => add(&["--cgroup-version", "1"]),
    }
    add(&["--", "--api-sock", &format!("/{}", api::SOCKET), "--level", "Warn"]);
    line
}

/// The group's path within the version 2 hierarchy, of its `cgroup.procs`.
fn unified(entrance: &Path) -> Option<String> {
    const CGROUP2_SUPER_MAGIC: libc::c_long = 0x6367_7270;
    let group = entrance.parent()?;
    if nix::sys::statfs::statfs(group).ok()?.filesystem_type().0 != CGROUP2_SUPER_MAGIC {
        return None;
    }
    let device = fs::metadata(group).ok()?.dev();
    // The mount is the highest directory that is still of that file system.
    let mount =
        group.ancestors().take_while(|path| fs::metadata(path).is_ok_and(|about| about.dev() == device)).last()?;
    let path = path_text(group.strip_prefix(mount).ok()?);
    Some(path).filter(|path| !path.is_empty())
}

/// Its end, or none when it does not come.
fn wait(jailer: &mut Child) -> Result<Option<std::process::ExitStatus>, Error> {
    let mut look = || -> io::Result<Option<std::process::ExitStatus>> {
        let held = Unborn::of(jailer.id().cast_signed())?;
        let has_ended = held.ends_within(JAILER_LIMIT);
        held.disarm();
        if has_ended {
            return jailer.wait().map(Some);
        }
        jailer.kill()?;
        jailer.wait()?;
        Ok(None)
    };
    look().map_err(Error::io("wait for the jailer"))
}

/// The VMM has made its control socket, the last file that is its own to make.
fn has_socket_soon(root: &Path, vmm: &Unborn) -> bool {
    let deadline = Instant::now() + SOCKET_SOON;
    let is_there = || fs::symlink_metadata(root.join(api::SOCKET)).is_ok_and(|it| it.file_type().is_socket());
    while !is_there() {
        if Instant::now() > deadline || vmm.ends_within(LOOK_AGAIN) {
            return false;
        }
    }
    true
}

/// The process that the jailer has written down.
fn find(root: &Path, program: &std::ffi::OsStr, uid: u32) -> Result<(i32, Unborn), Error> {
    let mut file = root.join(program).into_os_string();
    file.push(".pid");
    let text = fs::read_to_string(&file).map_err(Error::io("read the VMM's process number"))?;
    let gone = || Error::Stillborn("the VMM was gone when the jailer was through".to_owned());
    let pid: i32 = text.trim().parse().ok().filter(|pid| *pid > 1).ok_or_else(gone)?;
    // Held first, looked at then: between the two the number cannot change hands.
    let unborn = Unborn::of(pid).map_err(|_| gone())?;
    let there = fs::metadata(format!("/proc/{pid}/root/")).map_err(|_| gone())?;
    let ours = fs::metadata(root).map_err(Error::io("look at the jail"))?;
    if (there.dev(), there.ino()) != (ours.dev(), ours.ino()) {
        // Not ours: it is nobody whom we may end.
        unborn.disarm();
        return Err(gone());
    }
    let deadline = Instant::now() + JAILER_LIMIT;
    // The child drops its rights after the jailer has ended.
    let line = format!("Uid:\t{uid}\t{uid}\t");
    while !fs::read_to_string(format!("/proc/{pid}/status")).map_err(|_| gone())?.contains(&line) {
        if Instant::now() > deadline {
            return Err(Error::Stillborn("the VMM does not run as its own user".to_owned()));
        }
        if unborn.ends_within(LOOK_AGAIN) {
            return Err(gone());
        }
    }
    Ok((pid, unborn))
}

/// Of a start that failed: whatever process has this root.
fn end_all_within(root: &Path) {
    let Ok(ours) = fs::metadata(root) else { return };
    let Ok(processes) = fs::read_dir("/proc") else { return };
    for entry in processes.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let Ok(held) = Unborn::of(pid) else { continue };
        let is_within = fs::metadata(format!("/proc/{pid}/root/"))
            .is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino()));
        if !is_within {
            held.disarm();
        }
    }
}

/// Takes the jail's directories from the VMM: it finds what is there, and makes nothing beside it.
pub fn close(root: &Path) -> io::Result<()> {
    for dir in [".", "dev", "dev/net", "run"] {
        let dir = match socket::within(root, dir, OFlags::RDONLY | OFlags::DIRECTORY) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            dir => File::from(dir?),
        };
        fchown(&dir, Some(0), Some(0))?;
        dir.set_permissions(fs::Permissions::from_mode(0o711))?;
    }
    Ok(())
}

/// The jail's root of a running microVM.
pub fn root(dir: &Path) -> PathBuf {
    dir.join(LINK)
}
