//! Firecracker behind its jailer. The simulated guest knows what its memory held when it was saved, and refuses to be loaded with another,
//! so every load here proves that pages were put onto the right base.
//!
//! With the real program the same tests run; what needs a guest that boots asks for KVM with hardware behind it.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use microvm::firecracker::{Firecracker, HugePages, Options, Release};
use microvm::{Driver, Error, KernelImage, Launch, Microvm, SaveTarget, Stamp, Start, Tap};
use serde_json::json;

use crate::bench::Bench;
use crate::promises::{self, comes_up, load, processes_of, runs, save};

struct Stage {
    bench: Bench,
    driver: Firecracker,
    netns: String,
    is_real: bool,
}

impl Stage {
    async fn new() -> Option<Self> {
        Self::with(Options::default(), Vec::new()).await
    }

    async fn with(options: Options, older: Vec<Release>) -> Option<Self> {
        // SAFETY: geteuid has no effects.
        if unsafe { libc::geteuid() } != 0 {
            println!("SKIPPED: the jailer needs root");
            return None;
        }
        let real = std::env::var_os("WRENN_FIRECRACKER_BIN").zip(std::env::var_os("WRENN_JAILER_BIN"));
        let is_real = real.is_some();
        let (firecracker, jailer) = match real {
            Some((firecracker, jailer)) => (PathBuf::from(firecracker), PathBuf::from(jailer)),
            None => {
                let programs = vmm_simulator::programs();
                (programs.firecracker, programs.jailer)
            }
        };
        let bench = if is_real { Bench::real()? } else { Bench::plain() };
        let release = Release::find(&firecracker, &jailer).await.unwrap();
        let driver = Firecracker::new(release, older, options);
        let netns = format!("microvm-fc-{}-{}", std::process::id(), bench.uid);
        let made = Command::new("sh")
            .args(["-ec", &format!("ip netns add {netns}; ip -n {netns} tuntap add dev tap0 mode tap")])
            .status()
            .unwrap();
        assert!(made.success());
        Some(Self { bench, driver, netns, is_real })
    }

    fn launch(&self, name: &str) -> Launch {
        let tap = Tap { namespace: PathBuf::from("/run/netns").join(&self.netns), name: "tap0".to_owned() };
        Launch { tap: Some(tap), ..self.bench.launch(name) }
    }

    async fn boot(&self, name: &str) -> Arc<dyn Microvm> {
        self.driver.start(self.launch(name), self.bench.boot()).await.unwrap()
    }

    /// Without a card: as it is loaded again.
    async fn boot_alone(&self, name: &str) -> Arc<dyn Microvm> {
        self.driver.start(self.bench.launch(name), self.bench.boot()).await.unwrap()
    }

    /// A guest that gets to its end; false, and said, where a real one cannot. Whoever asks for Firecracker by name has promised that it can.
    fn boots(&self) -> bool {
        let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let has_hardware = flags.contains(" vmx ") || flags.contains(" svm ");
        let is_promised = std::env::var_os("WRENN_VMM").is_some_and(|wished| wished == "firecracker");
        if self.is_real && !has_hardware && !is_promised {
            println!("SKIPPED: a real guest boots on KVM with hardware behind it alone");
            return false;
        }
        true
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let uid = self.bench.uid;
        // Of a test that failed.
        let script = format!(
            "for status in /proc/[0-9]*/status; do grep -qs '^Uid:.{uid}.' $status && kill -9 $(echo $status | cut -d/ -f3); done
             ip netns del {}",
            self.netns
        );
        let _ = Command::new("sh").args(["-c", &script]).output();
    }
}

fn root(vm: &dyn Microvm) -> PathBuf {
    vm.record().dir.join("jail")
}

