//! What only the simulator does: it finds wrong memory, and goes wrong when a test asks for it.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::host::{client, until};
use crate::vmm::{Vmm, load, simulated};

fn paused() -> Option<Vmm> {
    if !simulated() {
        return None;
    }
    let vmm = Vmm::new();
    vmm.put_machine(true);
    vmm.put_kernel()?;
    vmm.action("InstanceStart").accepted();
    vmm.pause();
    Some(vmm)
}

#[test]
fn a_diff_on_a_wrong_base_is_found_out() {
    let Some(mut vmm) = paused() else { return };
    vmm.snapshot("Full", "state", "memory").accepted();
    vmm.diff_of_something("state", "changes");
    vmm.kill();
    // The changes alone are not the memory, and the base without them is not either.
    for memory in ["changes", "memory"] {
        let mut loading = vmm.beside();
        let body = load(json!({ "mem_backend": { "backend_type": "File", "backend_path": memory } }));
        loading.put("/snapshot/load", body).refused("simulated guest: its memory is not what it was");
        assert_eq!(loading.exit_code(), Some(1));
    }
}

#[test]
fn one_wrong_byte_is_found_out() {
    let Some(mut vmm) = paused() else { return };
    vmm.snapshot("Full", "state", "memory").accepted();
    vmm.kill();
    fs::File::options().write(true).open(vmm.path("memory")).unwrap().write_all_at(&[1], 100 << 20).unwrap();
    vmm.beside().put("/snapshot/load", load(json!({}))).refused("its memory is not what it was");
}

#[test]
fn the_guest_says_that_it_runs() {
    let Some(vmm) = paused() else { return };
    assert!(vmm.console().contains("Run /init as init process"));
    vmm.resume();
    until("a tick", || vmm.console().contains("simulated guest: tick ").then_some(()));
}

#[test]
fn a_copy_under_another_name_is_another_release() {
    let Some(mut vmm) = paused() else { return };
    vmm.snapshot("Full", "state", "memory").accepted();
    vmm.kill();
    let old = vmm.path("firecracker-v1.16.1");
    fs::copy(crate::vmm::program(), &old).unwrap();
    let says = |argument: &str| String::from_utf8(Command::new(&old).arg(argument).output().unwrap().stdout).unwrap();
    assert_eq!(says("--version"), "Firecracker v1.16.1\n");
    assert_ne!(says("--snapshot-version"), "v11.0.0\n");
}

#[test]
fn it_ends_where_a_test_wants_it() {
    let Some(mut vmm) = paused() else { return };
    fs::write(vmm.path("simulate"), "exit-at=/snapshot/create\n").unwrap();
    let body = r#"{"snapshot_path":"state","mem_file_path":"memory"}"#;
    assert!(client::call(&vmm.socket(), "PUT", "/snapshot/create", body).is_err(), "no answer");
    assert_eq!(vmm.exit_code(), Some(1));
}

#[test]
fn it_refuses_what_a_test_wants_it_to() {
    let Some(vmm) = paused() else { return };
    fs::write(vmm.path("simulate"), "fail-at=/snapshot/create:no space left on device (os error 28)\n").unwrap();
    vmm.snapshot("Full", "state", "memory").refused("no space left on device (os error 28)");
    assert!(!vmm.path("state").exists());
    fs::remove_file(vmm.path("simulate")).unwrap();
    vmm.snapshot("Full", "state", "memory").accepted();
}

#[test]
fn it_is_slow_where_a_test_wants_it() {
    let Some(vmm) = paused() else { return };
    fs::write(vmm.path("simulate"), "slow-at=/vm:300\n").unwrap();
    let since = Instant::now();
    vmm.resume();
    assert!(since.elapsed() >= Duration::from_millis(300));
}

#[test]
fn it_is_silent_where_a_test_wants_it_and_lives() {
    let Some(mut vmm) = paused() else { return };
    fs::write(vmm.path("simulate"), "silent-at=/vm\n").unwrap();
    let mut stream = client::connect(&vmm.socket()).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    client::send(&mut stream, "PATCH", "/vm", r#"{"state":"Resumed"}"#).unwrap();
    assert!(client::receive(&mut stream).is_err());
    assert!(vmm.is_alive());
}
