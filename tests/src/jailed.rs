//! Firecracker microVMs of no platform: started by the driver that ships, behind the jailer, in a scratch directory. It is the release that
//! `WRENN_FIRECRACKER_BIN` and `WRENN_JAILER_BIN` name, with the kernel and the image of `make images`; else the simulated one, with a kernel
//! and a disk that are none.
//!
//! Dropping it ends what it has started and removes its network namespace.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use microvm::firecracker::{Firecracker, Options, Release};
use microvm::{Jail, KernelImage, Launch, Microvm, Shape, Start, Tap};
use tempfile::TempDir;

use crate::{objects, wait};

pub const MEMORY_MIB: u32 = 256;
const TAP: &str = "tap0";
/// Of a guest that is booted, until its kernel has come to its end.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

pub struct Jails {
    pub dir: TempDir,
    pub release: Release,
    pub driver: Firecracker,
    pub is_real: bool,
    /// As an agent's: its users are those of these VMMs.
    pub tag: String,
    kernel: KernelImage,
    rootfs: Option<PathBuf>,
    namespace: String,
}

impl Jails {
    /// None, and said, where it cannot be: not as root, or without what a real one boots.
    pub async fn new() -> Result<Option<Self>> {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: the jailer needs root");
            return Ok(None);
        }
        let named = std::env::var_os("WRENN_FIRECRACKER_BIN").zip(std::env::var_os("WRENN_JAILER_BIN"));
        let is_real = named.is_some();
        let simulated = vmm_simulator::programs;
        let (firecracker, jailer) = named.map_or_else(
            || (simulated().firecracker, simulated().jailer),
            |(firecracker, jailer)| (firecracker.into(), jailer.into()),
        );
        let release = Release::find(&firecracker, &jailer).await?;
        let dir = tempfile::Builder::new().prefix("wrenn-jails-").tempdir_in("/var/tmp")?;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711))?;
        let (kernel, rootfs) = match is_real {
            true => match artifacts() {
                Some((kernel, rootfs)) => (kernel, Some(rootfs)),
                None => return Ok(None),
            },
            false => {
                let vmlinux = dir.path().join("vmlinux");
                fs::write(&vmlinux, b"\x7fELF\x02\x01\x01")?;
                (KernelImage { vmlinux, initramfs: None }, None)
            }
        };
        let driver = Firecracker::new(release.clone(), Vec::new(), Options::default());
        let tag = format!("{:04x}0000", std::process::id() & 0xffff);
        let namespace = format!("wrenn-jails-{}", std::process::id());
        let jails = Self { dir, release, driver, is_real, tag, kernel, rootfs, namespace };
        ip(&["netns", "add", &jails.namespace])?;
        ip(&["-n", &jails.namespace, "tuntap", "add", "dev", TAP, "mode", "tap"])?;
        Ok(Some(jails))
    }

    /// The user of a slot's VMM, as an agent of this tag gives it.
    pub fn user(&self, slot: u32) -> u32 {
        0x4000_0000 + (u32::from_str_radix(&self.tag[..4], 16).expect("it is hex digits") << 15) + slot
    }

    pub fn tap(&self) -> Tap {
        Tap { namespace: PathBuf::from("/run/netns").join(&self.namespace), name: TAP.to_owned() }
    }

    /// A disk and a memory file in `place`, and what is needed to start a microVM with them.
    pub fn launch(&self, place: &Path, slot: u32) -> Result<Launch> {
        fs::create_dir_all(place).with_context(|| format!("make {}", place.display()))?;
        let (disk, memory) = (place.join("disk"), place.join("memory"));
        match &self.rootfs {
            Some(rootfs) => copy(rootfs, &disk)?,
            None => fs::write(&disk, "disk")?,
        }
        File::create(&memory)?.set_len(u64::from(MEMORY_MIB) << 20)?;
        let launch = self.launch_of(&disk, &memory, &place.join("run"), slot);
        self.hand_over(&[&launch.disk, &launch.memory], slot)?;
        fs::create_dir(&launch.dir)?;
        fs::set_permissions(&launch.dir, fs::Permissions::from_mode(0o711))?;
        Ok(launch)
    }

    /// With files that are there.
    pub fn launch_of(&self, disk: &Path, memory: &Path, run: &Path, slot: u32) -> Launch {
        let user = self.user(slot);
        Launch {
            dir: run.to_owned(),
            shape: Shape { vcpus: 1, memory_mib: MEMORY_MIB },
            disk: disk.to_owned(),
            memory: memory.to_owned(),
            tap: Some(self.tap()),
            jail: Jail { uid: user, gid: user, cgroups: Vec::new() },
        }
    }

    /// Files of a slot's VMM are its user's alone.
    pub fn hand_over(&self, files: &[&Path], slot: u32) -> Result<()> {
        let user = self.user(slot);
        for file in files {
            chown(file, Some(user), Some(user))?;
            fs::set_permissions(file, fs::Permissions::from_mode(0o600))?;
        }
        Ok(())
    }

    pub fn boot(&self) -> Start {
        Start::Boot { kernel: self.kernel.clone(), arguments: "loglevel=7 ignore_loglevel".to_owned() }
    }

    pub async fn comes_up(&self, vm: &Arc<dyn Microvm>) {
        wait::until("the guest's kernel comes to its end", BOOT_LIMIT, || async {
            let console = vm.console_tail(usize::MAX).await.unwrap_or_default();
            String::from_utf8_lossy(&console).contains("Run /init as init process").then_some(())
        })
        .await;
    }
}

impl Drop for Jails {
    fn drop(&mut self) {
        for pid in objects::microvms(&self.tag) {
            // SAFETY: a plain system call; it runs as a user that these alone have.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        let _ = ip(&["netns", "del", &self.namespace]);
    }
}

/// Kernel and image of `make images`.
fn artifacts() -> Option<(KernelImage, PathBuf)> {
    let place = std::env::var_os("WRENN_TEST_ARTIFACTS").map(PathBuf::from)?;
    let rootfs = place.join("images/minimal/rootfs.ext4");
    let names = fs::read_dir(place.join("kernels")).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    let version = names.filter_map(|name| Some(name.strip_prefix("vmlinux-")?.to_owned())).max();
    let Some(version) = version.filter(|_| rootfs.exists()) else {
        println!("SKIPPED: no guest kernel and image in {}: run `make images`", place.display());
        return None;
    };
    let file = |name: &str| place.join("kernels").join(format!("{name}-{version}"));
    let initramfs = Some(file("initramfs")).filter(|path| path.exists());
    Some((KernelImage { vmlinux: file("vmlinux"), initramfs }, rootfs))
}

/// Sparse, and shared where the file system can.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let done = Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(from).arg(to).status()?;
    ensure!(done.success(), "copy {}", from.display());
    Ok(())
}

fn ip(arguments: &[&str]) -> Result<()> {
    let done = Command::new("ip").args(arguments).stdin(Stdio::null()).output().context("run ip")?;
    ensure!(done.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}
