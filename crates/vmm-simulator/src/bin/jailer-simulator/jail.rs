//! The jail's directory: what is in it, and how it becomes the root of everything.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use nix::sys::stat::{Mode, SFlag};
use nix::unistd::{Gid, Uid};

use crate::arguments::Arguments;

const FOLDERS: [&str; 4] = ["/", "/dev", "/dev/net", "/run"];
const FOLDER_MODE: u32 = 0o700;
/// The kernel's number of the group of small devices, to which all of these belong.
const MISC: u64 = 10;
/// The real program is static and needs none of these. The simulated one loads libraries, from where the host has them.
const LIBRARIES: [&str; 4] = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache"];

pub struct Jail {
    pub root: PathBuf,
    /// The program's file name, on the host and in the jail.
    pub program: String,
    source: PathBuf,
    uid: Uid,
    gid: Gid,
    /// Of `/dev/userfaultfd`, on a kernel that has it.
    userfaultfd: Option<u64>,
}

impl Jail {
    /// Checks, and touches nothing.
    pub fn plan(arguments: &Arguments) -> anyhow::Result<Self> {
        arguments.check_id()?;
        let real = |path: &Path| {
            path.canonicalize().with_context(|| format!("Failed to canonicalize path {}", path.display()))
        };
        let source = real(&arguments.exec_file)?;
        ensure!(source.is_file(), "{} is not a file", source.display());
        let program = source.file_name().unwrap_or_default().to_string_lossy().into_owned();
        ensure!(
            program.contains("firecracker"),
            "Invalid filename. The filename of `--exec-file` option must contain \"firecracker\": {program}"
        );
        let base = real(&arguments.chroot_base_dir)?;
        ensure!(base.is_dir(), "{} is not a directory", base.display());
        arguments.parent_cgroup(&program)?;

        let root = base.join(&program).join(&arguments.id).join("root");
        let (uid, gid) = (Uid::from_raw(arguments.uid), Gid::from_raw(arguments.gid));
        Ok(Self { root, program, source, uid, gid, userfaultfd: misc_number("userfaultfd") })
    }

    pub fn create(&self) -> anyhow::Result<()> {
        fs::create_dir_all(&self.root)
            .with_context(|| format!("Failed to create directory {}", self.root.display()))?;
        let copy = self.root.join(&self.program);
        fs::copy(&self.source, &copy)
            .with_context(|| format!("Failed to copy {} to {}", self.source.display(), copy.display()))?;
        Ok(())
    }

    /// From here on `/` is the jail, in a mount namespace of its own.
    pub fn enter(&self) -> anyhow::Result<()> {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS)
            .map_err(io::Error::from)
            .context("Failed to unshare into new mount namespace")?;
        // Before anything is mounted: nothing of it is to reach the host.
        mount(None, Path::new("/"), MsFlags::MS_SLAVE | MsFlags::MS_REC)
            .context("Failed to change the propagation type to slave")?;
        self.bind_libraries()?;
        mount(Some(&self.root), &self.root, MsFlags::MS_BIND | MsFlags::MS_REC)
            .context("Failed to bind mount the jail root directory")?;
        std::env::set_current_dir(&self.root).context("Failed to change current directory")?;
        let old = Path::new("old_root");
        fs::create_dir(old).context("Failed to create the jail root directory before pivoting root")?;
        nix::unistd::pivot_root(".", old).map_err(io::Error::from).context("Failed to pivot root")?;
        nix::unistd::chroot(".").map_err(io::Error::from).context("Failed to change root")?;
        nix::mount::umount2(old, MntFlags::MNT_DETACH)
            .map_err(io::Error::from)
            .context("Failed to unmount the old jail mount point")?;
        fs::remove_dir(old).context("Failed to remove old jail root directory")?;

        FOLDERS.iter().try_for_each(|folder| self.folder(Path::new(folder)))?;
        self.device("/dev/net/tun", 200)?;
        self.device("/dev/kvm", 232)?;
        // Not a misc device, but one of memory.
        self.node("/dev/urandom", 1, 9)?;
        self.userfaultfd.map_or(Ok(()), |minor| self.device("/dev/userfaultfd", minor))
    }

    /// The mount points are seen in the jail's directory from outside, as empty ones, and go with it.
    fn bind_libraries(&self) -> anyhow::Result<()> {
        for library in LIBRARIES.map(Path::new).into_iter().filter(|library| library.exists()) {
            let place = self.root.join(library.strip_prefix("/").expect("an absolute path"));
            if library.is_dir() {
                fs::create_dir_all(&place)?;
            } else {
                fs::create_dir_all(place.parent().expect("inside the jail"))?;
                fs::write(&place, "")?;
            }
            let bind = MsFlags::MS_BIND;
            mount(Some(library), &place, bind)
                .and_then(|()| mount(None, &place, bind | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY))
                .with_context(|| format!("bind {} into the jail", library.display()))?;
        }
        Ok(())
    }

    fn folder(&self, path: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(path).with_context(|| format!("Failed to create directory {}", path.display()))?;
        fs::set_permissions(path, fs::Permissions::from_mode(FOLDER_MODE))
            .with_context(|| format!("Failed to change permissions on {}", path.display()))?;
        self.own(path)
    }

    fn device(&self, path: &str, minor: u64) -> anyhow::Result<()> {
        self.node(path, MISC, minor)
    }

    /// One of an earlier run is an error: a jail is used once.
    fn node(&self, path: &str, major: u64, minor: u64) -> anyhow::Result<()> {
        let number = nix::sys::stat::makedev(major, minor);
        nix::sys::stat::mknod(path, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, number)
            .map_err(io::Error::from)
            .with_context(|| format!("Failed to create {path} via mknod inside the jail"))?;
        self.own(Path::new(path))
    }

    fn own(&self, path: &Path) -> anyhow::Result<()> {
        nix::unistd::chown(path, Some(self.uid), Some(self.gid))
            .map_err(io::Error::from)
            .with_context(|| format!("Failed to change owner for {}", path.display()))
    }
}

/// Errors as the system's texts, which is how they are printed.
fn mount(source: Option<&Path>, target: &Path, flags: MsFlags) -> io::Result<()> {
    Ok(nix::mount::mount(source, target, None::<&str>, flags, None::<&str>)?)
}

fn misc_number(name: &str) -> Option<u64> {
    let devices = fs::read_to_string("/proc/misc").ok()?;
    let line = devices.lines().find(|line| line.split_whitespace().nth(1) == Some(name))?;
    line.split_whitespace().next()?.parse().ok()
}
