//! What microVMs of the tests are made of.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use microvm::{Jail, KernelImage, Launch, Shape, Start};
use nix::sys::stat::{Mode, SFlag, mknod};

use crate::artifacts;

/// A user of each bench's own, so that tests at the same time do not count each other's processes.
static NEXT_UID: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0x3fff_ff00);

pub struct Bench {
    pub dir: tempfile::TempDir,
    pub kernel: KernelImage,
    pub rootfs: Option<PathBuf>,
    pub uid: u32,
    /// Disks are shown as block devices; those that were made.
    devices: Option<Mutex<Vec<String>>>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        for device in self.devices.iter().flat_map(|devices| devices.lock().unwrap().clone()) {
            let _ = Command::new("losetup").args(["-d", &device]).status();
        }
    }
}

impl Bench {
    /// Without artifacts: for the fake.
    pub fn plain() -> Self {
        let dir = tempfile::Builder::new().prefix("microvm-test-").tempdir_in("/var/tmp").unwrap();
        let vmlinux = dir.path().join("vmlinux");
        // What a loader looks at first, where there is one.
        fs::write(&vmlinux, b"\x7fELF\x02\x01\x01").unwrap();
        let uid = NEXT_UID.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Self { dir, kernel: KernelImage { vmlinux, initramfs: None }, rootfs: None, uid, devices: None }
    }

    pub fn real() -> Option<Self> {
        let found = artifacts::find()?;
        let mut bench = Self::plain();
        bench.kernel = found.kernel;
        bench.rootfs = Some(found.rootfs);
        Some(bench)
    }

    /// From now on disks are devices, as device-mapper's are.
    pub fn use_devices(&mut self) {
        self.devices = Some(Mutex::default());
    }

    pub fn launch(&self, name: &str) -> Launch {
        let dir = self.dir.path().join(name);
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o711)).unwrap();
        let (disk, memory) =
            (self.dir.path().join(format!("{name}.disk")), self.dir.path().join(format!("{name}.memory")));
        match &self.rootfs {
            Some(rootfs) => {
                let copied = Command::new("cp").args(["--sparse=always"]).arg(rootfs).arg(&disk).status().unwrap();
                assert!(copied.success());
            }
            None => fs::write(&disk, [b'd'; 4096]).unwrap(),
        }
        File::create(&memory).unwrap().set_len(256 << 20).unwrap();
        for file in [&disk, &memory] {
            fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
            chown(file, Some(self.uid), Some(self.uid)).unwrap();
        }
        let disk = match &self.devices {
            Some(devices) => {
                let (device, node) = self.show(&disk, name);
                devices.lock().unwrap().push(device);
                node
            }
            None => disk,
        };
        Launch {
            dir,
            shape: Shape { vcpus: 1, memory_mib: 256 },
            disk,
            memory,
            tap: None,
            jail: Jail { uid: self.uid, gid: self.uid, cgroups: Vec::new() },
        }
    }

    /// A loop device, and a node for it that is the VMM's user's.
    fn show(&self, disk: &Path, name: &str) -> (String, PathBuf) {
        let shown = Command::new("losetup").args(["-f", "--show"]).arg(disk).output().unwrap();
        assert!(shown.status.success(), "{}", String::from_utf8_lossy(&shown.stderr));
        let device = String::from_utf8(shown.stdout).unwrap().trim().to_owned();
        let node = self.dir.path().join(format!("{name}.node"));
        mknod(&node, SFlag::S_IFBLK, Mode::S_IRUSR | Mode::S_IWUSR, fs::metadata(&device).unwrap().rdev()).unwrap();
        chown(&node, Some(self.uid), Some(self.uid)).unwrap();
        (device, node)
    }

    /// With a copy of a memory that was saved.
    pub fn launch_of(&self, name: &str, memory: &Path) -> Launch {
        let launch = self.launch(name);
        fs::copy(memory, &launch.memory).unwrap();
        chown(&launch.memory, Some(self.uid), Some(self.uid)).unwrap();
        launch
    }

    pub fn boot(&self) -> Start {
        Start::Boot { kernel: self.kernel.clone(), arguments: "loglevel=7 ignore_loglevel".to_owned() }
    }
}
