//! What every driver promises, by the same tests over the fake and over real QEMU microVMs.
//!
//! The QEMU half needs root, QEMU and the artifacts of `make images` (in `WRENN_TEST_ARTIFACTS`, else `current` in the cache); where one
//! is missing it says so and does not count as a pass of anything.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use microvm::fake::Fake;
use microvm::qemu::{Accelerator, Qemu};
use microvm::{Driver, Error, Jail, KernelImage, Launch, Microvm, SaveTarget, Shape, Start};

/// A user of each bench's own, so that tests at the same time do not count each other's processes.
static NEXT_UID: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0x3fff_ff00);

struct Bench {
    dir: tempfile::TempDir,
    kernel: KernelImage,
    rootfs: Option<PathBuf>,
    uid: u32,
}

impl Bench {
    /// Without artifacts: for the fake.
    fn plain() -> Self {
        let dir = tempfile::Builder::new().prefix("microvm-test-").tempdir_in("/var/tmp").unwrap();
        let vmlinux = dir.path().join("vmlinux");
        fs::write(&vmlinux, "").unwrap();
        let uid = NEXT_UID.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Self { dir, kernel: KernelImage { vmlinux, initramfs: None }, rootfs: None, uid }
    }

    fn real() -> Option<Self> {
        let artifacts = artifacts()?;
        let find = |prefix: &str| {
            let entries = fs::read_dir(artifacts.join("kernels")).ok()?;
            entries
                .flatten()
                .map(|entry| entry.path())
                .find(|path| path.file_name().unwrap().to_string_lossy().starts_with(prefix))
        };
        let (Some(vmlinux), rootfs) = (find("vmlinux-"), artifacts.join("images/minimal/rootfs.ext4")) else {
            println!("SKIPPED: no guest kernel in {}", artifacts.display());
            return None;
        };
        let mut bench = Self::plain();
        bench.kernel = KernelImage { vmlinux, initramfs: find("initramfs-") };
        bench.rootfs = Some(rootfs);
        Some(bench)
    }

    fn launch(&self, name: &str) -> Launch {
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

    fn boot(&self) -> Start {
        Start::Boot { kernel: self.kernel.clone(), arguments: "loglevel=7 ignore_loglevel".to_owned() }
    }
}

fn artifacts() -> Option<PathBuf> {
    // SAFETY: geteuid has no effects.
    if unsafe { libc::geteuid() } != 0 {
        println!("SKIPPED: real microVMs need root");
        return None;
    }
    let cache = std::env::var_os("WRENN_CACHE")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/wrenn")))?;
    let place = std::env::var_os("WRENN_TEST_ARTIFACTS").map_or_else(|| cache.join("current"), PathBuf::from);
    if place.join("images/minimal/rootfs.ext4").exists() {
        return Some(place);
    }
    println!("SKIPPED: no artifacts in {}: run `make images`", place.display());
    None
}

/// Start, adoption by another handle, the end noticed within a second, kill twice, and nothing to adopt afterwards.
async fn lives_and_ends(driver: &dyn Driver, bench: &Bench) {
    let vm = driver.start(bench.launch("one"), bench.boot()).await.unwrap();
    let record = vm.record().clone();
    vm.stop_vcpus().await.unwrap();
    vm.continue_vcpus().await.unwrap();
    assert!(vm.stats().await.unwrap().rss_bytes > 0);
    // The starter's handle goes; the microVM stays and is taken over.
    drop(vm);
    let adopted = driver.adopt(&record).await.unwrap();
    adopted.stop_vcpus().await.unwrap();
    adopted.continue_vcpus().await.unwrap();
    let second = driver.adopt(&record).await.unwrap();
    drop(adopted);
    second.stop_vcpus().await.unwrap();
    // SAFETY: the record's process was just adopted, so the number is its own.
    unsafe { libc::kill(record.pid, libc::SIGKILL) };
    let began = Instant::now();
    let cause = tokio::time::timeout(Duration::from_secs(5), second.exited()).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "noticed after {:?}", began.elapsed());
    assert!(cause.to_string().contains("ended"), "{cause}");
    second.kill().await.unwrap();
    second.kill().await.unwrap();
    assert!(matches!(driver.adopt(&record).await, Err(Error::Gone)));
    assert!(matches!(second.stop_vcpus().await, Err(Error::Gone)));

    let other = microvm::ProcessRecord { pid: std::process::id() as i32, ..record };
    assert!(matches!(driver.adopt(&other).await, Err(Error::Gone)), "a reused number is not adopted");
}