#[tokio::test(flavor = "multi_thread")]
async fn it_lives_and_ends_and_fails_cleanly() {
    let Some(stage) = Stage::new().await else { return };
    promises::lives_and_ends(&stage.driver, &stage.bench).await;
    promises::fails_cleanly(&stage.driver, &stage.bench).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_given_up_leaves_nothing() {
    let Some(stage) = Stage::new().await else { return };
    promises::what_is_given_up_leaves_nothing(&stage.driver, &stage.bench).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn generations_follow_each_other() {
    let Some(stage) = Stage::new().await.filter(Stage::boots) else { return };
    promises::generations_follow_each_other(&stage.driver, &stage.bench).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_may_be_a_device() {
    let Some(mut stage) = Stage::new().await.filter(Stage::boots) else { return };
    stage.bench.use_devices();
    promises::generations_follow_each_other(&stage.driver, &stage.bench).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_states_are_refused() {
    let Some(stage) = Stage::new().await.filter(Stage::boots) else { return };
    promises::broken_states_are_refused(&stage.driver, &stage.bench).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moved_one_is_taken_over() {
    let Some(stage) = Stage::new().await.filter(Stage::boots) else { return };
    promises::a_moved_one_is_taken_over(&stage.driver, &stage.bench).await;
}

/// In the jail: a user, a root, a network and a process table of its own, limits, and names of nothing but its own files.
#[tokio::test(flavor = "multi_thread")]
async fn it_runs_jailed() {
    let Some(stage) = Stage::new().await else { return };
    let vm = stage.boot("jailed").await;
    let (pid, uid) = (vm.record().pid, stage.bench.uid);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for line in [
        format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}"),
        format!("Gid:\t{uid}\t{uid}\t{uid}\t{uid}"),
        "CapEff:\t0000000000000000".to_owned(),
    ] {
        assert!(status.contains(&line), "{line:?} is not in\n{status}");
    }
    let nspid = status.lines().find(|line| line.starts_with("NSpid:")).unwrap();
    assert_eq!(nspid.split_whitespace().last(), Some("1"), "it is not the first of its own process table");
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..].split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(limit("Max open files"), 1024);
    assert_eq!(limit("Max core file size"), 0);
    let disk = fs::metadata(stage.bench.dir.path().join("jailed.disk")).unwrap().len();
    assert_eq!(limit("Max file size"), disk.max(256 << 20));
    let of = |pid: &str, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    for kind in ["mnt", "net", "pid"] {
        assert_ne!(of(&pid.to_string(), kind), of("self", kind), "{kind}");
    }
    let inner = fs::metadata(format!("/run/netns/{}", stage.netns)).unwrap().ino();
    assert_eq!(of(&pid.to_string(), "net").to_string_lossy(), format!("net:[{inner}]"));
    let (ours, its) = (fs::metadata(root(vm.as_ref())).unwrap(), fs::metadata(format!("/proc/{pid}/root/")).unwrap());
    assert_eq!((ours.dev(), ours.ino()), (its.dev(), its.ino()));
    // It can make nothing beside what it was given.
    assert_eq!((ours.uid(), ours.mode() & 0o7777), (0, 0o711));
    for made in fs::read_dir(root(vm.as_ref())).unwrap().flatten().filter(|entry| entry.path().is_dir()) {
        assert_eq!(made.metadata().unwrap().uid(), 0, "{made:?}");
    }
    assert!(fs::symlink_metadata(root(vm.as_ref()).join("serial")).unwrap().file_type().is_fifo());
    vm.kill().await.unwrap();
    assert_eq!(processes_of(uid), 0);
}

/// In the control groups that it is given, of either version.
#[tokio::test(flavor = "multi_thread")]
async fn it_enters_its_control_groups() {
    let Some(stage) = Stage::new().await else { return };
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let hierarchies: Vec<(String, PathBuf)> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (point, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
            let is_pids = kind == "cgroup" && options.split(',').any(|option| option == "pids");
            (is_pids || kind == "cgroup2").then(|| (kind.to_owned(), PathBuf::from(point)))
        })
        .collect();
    let mut tried = 0;
    for (kind, point) in hierarchies {
        let group = point.join(format!("wrenn-test-{}", stage.bench.uid));
        if let Err(error) = fs::create_dir(&group) {
            println!("SKIPPED: no group can be made in {}: {error}", point.display());
            continue;
        }
        let mut launch = stage.launch(&kind);
        launch.jail.cgroups = vec![group.join("cgroup.procs")];
        let vm = stage.driver.start(launch, stage.bench.boot()).await.unwrap();
        let inside = fs::read_to_string(group.join("cgroup.procs")).unwrap();
        assert!(inside.lines().any(|line| line == vm.record().pid.to_string()), "{kind}: {inside:?}");
        vm.kill().await.unwrap();
        let began = Instant::now();
        while fs::remove_dir(&group).is_err() {
            assert!(began.elapsed() < Duration::from_secs(5), "{kind}: the group stays busy");
            std::thread::sleep(Duration::from_millis(10));
        }
        tried += 1;
    }
    if tried == 0 {
        println!("SKIPPED: no control groups on this machine");
    }
}

/// A save that did not come about leaves the guest as it is, and the next one does not trust what it left.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_save_that_failed_the_next_one_is_full() {
    let Some(stage) = Stage::new().await else { return };
    if stage.is_real {
        println!("SKIPPED: the real program does not fail when it is told to");
        return;
    }
    let vm = stage.boot_alone("failing").await;
    comes_up(&vm).await;
    save(&vm, &stage.bench, "first").await;
    vm.continue_vcpus().await.unwrap();
    runs(&vm).await;
    let hook = root(vm.as_ref()).join("simulate");
    fs::write(&hook, "lose-at=/snapshot/create:No space left on device (os error 28)\n").unwrap();
    let at = |name: &str| stage.bench.dir.path().join(name);
    let target = SaveTarget { memory: at("failed.memory"), device: at("failed.device") };
    let refused = vm.save(&target).await.unwrap_err();
    assert!(refused.is_full(), "a full disk is told from other failures: {refused}");
    assert!(!target.memory.exists() && !target.device.exists());
    fs::remove_file(&hook).unwrap();
    vm.continue_vcpus().await.unwrap();
    runs(&vm).await;
    let full = save(&vm, &stage.bench, "full").await;
    vm.continue_vcpus().await.unwrap();
    runs(&vm).await;
    // And the one after that builds upon it.
    let after = save(&vm, &stage.bench, "after").await;
    vm.kill().await.unwrap();
    for (name, saved) in [("full", &full), ("after", &after)] {
        let vm = load(&stage.driver, &stage.bench, &format!("{name}-again"), saved).await;
        vm.continue_vcpus().await.unwrap();
        runs(&vm).await;
        vm.kill().await.unwrap();
    }
}

/// A save that failed, and one after it that did not even begin in the VMM: what is uncertain stays so.
#[tokio::test(flavor = "multi_thread")]
async fn two_saves_that_failed_are_not_forgotten() {
    let Some(stage) = Stage::new().await else { return };
    if stage.is_real {
        println!("SKIPPED: the real program does not fail when it is told to");
        return;
    }
    let vm = stage.boot_alone("twice").await;
    comes_up(&vm).await;
    save(&vm, &stage.bench, "twice-first").await;
    let hook = root(vm.as_ref()).join("simulate");
    for number in 0..2 {
        vm.continue_vcpus().await.unwrap();
        runs(&vm).await;
        fs::write(&hook, "lose-at=/snapshot/create:Input/output error (os error 5)\n").unwrap();
        let at = |name: &str| stage.bench.dir.path().join(format!("{name}-{number}"));
        let target = SaveTarget { memory: at("twice-memory"), device: at("twice-device") };
        assert!(vm.save(&target).await.is_err());
        fs::remove_file(&hook).unwrap();
    }
    vm.continue_vcpus().await.unwrap();
    runs(&vm).await;
    let saved = save(&vm, &stage.bench, "twice-last").await;
    vm.kill().await.unwrap();
    load(&stage.driver, &stage.bench, "twice-again", &saved).await.kill().await.unwrap();
}

/// The agent dies while a save is under way: whoever takes the microVM over saves it whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_save_that_was_given_up_is_not_built_upon() {
    let Some(stage) = Stage::new().await else { return };
    let vm = stage.boot_alone("given-up-save").await;
    runs(&vm).await;
    for milliseconds in [0, 1, 2, 5, 10, 20, 50] {
        let at = |name: &str| stage.bench.dir.path().join(format!("{name}-{milliseconds}"));
        let target = SaveTarget { memory: at("lost-memory"), device: at("lost-device") };
        let _ = tokio::time::timeout(Duration::from_millis(milliseconds), vm.save(&target)).await;
        // What was under way in the VMM comes to its end.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let adopted = stage.driver.adopt(vm.record()).await.unwrap();
        adopted.continue_vcpus().await.unwrap();
        runs(&adopted).await;
        let saved = save(&adopted, &stage.bench, &format!("kept-{milliseconds}")).await;
        adopted.continue_vcpus().await.unwrap();
        load(&stage.driver, &stage.bench, &format!("kept-{milliseconds}"), &saved).await.kill().await.unwrap();
    }
    vm.kill().await.unwrap();
}

