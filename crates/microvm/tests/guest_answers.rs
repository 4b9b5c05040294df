//! A guest with a network card, on a file system with reflinks: it answers HTTP after a boot, after a load, and after a load of what the
//! loaded one saved. Needs root, QEMU, iproute2, mkfs.xfs and the artifacts of `make images`; where one is missing it says so.
//!
//! Everything happens in a namespace of the test's own, from whose inside the guest is asked, so that no address of the machine is used.

mod artifacts;

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use microvm::qemu::{Accelerator, Qemu};
use microvm::{Driver as _, GUEST_MAC, Jail, KernelImage, Launch, Microvm, SaveTarget, Shape, Start, Tap};

const UID: u32 = 0x3fff_fe00;
const MEMORY_MIB: u32 = 256;
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

fn sh(script: &str) {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

struct Stage {
    netns: String,
    dir: tempfile::TempDir,
    kernel: KernelImage,
}

impl Stage {
    fn new() -> Option<Self> {
        let artifacts::Artifacts { kernel, rootfs } = artifacts::find()?;
        let netns = format!("microvm-test-{}", std::process::id());
        let dir = tempfile::Builder::new().prefix("microvm-answers-").tempdir_in("/var/tmp").unwrap();
        let stage = Self { netns, dir, kernel };
        let (netns, at) = (&stage.netns, stage.dir.path().display());
        sh(&format!(
            "truncate -s 3G {at}/xfs; mkfs.xfs -q -m reflink=1 {at}/xfs; mkdir {at}/pool; mount -o loop {at}/xfs {at}/pool
             ip netns add {netns}; ip -n {netns} link set lo up; ip -n {netns} tuntap add dev tap0 mode tap
             ip -n {netns} link set tap0 address 02:fc:00:00:00:06
             ip -n {netns} addr add 169.254.0.22/30 dev tap0; ip -n {netns} link set tap0 up
             ip -n {netns} neigh replace 169.254.0.21 lladdr {GUEST_MAC} dev tap0 nud permanent
             cp --sparse=always {} {at}/pool/disk-0",
            rootfs.display()
        ));
        File::create(stage.file("memory", 0)).unwrap().set_len(u64::from(MEMORY_MIB) << 20).unwrap();
        Some(stage)
    }

    fn file(&self, what: &str, generation: u32) -> PathBuf {
        self.dir.path().join(format!("pool/{what}-{generation}"))
    }

    fn launch(&self, number: u32, disk: PathBuf, memory: PathBuf) -> Launch {
        let dir = self.file("run", number);
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o711)).unwrap();
        for file in [&disk, &memory] {
            fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
            chown(file, Some(UID), Some(UID)).unwrap();
        }
        let shape = Shape { vcpus: 1, memory_mib: MEMORY_MIB };
        let jail = Jail { uid: UID, gid: UID, cgroups: Vec::new() };
        let tap = Tap { namespace: Path::new("/run/netns").join(&self.netns), name: "tap0".to_owned() };
        Launch { dir, shape, disk, memory, tap: Some(tap), jail }
    }

    /// Runs something in the namespace, on a thread that ends afterwards.
    fn inside<T: Send + 'static>(&self, what: impl FnOnce() -> T + Send + 'static) -> T {
        let netns = File::open(Path::new("/run/netns").join(&self.netns)).unwrap();
        let thread = std::thread::spawn(move || {
            // SAFETY: a plain system call on an open descriptor; it concerns this thread only.
            assert_eq!(unsafe { libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) }, 0);
            what()
        });
        thread.join().unwrap()
    }

    fn answered(&self) -> Duration {
        self.inside(|| {
            let began = Instant::now();
            while !ask() {
                assert!(began.elapsed() < ANSWER_LIMIT, "the guest does not answer");
                std::thread::sleep(Duration::from_millis(2));
            }
            began.elapsed()
        })
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // What a failed test has left running holds the mount.
        let script = format!(
            "for status in /proc/[0-9]*/status; do grep -qs '^Uid:.{UID}.' $status && kill -9 $(echo $status | cut -d/ -f3); done
             ip netns del {}; for try in 1 2 3 4 5; do umount {}/pool && break; sleep 1; done",
            self.netns,
            self.dir.path().display()
        );
        let _ = Command::new("sh").args(["-c", &script]).output();
    }
}

fn ask() -> bool {
    let guest = SocketAddr::from(([169, 254, 0, 21], 49983));
    let Ok(mut stream) = TcpStream::connect_timeout(&guest, Duration::from_millis(20)) else { return false };
    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut answer = Vec::new();
    let asked = stream.write_all(b"GET /health HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n");
    asked.is_ok() && stream.read_to_end(&mut answer).is_ok() && answer.starts_with(b"HTTP/1.1 2")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_answers_after_boot_and_after_each_load() {
    let Some(stage) = Stage::new() else { return };
    let driver = Qemu::new(None, Accelerator::Tcg).await.unwrap();
    let began = Instant::now();
    let launch = stage.launch(0, stage.file("disk", 0), stage.file("memory", 0));
    let boot = Start::Boot { kernel: stage.kernel.clone(), arguments: String::new() };
    let mut vm: std::sync::Arc<dyn Microvm> = driver.start(launch, boot).await.unwrap();
    stage.answered();
    println!("booted to the first answer in {:?}", began.elapsed());
    for generation in 1..4 {
        let target = SaveTarget { memory: stage.file("memory", generation), device: stage.file("device", generation) };
        let saved = vm.save(&target).await.unwrap();
        println!("generation {generation}: {} KiB copied, stopped {:?}", saved.copied_bytes / 1024, saved.stopped);
        // It goes on in place after a save, too.
        vm.continue_vcpus().await.unwrap();
        stage.answered();
        vm.kill().await.unwrap();
        // The disk of the moment of the save would be a clone taken then; a guest that only listens does not mind a later one.
        fs::rename(stage.file("disk", generation - 1), stage.file("disk", generation)).unwrap();
        let began = Instant::now();
        let launch = stage.launch(generation, stage.file("disk", generation), target.memory);
        vm = driver.start(launch, Start::Load { device: target.device, made_by: None }).await.unwrap();
        let loaded = began.elapsed();
        vm.continue_vcpus().await.unwrap();
        stage.answered();
        println!("restored to the first answer in {:?}, loaded after {loaded:?}", began.elapsed());
    }
    vm.kill().await.unwrap();
}