/// Files that are not there: an error, and no process of that user left.
async fn fails_cleanly(driver: &dyn Driver, bench: &Bench) {
    for (name, spoil) in [("no-disk", 0), ("no-memory", 1), ("no-kernel", 2)] {
        let mut launch = bench.launch(name);
        let mut kernel = bench.kernel.clone();
        match spoil {
            0 => launch.disk = "/nowhere/disk".into(),
            1 => launch.memory = "/nowhere/memory".into(),
            _ => kernel.vmlinux = "/nowhere/vmlinux".into(),
        }
        let started = driver.start(launch, Start::Boot { kernel, arguments: String::new() }).await;
        assert!(matches!(started, Err(Error::Io { .. })), "{name}");
    }
    assert_eq!(processes_of(bench.uid), 0);
}

fn processes_of(uid: u32) -> usize {
    let line = format!("Uid:\t{uid}\t");
    let statuses = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("status")).ok());
    statuses.filter(|status| status.contains(&line) && !status.contains("State:\tZ")).count()
}

#[tokio::test]
async fn the_fake_keeps_the_promises() {
    let bench = Bench::plain();
    lives_and_ends(&Fake::new(), &bench).await;
    fails_cleanly(&Fake::new(), &bench).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_keeps_the_promises() {
    let Some(bench) = Bench::real() else { return };
    let driver = Qemu::new(None, Accelerator::Tcg).await.unwrap();
    lives_and_ends(&driver, &bench).await;
    fails_cleanly(&driver, &bench).await;

    // A kernel that is none: QEMU says so, the error carries it, no process is left.
    let junk = bench.dir.path().join("junk");
    fs::write(&junk, "this is no kernel").unwrap();
    let start = Start::Boot { kernel: KernelImage { vmlinux: junk, initramfs: None }, arguments: String::new() };
    let error = driver.start(bench.launch("junk-kernel"), start).await.err().unwrap();
    assert!(matches!(&error, Error::Stillborn(said) if !said.is_empty()), "{error}");
    assert_eq!(processes_of(bench.uid), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_runs_jailed() {
    let Some(bench) = Bench::real() else { return };
    let driver = Qemu::new(None, Accelerator::Tcg).await.unwrap();
    let vm = driver.start(bench.launch("jail"), bench.boot()).await.unwrap();
    let uid = bench.uid;
    let status = fs::read_to_string(format!("/proc/{}/status", vm.record().pid)).unwrap();
    for line in [
        format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}"),
        format!("Gid:\t{uid}\t{uid}\t{uid}\t{uid}"),
        "Groups:\t ".to_owned(),
        "CapEff:\t0000000000000000".to_owned(),
        "CapBnd:\t0000000000000000".to_owned(),
        "NoNewPrivs:\t1".to_owned(),
        "Seccomp:\t2".to_owned(),
    ] {
        assert!(status.contains(&line), "{line:?} is not in\n{status}");
    }
    let limits = fs::read_to_string(format!("/proc/{}/limits", vm.record().pid)).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..].split_whitespace().take(2).map(|word| word.parse::<u64>().unwrap()).collect::<Vec<_>>()
    };
    let largest = fs::metadata(bench.dir.path().join("jail.disk")).unwrap().len().max(256 << 20);
    assert_eq!(limit("Max file size"), [largest; 2]);
    assert_eq!(limit("Max open files"), [1024; 2]);
    assert_eq!(limit("Max core file size"), [0; 2]);
    let network = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_ne!(network(vm.record().pid), network(std::process::id() as i32), "the VMM is in the host's network");
    // Its complaints go nowhere that could grow.
    let log = fs::read_link(format!("/proc/{}/fd/2", vm.record().pid)).unwrap();
    assert!(log.to_string_lossy().contains("memfd:vmm-log"), "{log:?}");
    vm.kill().await.unwrap();
}