/// What the VMM is told of a machine, as it tells it back.
#[tokio::test(flavor = "multi_thread")]
async fn the_machine_is_as_it_was_ordered() {
    let options = Options {
        huge_pages: HugePages::Transparent,
        disk_bytes_per_second: Some(100 << 20),
        network_bytes_per_second: Some(50 << 20),
        keeps_freed_memory: true,
    };
    let Some(stage) = Stage::with(options, Vec::new()).await else { return };
    let vm = stage.boot("ordered").await;
    let config = get(vm.as_ref(), "/vm/config");
    let machine = &config["machine-config"];
    assert_eq!((&machine["vcpu_count"], &machine["mem_size_mib"]), (&json!(1), &json!(256)), "{config}");
    assert_eq!((&machine["smt"], &machine["track_dirty_pages"]), (&json!(false), &json!(true)));
    assert_eq!(machine["huge_pages"], "Transparent");
    let drive = &config["drives"][0];
    assert_eq!((&drive["cache_type"], &drive["is_read_only"]), (&json!("Writeback"), &json!(false)), "{config}");
    assert_eq!(drive["rate_limiter"]["bandwidth"]["size"], 100 << 20);
    let card = &config["network-interfaces"][0];
    assert_eq!((&card["guest_mac"], &card["host_dev_name"]), (&json!(microvm::GUEST_MAC), &json!("tap0")));
    assert_eq!(card["rx_rate_limiter"]["bandwidth"]["size"], 50 << 20);
    assert_eq!(config["balloon"]["deflate_on_oom"], true);
    assert_eq!(config["balloon"]["free_page_reporting"], false);
    assert_eq!(config["mmds-config"]["version"], "V2");
    assert!(config["vsock"].is_null(), "{config}");
    let line = config["boot-source"]["boot_args"].as_str().unwrap();
    assert!(line.contains("root=/dev/vda") && line.ends_with("ignore_loglevel"), "{line}");
    // The metadata are not in a saved state; the card is, and takes another tap.
    vm.set_metadata(&json!({"instanceID": "sb1"})).await.unwrap();
    assert_eq!(get(vm.as_ref(), "/mmds")["instanceID"], "sb1");
    let counters = vm.counters().await.unwrap().unwrap();
    assert!(counters.is_object(), "{counters}");
    let saved = save(&vm, &stage.bench, "ordered").await;
    vm.kill().await.unwrap();
    let renamed = format!("ip -n {} tuntap add dev tap9 mode tap", stage.netns);
    assert!(Command::new("sh").args(["-ec", &renamed]).status().unwrap().success());
    let mut launch = stage.bench.launch_of("renamed", &saved.memory);
    launch.tap = Some(Tap { namespace: PathBuf::from("/run/netns").join(&stage.netns), name: "tap9".to_owned() });
    let vm = stage.driver.start(launch, Start::Load { device: saved.device.clone(), made_by: None }).await.unwrap();
    assert_eq!(get(vm.as_ref(), "/vm/config")["network-interfaces"][0]["host_dev_name"], "tap9");
    vm.continue_vcpus().await.unwrap();
    runs(&vm).await;
    assert!(vm.counters().await.unwrap().is_some(), "counters and console are asked for anew at each load");
    vm.kill().await.unwrap();
}

