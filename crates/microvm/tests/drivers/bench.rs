//! What microVMs of the tests are made of.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use microvm::{Jail, KernelImage, Launch, Shape, Start};

use crate::artifacts;

/// A user of each bench's own, so that tests at the same time do not count each other's processes.
static NEXT_UID: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0x3fff_ff00);

pub struct Bench {
    pub dir: tempfile::TempDir,
    pub kernel: KernelImage,
    pub rootfs: Option<PathBuf>,
    pub uid: u32,
}

impl Bench {
    /// Without artifacts: for the fake.
    pub fn plain() -> Self {
        let dir = tempfile::Builder::new().prefix("microvm-test-").tempdir_in("/var/tmp").unwrap();
        let vmlinux = dir.path().join("vmlinux");
        // What a loader looks at first, where there is one.
        fs::write(&vmlinux, b"\x7fELF\x02\x01\x01").unwrap();
        let uid = NEXT_UID.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Self { dir, kernel: KernelImage { vmlinux, initramfs: None }, rootfs: None, uid }
    }

    pub fn real() -> Option<Self> {
        let found = artifacts::find()?;
        let mut bench = Self::plain();
        bench.kernel = found.kernel;
        bench.rootfs = Some(found.rootfs);
        Some(bench)
    }

    pub fn launch(&self, name: &str) -> Launch {
        let dir = self.dir.path().join(name);
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o711)).unwrap();
        let (disk, memory) =
            (self.dir.path().join(format!("{name}.disk")), self.dir.path().join(format!("{name}.memory")));
        match &self.rootfs {
            Some(rootfs) => {
                let copied =
                    std::process::Command::new("cp").args(["--sparse=always"]).arg(rootfs).arg(&disk).status().unwrap();
                assert!(copied.success());
            }
            None => fs::write(&disk, "disk").unwrap(),
        }
        File::create(&memory).unwrap().set_len(256 << 20).unwrap();
        for file in [&disk, &memory] {
            fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
            chown(file, Some(self.uid), Some(self.uid)).unwrap();
        }
        Launch {
            dir,
            shape: Shape { vcpus: 1, memory_mib: 256 },
            disk,
            memory,
            tap: None,
            jail: Jail { uid: self.uid, gid: self.uid, cgroups: Vec::new() },
        }
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