/// A start that its caller gave up, at any moment, leaves no process; a call that was given up does not confuse the next one.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_given_up_leaves_nothing() {
    let Some(bench) = Bench::real() else { return };
    let driver = Qemu::new(None, Accelerator::Tcg).await.unwrap();
    for milliseconds in [0, 1, 3, 10, 20] {
        let launch = bench.launch(&format!("given-up-{milliseconds}"));
        let starting = driver.start(launch, bench.boot());
        if let Ok(started) = tokio::time::timeout(Duration::from_millis(milliseconds), starting).await {
            started.unwrap().kill().await.unwrap();
        }
        let began = Instant::now();
        while processes_of(bench.uid) > 0 {
            assert!(began.elapsed() < Duration::from_secs(10), "given up after {milliseconds} ms and still there");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let vm = driver.start(bench.launch("calls"), bench.boot()).await.unwrap();
    for microseconds in (0..2000).step_by(100) {
        let _ = tokio::time::timeout(Duration::from_micros(microseconds), vm.console_tail(64 * 1024)).await;
        vm.stop_vcpus().await.unwrap();
        vm.continue_vcpus().await.unwrap();
    }
    // A save into a place that is taken is refused and takes nothing away; one that fails half way leaves nothing.
    let taken = bench.dir.path().join("taken");
    fs::write(&taken, "mine").unwrap();
    let target = SaveTarget { memory: bench.dir.path().join("fresh"), device: taken.clone() };
    assert!(vm.save(&target).await.is_err());
    assert_eq!(fs::read(&taken).unwrap(), b"mine");
    let target = SaveTarget { memory: bench.dir.path().join("no/such/place"), device: bench.dir.path().join("half") };
    assert!(vm.save(&target).await.is_err());
    assert!(!target.device.exists());
    vm.continue_vcpus().await.unwrap();
    vm.kill().await.unwrap();
}

/// In the jail `/dev/kvm` can be opened; whether a guest then runs is for the probe to say.
#[tokio::test(flavor = "multi_thread")]
async fn kvm_is_within_reach_of_the_jail() {
    let Some(bench) = Bench::real() else { return };
    if let Err(reason) = Qemu::kvm_within_reach() {
        println!("SKIPPED: no KVM: {reason}");
        return;
    }
    let driver = Qemu::new(None, Accelerator::Kvm).await.unwrap();
    let vm = driver.start(bench.launch("kvm"), bench.boot()).await.unwrap();
    let files = fs::read_dir(format!("/proc/{}/fd", vm.record().pid)).unwrap().flatten();
    assert!(files.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|path| path == Path::new("/dev/kvm")));
    vm.kill().await.unwrap();
}

/// Boots, saves, loads as a private clone, saves that again as the next generation: the guest goes on each time where it stood.
#[tokio::test(flavor = "multi_thread")]
async fn qemu_saves_and_loads_generations() {
    let Some(bench) = Bench::real() else { return };
    let driver = Qemu::new(None, Accelerator::Tcg).await.unwrap();
    let vm = driver.start(bench.launch("boot"), bench.boot()).await.unwrap();
    wait_for_console(&vm, "Run /init as init process").await;
    let mut generation = save(&vm, bench.dir.path(), 1).await;
    vm.kill().await.unwrap();
    for number in 2..4 {
        let launch = bench.launch(&format!("load{number}"));
        fs::rename(bench.dir.path().join(format!("gen{}.memory", number - 1)), &launch.memory).unwrap();
        chown(&launch.memory, Some(bench.uid), Some(bench.uid)).unwrap();
        let vm = driver.start(launch, Start::Load { device: generation.device.clone() }).await.unwrap();
        let before = vm.stats().await.unwrap().cpu;
        vm.continue_vcpus().await.unwrap();
        let began = Instant::now();
        while vm.stats().await.unwrap().cpu < before + Duration::from_millis(50) {
            assert!(began.elapsed() < Duration::from_secs(20), "the restored guest does not run");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(save(&vm, bench.dir.path(), number).await.memory.exists());
        // Still the same guest, in place, after a save: continued instead of killed.
        vm.continue_vcpus().await.unwrap();
        generation = SaveTarget {
            memory: bench.dir.path().join(format!("gen{number}.memory")),
            device: bench.dir.path().join(format!("gen{number}.device")),
        };
        vm.kill().await.unwrap();
    }
}

async fn save(vm: &Arc<dyn Microvm>, dir: &Path, number: u32) -> SaveTarget {
    let target =
        SaveTarget { memory: dir.join(format!("gen{number}.memory")), device: dir.join(format!("gen{number}.device")) };
    let saved = vm.save(&target).await.unwrap();
    println!("generation {number}: {} KiB copied, stopped {:?}", saved.copied_bytes / 1024, saved.stopped);
    assert!(fs::metadata(&target.device).unwrap().len() > 1000);
    assert_eq!(fs::metadata(&target.memory).unwrap().len(), 256 << 20);
    target
}

async fn wait_for_console(vm: &Arc<dyn Microvm>, text: &str) {
    let began = Instant::now();
    loop {
        let console = vm.console_tail(64 * 1024).await.unwrap();
        if String::from_utf8_lossy(&console).contains(text) {
            return;
        }
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "no {text:?} on the console: {}",
            String::from_utf8_lossy(&console)
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
