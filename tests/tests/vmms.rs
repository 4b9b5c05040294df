//! What counts VMMs sees also those that are no QEMU: behind a jailer, in a root, a process table and a network of their own.

use std::time::Duration;

use microvm::{Driver as _, Launch};
use whole_machine::jailed::Jails;
use whole_machine::{objects, wait};

#[tokio::test(flavor = "multi_thread")]
async fn a_jailed_vmm_is_counted_and_found_by_its_files() {
    let Some(jails) = Jails::new().await.unwrap() else { return };
    let dir = jails.dir.path();
    let count = || objects::count(dir, &jails.tag).get("microvms").copied().unwrap_or(0);
    assert_eq!(count(), 0);
    let places = ["pool/standbys/standby-7-a", "pool/sandboxes/b"].map(|place| dir.join(place));
    let mut started = Vec::new();
    for (place, slot) in places.iter().zip([7, 0x7fff]) {
        // Without a card: there is one tap.
        let launch = Launch { tap: None, ..jails.launch(place, slot).unwrap() };
        started.push(jails.driver.start(launch, jails.boot()).await.unwrap());
    }
    let pids: Vec<i32> = started.iter().map(|vm| vm.record().pid).collect();
    // Nothing of what others see of it tells whose it is, but its user.
    let line = std::fs::read(format!("/proc/{}/cmdline", pids[0])).unwrap();
    assert!(!String::from_utf8_lossy(&line).contains(dir.to_str().unwrap()), "{:?}", String::from_utf8_lossy(&line));
    assert_eq!(count(), 2);
    let standbys = dir.join("pool/standbys");
    assert_eq!(objects::microvms_below(&standbys, &jails.tag), [pids[0]]);
    assert_eq!(objects::microvms_below(&dir.join("pool/sandboxes"), &jails.tag), [pids[1]]);
    // Of an agent whose users begin where these end it is none.
    let next = format!("{:04x}0000", u32::from_str_radix(&jails.tag[..4], 16).unwrap().wrapping_add(1) & 0xffff);
    assert!(objects::microvms(&next).is_empty());
    // What was claimed lies elsewhere, and is the same process.
    std::fs::rename(&places[0], dir.join("pool/sandboxes/claimed")).unwrap();
    assert!(objects::microvms_below(&standbys, &jails.tag).is_empty());
    assert_eq!(count(), 2);
    for vm in &started {
        vm.kill().await.unwrap();
    }
    wait::until("none is counted", Duration::from_secs(10), || async { (count() == 0).then_some(()) }).await;
}

/// One that has ended is none, also while nobody has asked how.
#[tokio::test]
async fn what_has_ended_is_not_counted() {
    use std::os::unix::process::CommandExt as _;
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: only root runs programs as others");
        return;
    }
    let tag = format!("{:04x}0000", !std::process::id() & 0xffff);
    let user = 0x4000_0000 + (u32::from_str_radix(&tag[..4], 16).unwrap() << 15) + 5;
    let mut child = std::process::Command::new("sleep").arg("300").uid(user).spawn().unwrap();
    assert_eq!(objects::microvms(&tag), [child.id() as i32]);
    child.kill().unwrap();
    wait::until("it has ended", Duration::from_secs(5), || async { objects::microvms(&tag).is_empty().then_some(()) })
        .await;
    child.wait().unwrap();
}
