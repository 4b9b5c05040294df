//! QEMU, by software emulation, which every machine has.

use std::fs;
use std::path::Path;

use microvm::qemu::{Accelerator, Qemu};
use microvm::{Driver as _, Error, KernelImage, Start};

use crate::bench::Bench;
use crate::promises::{self, processes_of};

#[tokio::test(flavor = "multi_thread")]
async fn it_lives_and_ends_and_fails_cleanly() {
    let Some(bench) = Bench::real() else { return };
    let driver = Qemu::new(None, Accelerator::Tcg).await.unwrap();
    promises::lives_and_ends(&driver, &bench).await;
    promises::fails_cleanly(&driver, &bench).await;

    // A kernel that is none: QEMU says so, the error carries it, no process is left.
    let junk = bench.dir.path().join("junk");
    fs::write(&junk, "this is no kernel").unwrap();
    let start = Start::Boot { kernel: KernelImage { vmlinux: junk, initramfs: None }, arguments: String::new() };
    let error = driver.start(bench.launch("junk-kernel"), start).await.err().unwrap();
    assert!(matches!(&error, Error::Stillborn(said) if !said.is_empty()), "{error}");
    assert_eq!(processes_of(bench.uid), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_runs_jailed() {
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

#[tokio::test(flavor = "multi_thread")]
async fn what_is_given_up_leaves_nothing() {
    let Some(bench) = Bench::real() else { return };
    let driver = Qemu::new(None, Accelerator::Tcg).await.unwrap();
    promises::what_is_given_up_leaves_nothing(&driver, &bench).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn generations_follow_each_other() {
    let Some(bench) = Bench::real() else { return };
    let driver = Qemu::new(None, Accelerator::Tcg).await.unwrap();
    promises::generations_follow_each_other(&driver, &bench).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_may_be_a_device() {
    let Some(mut bench) = Bench::real() else { return };
    bench.use_devices();
    let driver = Qemu::new(None, Accelerator::Tcg).await.unwrap();
    promises::generations_follow_each_other(&driver, &bench).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_states_are_refused() {
    let Some(bench) = Bench::real() else { return };
    let driver = Qemu::new(None, Accelerator::Tcg).await.unwrap();
    promises::broken_states_are_refused(&driver, &bench).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moved_one_is_taken_over() {
    let Some(bench) = Bench::real() else { return };
    let driver = Qemu::new(None, Accelerator::Tcg).await.unwrap();
    promises::a_moved_one_is_taken_over(&driver, &bench).await;
}
