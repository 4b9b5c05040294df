//! What every driver promises, said once.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use microvm::{Driver, Error, Microvm, ProcessRecord, SaveTarget, Start};

use crate::bench::Bench;

/// Start, adoption by another handle, the end noticed within a second, kill twice, and nothing to adopt afterwards.
pub async fn lives_and_ends(driver: &dyn Driver, bench: &Bench) {
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

    let other = ProcessRecord { pid: std::process::id() as i32, ..record };
    assert!(matches!(driver.adopt(&other).await, Err(Error::Gone)), "a reused number is not adopted");
}

/// Files that are not there: an error, and no process of that user left.
pub async fn fails_cleanly(driver: &dyn Driver, bench: &Bench) {
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

pub fn processes_of(uid: u32) -> usize {
    let line = format!("Uid:\t{uid}\t");
    let statuses = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("status")).ok());
    statuses.filter(|status| status.contains(&line) && !status.contains("State:\tZ")).count()
}

/// A start that its caller gave up, at any moment, leaves no process; a call that was given up does not confuse the next one. A save into a
/// place that is taken is refused and takes nothing away; one that fails half way leaves nothing.
pub async fn what_is_given_up_leaves_nothing(driver: &dyn Driver, bench: &Bench) {
    for milliseconds in [0, 1, 3, 10, 20, 40] {
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
        let _ = tokio::time::timeout(Duration::from_micros(microseconds), vm.stop_vcpus()).await;
        vm.stop_vcpus().await.unwrap();
        let _ = tokio::time::timeout(Duration::from_micros(microseconds), vm.console_tail(64 * 1024)).await;
        vm.continue_vcpus().await.unwrap();
    }
    let taken = bench.dir.path().join("taken");
    fs::write(&taken, "mine").unwrap();
    let target = SaveTarget { memory: bench.dir.path().join("fresh"), device: taken.clone() };
    assert!(vm.save(&target).await.is_err());
    assert_eq!(fs::read(&taken).unwrap(), b"mine");
    assert!(!target.memory.exists());
    let target = SaveTarget { memory: bench.dir.path().join("no/such/place"), device: bench.dir.path().join("half") };
    assert!(vm.save(&target).await.is_err());
    assert!(!target.device.exists());
    vm.continue_vcpus().await.unwrap();
    // After all that it can still be saved, and what is saved is loaded.
    let saved = save(&vm, bench, "after-failures").await;
    vm.kill().await.unwrap();
    let vm = load(driver, bench, "after-failures", &saved).await;
    vm.continue_vcpus().await.unwrap();
    vm.kill().await.unwrap();
}

/// Boots, saves in place and goes on, saves again, loads as a private clone, saves that as the next generation: the guest goes on each time
/// where it stood, and two that are loaded from one state do not meet.
pub async fn generations_follow_each_other(driver: &dyn Driver, bench: &Bench) {
    let mut vm = driver.start(bench.launch("gen0"), bench.boot()).await.unwrap();
    comes_up(&vm).await;
    for number in 1..4 {
        let in_place = save(&vm, bench, &format!("in-place{number}")).await;
        // Still the same guest after a save: continued instead of killed.
        vm.continue_vcpus().await.unwrap();
        runs(&vm).await;
        let saved = save(&vm, bench, &format!("gen{number}")).await;
        vm.kill().await.unwrap();
        let other = load(driver, bench, &format!("other{number}"), &in_place).await;
        vm = load(driver, bench, &format!("loaded{number}"), &saved).await;
        for vm in [&other, &vm] {
            vm.continue_vcpus().await.unwrap();
            runs(vm).await;
        }
        other.kill().await.unwrap();
    }
    vm.kill().await.unwrap();
}

/// A device state that is none, or a part of one: refused by words, nothing left, and the files as they were.
pub async fn broken_states_are_refused(driver: &dyn Driver, bench: &Bench) {
    let vm = driver.start(bench.launch("broken"), bench.boot()).await.unwrap();
    comes_up(&vm).await;
    let saved = save(&vm, bench, "broken").await;
    vm.kill().await.unwrap();
    let whole = fs::read(&saved.device).unwrap();
    for (name, content) in [("empty", &[][..]), ("half", &whole[..whole.len() / 2]), ("junk", b"this is no state")] {
        let device = bench.dir.path().join(format!("{name}.device"));
        fs::write(&device, content).unwrap();
        let launch = bench.launch_of(&format!("broken-{name}"), &saved.memory);
        let begun = fs::read(&launch.memory).unwrap();
        let memory = launch.memory.clone();
        let refused = driver.start(launch, Start::Load { device: device.clone(), made_by: None }).await;
        let error = refused.err().unwrap_or_else(|| panic!("{name} was loaded"));
        println!("{name}: {error}");
        assert!(!error.to_string().is_empty());
        assert!(fs::read(&memory).unwrap() == begun, "{name} changed the memory");
        assert_eq!(fs::read(&device).unwrap(), content);
    }
    assert_eq!(processes_of(bench.uid), 0);
}

/// The directory of a microVM that runs gets another name, as a standby's does when it becomes a sandbox's: taken over by the new one, it is
/// spoken with, saved, and shows its console.
pub async fn a_moved_one_is_taken_over(driver: &dyn Driver, bench: &Bench) {
    let vm = driver.start(bench.launch("before"), bench.boot()).await.unwrap();
    comes_up(&vm).await;
    let record = ProcessRecord { dir: bench.dir.path().join("after"), ..vm.record().clone() };
    // It finds the process by its number, so it may be taken over first.
    let moved = driver.adopt(&record).await.unwrap();
    fs::rename(bench.dir.path().join("before"), &record.dir).unwrap();
    drop(vm);
    moved.stop_vcpus().await.unwrap();
    moved.continue_vcpus().await.unwrap();
    runs(&moved).await;
    let saved = save(&moved, bench, "moved").await;
    moved.continue_vcpus().await.unwrap();
    moved.kill().await.unwrap();
    load(driver, bench, "moved-on", &saved).await.kill().await.unwrap();
}

pub async fn save(vm: &Arc<dyn Microvm>, bench: &Bench, name: &str) -> SaveTarget {
    let dir = bench.dir.path();
    let target = SaveTarget {
        memory: dir.join(format!("{name}.saved-memory")),
        device: dir.join(format!("{name}.saved-device")),
    };
    let saved = vm.save(&target).await.unwrap();
    println!("{name}: {} KiB copied, stopped {:?}", saved.copied_bytes / 1024, saved.stopped);
    assert!(fs::metadata(&target.device).unwrap().len() > 100);
    assert_eq!(fs::metadata(&target.memory).unwrap().len(), 256 << 20);
    target
}

pub async fn load(driver: &dyn Driver, bench: &Bench, name: &str, saved: &SaveTarget) -> Arc<dyn Microvm> {
    let launch = bench.launch_of(&format!("{name}-run"), &saved.memory);
    let start = Start::Load { device: saved.device.clone(), made_by: Some(driver.stamp()) };
    driver.start(launch, start).await.unwrap()
}

/// Its processor time grows.
pub async fn runs(vm: &Arc<dyn Microvm>) {
    let before = vm.stats().await.unwrap().cpu;
    let began = Instant::now();
    while vm.stats().await.unwrap().cpu < before + Duration::from_millis(20) {
        assert!(began.elapsed() < Duration::from_secs(20), "the guest does not run");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub async fn comes_up(vm: &Arc<dyn Microvm>) {
    wait_for_console(vm, "Run /init as init process").await;
}

pub async fn wait_for_console(vm: &Arc<dyn Microvm>, text: &str) {
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