/// A guest that shouts fills nothing: its console is cut at the front, and the VMM's own log has a fixed size.
#[tokio::test(flavor = "multi_thread")]
async fn the_console_is_bounded_and_survives_a_takeover() {
    let Some(stage) = Stage::new().await.filter(Stage::boots) else { return };
    let vm = stage.boot("shouting").await;
    comes_up(&vm).await;
    let record = vm.record().clone();
    drop(vm);
    let vm = stage.driver.adopt(&record).await.unwrap();
    let began = Instant::now();
    while vm.console_tail(usize::MAX).await.unwrap().is_empty() {
        assert!(began.elapsed() < Duration::from_secs(20), "whoever takes it over hears nothing");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(vm.console_tail(16).await.unwrap().len() <= 16);
    for number in [1, 2] {
        let log = fs::read_link(format!("/proc/{}/fd/{number}", record.pid)).unwrap();
        assert!(log.to_string_lossy().contains("memfd:vmm-log"), "{log:?}");
    }
    vm.kill().await.unwrap();
}

/// In its root the VMM may put what it likes. A link there is not followed, and nobody else is taken for it.
#[tokio::test(flavor = "multi_thread")]
async fn links_in_the_jail_lead_nowhere() {
    let Some(stage) = Stage::new().await else { return };
    let vm = stage.boot("links").await;
    runs(&vm).await;
    let root = root(vm.as_ref());
    let outside = stage.bench.dir.path().join("outside");
    fs::write(&outside, "untouched").unwrap();
    // Where the driver makes a file of its own, and where the VMM leaves one.
    std::os::unix::fs::symlink(&outside, root.join("begin")).unwrap();
    std::os::unix::fs::symlink(&outside, root.join("device-out")).unwrap();
    let saved = save(&vm, &stage.bench, "links").await;
    assert_eq!(fs::read(&outside).unwrap(), b"untouched");
    assert_eq!(fs::metadata(&outside).unwrap().uid(), 0);
    assert!(fs::read(&saved.device).unwrap() != b"untouched");
    // Another listener in the place of the control socket.
    let elsewhere = stage.bench.dir.path().join("elsewhere.sock");
    let listener = std::os::unix::net::UnixListener::bind(&elsewhere).unwrap();
    fs::rename(root.join("api.sock"), root.join("aside.sock")).unwrap();
    std::os::unix::fs::symlink(&elsewhere, root.join("api.sock")).unwrap();
    assert!(matches!(vm.continue_vcpus().await, Err(Error::Control { .. })));
    fs::remove_file(root.join("api.sock")).unwrap();
    fs::hard_link(&elsewhere, root.join("api.sock")).unwrap();
    assert!(matches!(vm.continue_vcpus().await, Err(Error::Control { .. })));
    listener.set_nonblocking(true).unwrap();
    drop(listener);
    fs::rename(root.join("aside.sock"), root.join("api.sock")).unwrap();
    vm.continue_vcpus().await.unwrap();
    vm.kill().await.unwrap();
}

/// States of an older release are loaded by that, and those of none that is here are refused before anything is started.
#[tokio::test(flavor = "multi_thread")]
async fn releases_lie_side_by_side() {
    let Some(stage) = Stage::new().await else { return };
    if stage.is_real {
        println!("SKIPPED: only one real release is named");
        return;
    }
    let programs = vmm_simulator::programs();
    let at = |name: &str| stage.bench.dir.path().join(name);
    fs::copy(&programs.firecracker, at("firecracker-v1.16.3")).unwrap();
    fs::copy(&programs.jailer, at("jailer-v1.16.3")).unwrap();
    let older = Release::find(&at("firecracker-v1.16.3"), &at("jailer-v1.16.3")).await.unwrap();
    assert_eq!(older.version.to_string(), "1.16.3");
    let mixed = Release::find(&at("firecracker-v1.16.3"), &programs.jailer).await.unwrap_err();
    assert!(mixed.to_string().contains("belong together"), "{mixed}");
    fs::copy(&programs.firecracker, at("vmm-v1.16.3")).unwrap();
    let misnamed = Release::find(&at("vmm-v1.16.3"), &at("jailer-v1.16.3")).await.unwrap_err();
    assert!(misnamed.to_string().contains("named firecracker"), "{misnamed}");

    let before = Firecracker::new(older.clone(), Vec::new(), Options::default());
    let vm = before.start(stage.bench.launch("older"), stage.bench.boot()).await.unwrap();
    let stamp = before.stamp_of(vm.record());
    assert_eq!(stamp.version, "1.16.3");
    let saved = save(&vm, &stage.bench, "older").await;
    vm.kill().await.unwrap();

    assert!(stage.driver.loads(&stamp).unwrap_err().contains("1.16.3"));
    let Some(both) = Stage::with(Options::default(), vec![older]).await else { return };
    both.driver.loads(&stamp).unwrap();
    let other_cpu = Stamp { cpu: "GenuineIntel 6-1-1".to_owned(), ..stamp.clone() };
    assert!(both.driver.loads(&other_cpu).unwrap_err().contains("processor"));
    let start = Start::Load { device: saved.device, made_by: Some(stamp) };
    let vm = both.driver.start(stage.bench.launch_of("older-again", &saved.memory), start).await.unwrap();
    assert_eq!(vm.record().vmm_version, "1.16.3");
    // Of itself it is still of that release when it is saved again.
    assert_eq!(both.driver.stamp_of(vm.record()).version, "1.16.3");
    vm.continue_vcpus().await.unwrap();
    vm.kill().await.unwrap();
}

/// Whether a guest boots is found out by booting one, in the jail.
#[tokio::test(flavor = "multi_thread")]
async fn a_probe_boots_a_guest_and_leaves_nothing() {
    let Some(stage) = Stage::new().await.filter(Stage::boots) else { return };
    let place = |name: &str| {
        let dir = stage.bench.dir.path().join(name);
        fs::create_dir(&dir).unwrap();
        dir
    };
    let jail = || microvm::Jail { uid: stage.bench.uid, gid: stage.bench.uid, cgroups: Vec::new() };
    stage.driver.probe(&stage.bench.kernel, place("probe"), jail()).await.unwrap();
    let nowhere = KernelImage { vmlinux: "/nowhere/vmlinux".into(), initramfs: None };
    let why = stage.driver.probe(&nowhere, place("probe-nowhere"), jail()).await.unwrap_err();
    assert!(why.contains("kernel"), "{why}");
    assert_eq!(processes_of(stage.bench.uid), 0);
}

/// `GET` by hand, on a connection of its own.
fn get(vm: &dyn Microvm, path: &str) -> serde_json::Value {
    use std::io::{Read as _, Write as _};
    let socket = fs::canonicalize(root(vm).join("api.sock")).unwrap();
    let dir = fs::File::open(socket.parent().unwrap()).unwrap();
    use std::os::fd::AsRawFd as _;
    let address = format!("/proc/self/fd/{}/api.sock", dir.as_raw_fd());
    let mut stream = std::os::unix::net::UnixStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n").unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut answer = Vec::new();
    let mut piece = [0; 65536];
    loop {
        let count = stream.read(&mut piece).unwrap();
        answer.extend(&piece[..count]);
        let text = String::from_utf8_lossy(&answer);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head
            .lines()
            .find_map(|line| line.to_lowercase().strip_prefix("content-length:")?.trim().parse::<usize>().ok());
        if count == 0 || length.is_some_and(|length| body.len() >= length) {
            return serde_json::from_str(body).unwrap();
        }
    }
}
