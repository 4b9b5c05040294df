//! Which VMM a host uses, and what it says when it is another one than was wished. Firecracker is the simulated one: what is decided is ours.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser as _;
use host_agent::config::{Args, Config};
use host_agent::vmm::{Settled, VmmError, Vmms};
use microvm::Stamp;

/// A user for each stage, so that what one leaves is not another's.
static NEXT_UID: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0x3fff_f000);

struct Stage {
    dir: tempfile::TempDir,
    uid: u32,
}

impl Stage {
    /// A host with a guest kernel that a simulated Firecracker boots, and no QEMU with KVM.
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: the jailer needs root");
            return None;
        }
        if !Path::new("/dev/kvm").exists() {
            println!("SKIPPED: without /dev/kvm Firecracker is not even tried");
            return None;
        }
        let dir = tempfile::Builder::new().prefix("wrenn-vmm-test-").tempdir_in("/var/tmp").unwrap();
        fs::create_dir(dir.path().join("kernels")).unwrap();
        let uid = NEXT_UID.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let stage = Self { dir, uid };
        stage.kernel(b"\x7fELF\x02\x01\x01");
        Some(stage)
    }

    fn kernel(&self, content: &[u8]) {
        fs::write(self.dir.path().join("kernels/vmlinux-1.0.0"), content).unwrap();
    }

    /// A copy of the simulated release under that name, with its jailer beside it.
    fn install(&self, release: &str) -> PathBuf {
        let programs = vmm_simulator::programs();
        let place = self.dir.path().join("installed");
        fs::create_dir_all(&place).unwrap();
        let firecracker = place.join(format!("firecracker-{release}"));
        fs::copy(programs.firecracker, &firecracker).unwrap();
        fs::copy(programs.jailer, place.join(format!("jailer-{release}"))).unwrap();
        firecracker
    }

    async fn settle(&self, arguments: &[&str]) -> Result<Settled, VmmError> {
        let dir = self.dir.path().to_str().unwrap();
        let all = ["wrenn-agent", "--dir", dir].into_iter().chain(arguments.iter().copied());
        let config = Config::try_from(Args::try_parse_from(all).unwrap()).unwrap();
        Vmms::find(&config, self.dir.path().to_owned(), self.uid).await?.settle().await
    }

    /// That live: one that has ended stays in the table until its parent asks.
    fn processes(&self) -> usize {
        let line = format!("Uid:\t{}\t", self.uid);
        let statuses = fs::read_dir("/proc").unwrap().flatten();
        let statuses = statuses.filter_map(|entry| fs::read_to_string(entry.path().join("status")).ok());
        statuses.filter(|status| status.contains(&line) && !status.contains("State:\tZ")).count()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_firecracker_that_boots_a_guest_is_taken_and_the_proof_is_kept() {
    let Some(stage) = Stage::new() else { return };
    let firecracker = stage.install("v1.17.0");
    let arguments = ["--firecracker-bin", firecracker.to_str().unwrap()];
    let settled = stage.settle(&arguments).await.unwrap();
    assert_eq!(settled.driver.stamp().level(), "firecracker/kvm");
    assert_eq!((settled.driver.name(), settled.driver.version()), ("firecracker", "1.17.0"));
    assert!(settled.notes.is_empty(), "{:?}", settled.notes);
    // What QEMU had saved before is still loaded.
    let qemu = Stamp { driver: "qemu".to_owned(), ..settled.driver.stamp() };
    assert!(
        !settled.driver.loads(&qemu).unwrap_err().contains("firecracker"),
        "QEMU was not asked about its own state"
    );
    assert_eq!(stage.processes(), 0);
    assert!(!stage.dir.path().join("firecracker-probe").exists());
    // A kernel that boots nowhere, of the same name: nobody looks again.
    stage.kernel(b"junk");
    assert_eq!(stage.settle(&arguments).await.unwrap().driver.stamp().level(), "firecracker/kvm");
    // Another release is looked at anew.
    let other = stage.install("v1.17.1");
    let settled = stage.settle(&["--firecracker-bin", other.to_str().unwrap()]).await.unwrap();
    assert_eq!(settled.driver.name(), "qemu");
    assert!(settled.notes[0].starts_with("Firecracker is not used: "), "{:?}", settled.notes);
}

/// What a host's agent decides about the real release that the environment names, with the guest kernel of `make images`. `make check-kvm`
/// asks for it; elsewhere nobody has promised that a guest boots.
#[tokio::test(flavor = "multi_thread")]
async fn the_release_that_is_named_boots_a_guest_here() {
    if std::env::var_os("WRENN_VMM").is_none_or(|wished| wished != "firecracker") {
        println!("SKIPPED: WRENN_VMM does not ask for Firecracker");
        return;
    }
    let stage = Stage::new().expect("root and /dev/kvm");
    let artifacts = std::env::var_os("WRENN_TEST_ARTIFACTS").map(PathBuf::from).expect("WRENN_TEST_ARTIFACTS is set");
    fs::remove_dir_all(stage.dir.path().join("kernels")).unwrap();
    std::os::unix::fs::symlink(artifacts.join("kernels"), stage.dir.path().join("kernels")).unwrap();
    let settled = stage.settle(&[]).await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(settled.driver.stamp().level(), "firecracker/kvm");
    assert_eq!(stage.processes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_firecracker_that_was_wished_and_cannot_be_is_no_start() {
    let Some(stage) = Stage::new() else { return };
    let good = stage.install("v1.17.0");
    let holed = stage.install("v1.16.1");
    let refusal = async |arguments: &[&str]| stage.settle(arguments).await.err().unwrap().to_string();
    let holed = holed.to_str().unwrap();
    let said = refusal(&["--vmm", "firecracker", "--firecracker-bin", holed]).await;
    assert!(said.contains("WRENN_VMM") && said.contains("CVE-2026-122192") && said.contains("1.16.2"), "{said}");
    let said = refusal(&["--vmm", "firecracker", "--firecracker-bin", "/nowhere/firecracker"]).await;
    assert!(said.contains("/nowhere/firecracker is not there"), "{said}");
    let jailer = ["--jailer-bin", "/nowhere/jailer"];
    let said =
        refusal(&[&["--vmm", "firecracker", "--firecracker-bin", good.to_str().unwrap()], &jailer[..]].concat()).await;
    assert!(said.contains("/nowhere/jailer"), "{said}");
    // Put up with by its name.
    let allowed = ["--vmm", "firecracker", "--firecracker-bin", holed, "--vmm-allow-cve", "CVE-2026-122192"];
    assert_eq!(stage.settle(&allowed).await.unwrap().driver.version(), "1.16.1");
    // A guest that does not come up.
    stage.kernel(b"junk");
    fs::remove_file(stage.dir.path().join("agent-vmm.json")).unwrap();
    let said = refusal(&["--vmm", "firecracker", "--firecracker-bin", good.to_str().unwrap()]).await;
    assert!(said.contains("does not boot a guest here"), "{said}");
    assert_eq!(stage.processes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_it_is_not_there_or_not_wished_qemu_is_taken_without_a_word() {
    let Some(stage) = Stage::new() else { return };
    let good = stage.install("v1.17.0");
    let settled = stage.settle(&["--vmm", "qemu", "--firecracker-bin", good.to_str().unwrap()]).await.unwrap();
    assert_eq!((settled.driver.name(), settled.notes.len()), ("qemu", 0));
    if !Path::new("/usr/local/bin/firecracker").exists() {
        let settled = stage.settle(&[]).await.unwrap();
        assert_eq!((settled.driver.name(), settled.notes.len()), ("qemu", 0), "nobody has asked for Firecracker");
    }
    // Named and not there is said.
    let settled = stage.settle(&["--firecracker-bin", "/nowhere/firecracker"]).await.unwrap();
    assert!(settled.notes[0].contains("/nowhere/firecracker is not there"), "{:?}", settled.notes);
}

#[tokio::test(flavor = "multi_thread")]
async fn releases_of_before_load_what_they_have_saved() {
    let Some(stage) = Stage::new() else { return };
    let good = stage.install("v1.17.0");
    for (release, place) in [("v1.16.3", "before"), ("v1.16.0", "holed")] {
        let installed = stage.install(release);
        let place = stage.dir.path().join("vmms").join(place);
        fs::create_dir_all(&place).unwrap();
        // By links, as an operator would: what they lead to has the release in its name.
        std::os::unix::fs::symlink(&installed, place.join("firecracker")).unwrap();
        let jailer = installed.with_file_name(format!("jailer-{release}"));
        std::os::unix::fs::symlink(jailer, place.join("jailer")).unwrap();
    }
    let settled = stage.settle(&["--firecracker-bin", good.to_str().unwrap()]).await.unwrap();
    let of = |version: &str| Stamp { version: version.to_owned(), ..settled.driver.stamp() };
    for (version, loads) in [("1.17.0", true), ("1.16.3", true), ("1.16.0", false), ("1.15.0", false)] {
        assert_eq!(settled.driver.loads(&of(version)).is_ok(), loads, "{version}");
    }
}
