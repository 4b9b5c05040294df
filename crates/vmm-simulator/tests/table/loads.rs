//! Loading: what is accepted, what ends the process, what was changed on the way.

use std::fs;

use serde_json::json;

use crate::host::client;
use crate::vmm::{GUEST_BYTES, Vmm, load};

/// A directory with `state` and `memory` of a guest with a disk and a vsock. Its process is gone, its vsock's path too.
fn saved() -> Option<Vmm> {
    let mut vmm = Vmm::new();
    vmm.put_machine(true);
    vmm.put_kernel()?;
    let disk = vmm.file("disk", 1 << 20);
    vmm.put("/drives/d", json!({ "drive_id": "d", "is_root_device": false, "path_on_host": disk })).accepted();
    vmm.put("/vsock", json!({ "guest_cid": 3, "uds_path": "v.sock" })).accepted();
    vmm.action("InstanceStart").accepted();
    vmm.pause();
    vmm.snapshot("Full", "state", "memory").accepted();
    vmm.kill();
    fs::remove_file(vmm.path("v.sock")).unwrap();
    Some(vmm)
}

#[track_caller]
fn refused_and_ended(mut vmm: Vmm, body: serde_json::Value, words: &str) {
    vmm.put("/snapshot/load", body).refused(words);
    assert_eq!(vmm.exit_code(), Some(1));
}

#[test]
fn a_loaded_guest_stands_still_until_it_is_resumed() {
    let Some(saved) = saved() else { return };
    let vmm = saved.beside();
    vmm.put("/snapshot/load", load(json!({}))).accepted();
    assert_eq!(vmm.state(), "Paused");
    vmm.resume();
    assert_eq!(vmm.state(), "Running");
}

#[test]
fn a_load_may_resume() {
    let Some(saved) = saved() else { return };
    let vmm = saved.beside();
    vmm.put("/snapshot/load", load(json!({ "resume_vm": true, "track_dirty_pages": true }))).accepted();
    assert_eq!(vmm.state(), "Running");
    vmm.diff_of_something("state2", "memory2");
}

#[test]
fn a_loaded_guest_has_the_configuration_of_the_saved_one() {
    let Some(saved) = saved() else { return };
    let vmm = saved.beside();
    vmm.put("/snapshot/load", load(json!({}))).accepted();
    let config = vmm.get("/vm/config");
    assert_eq!(config["machine-config"]["mem_size_mib"], 128);
    assert_eq!(config["drives"][0]["drive_id"], "d");
    assert_eq!(config["vsock"]["guest_cid"], 3);
    client::connect(&vmm.path("v.sock")).unwrap();
}

#[test]
fn the_memory_file_is_only_read() {
    let Some(saved) = saved() else { return };
    let before = fs::read(saved.path("memory")).unwrap();
    let vmm = saved.beside();
    vmm.put("/snapshot/load", load(json!({ "resume_vm": true, "track_dirty_pages": true }))).accepted();
    vmm.diff_of_something("state2", "memory2");
    assert!(fs::read(saved.path("memory")).unwrap() == before, "the guest wrote into its base");
}

#[test]
fn two_guests_of_one_memory_file() {
    let Some(saved) = saved() else { return };
    let first = saved.beside();
    first.put("/snapshot/load", load(json!({ "resume_vm": true }))).accepted();
    let second = saved.beside();
    let other = json!({ "resume_vm": true, "vsock_override": { "uds_path": "v2.sock" } });
    second.put("/snapshot/load", load(other)).accepted();
    assert_eq!(second.state(), "Running");
}

#[test]
fn a_diff_merged_onto_its_base_is_loaded_again() {
    let Some(saved) = saved() else { return };
    let mut vmm = saved.beside();
    vmm.put("/snapshot/load", load(json!({ "resume_vm": true, "track_dirty_pages": true }))).accepted();
    vmm.diff_of_something("state2", "memory2");
    // Once more, now onto a copy of the base: everything since the load must be in it.
    fs::copy(vmm.path("memory"), vmm.path("merged")).unwrap();
    merge(&fs::read(vmm.path("memory2")).unwrap(), &vmm.path("merged"), &dirty_extents(&vmm.path("memory2")));
    vmm.snapshot("Diff", "state2", "merged").accepted();
    vmm.kill();
    fs::remove_file(saved.path("v.sock")).unwrap();

    let again = saved.beside();
    let body = json!({
        "snapshot_path": "state2", "mem_backend": { "backend_type": "File", "backend_path": "merged" }, "resume_vm": true,
    });
    again.put("/snapshot/load", body).accepted();
    assert_eq!(again.state(), "Running");
}

#[test]
fn a_diff_of_a_fresh_boot_is_complete() {
    let mut vmm = Vmm::new();
    vmm.put_machine(true);
    if vmm.put_kernel().is_none() {
        return;
    }
    vmm.action("InstanceStart").accepted();
    vmm.pause();
    vmm.snapshot("Diff", "state", "memory").accepted();
    vmm.kill();
    vmm.beside().put("/snapshot/load", load(json!({ "resume_vm": true }))).accepted();
}

#[test]
fn the_vsock_s_path_can_be_another() {
    let Some(saved) = saved() else { return };
    let vmm = saved.beside();
    vmm.put("/snapshot/load", load(json!({ "vsock_override": { "uds_path": "other.sock" }, "clock_realtime": true })))
        .accepted();
    assert!(vmm.path("other.sock").exists() && !vmm.path("v.sock").exists());
}

#[test]
fn a_vsock_path_in_use_ends_it() {
    let Some(saved) = saved() else { return };
    saved.file("v.sock", 0);
    refused_and_ended(saved.beside(), load(json!({})), "Error binding to the host-side Unix socket");
}

#[test]
fn an_override_of_an_unknown_interface_ends_it() {
    let Some(saved) = saved() else { return };
    let unknown = json!({ "network_overrides": [{ "iface_id": "eth9", "host_dev_name": "tap0" }] });
    refused_and_ended(saved.beside(), load(unknown), "Unknown Network Device.");
}

#[test]
fn transparent_huge_pages_are_accepted_of_a_file() {
    let Some(saved) = saved() else { return };
    saved.beside().put("/snapshot/load", load(json!({ "huge_pages": "Transparent" }))).accepted();
}

#[test]
fn reserved_huge_pages_are_not_possible_of_a_file() {
    let Some(saved) = saved() else { return };
    refused_and_ended(
        saved.beside(),
        load(json!({ "huge_pages": "2M" })),
        "Cannot restore hugetlbfs backed snapshot by mapping the memory file. Please use uffd.",
    );
}

#[test]
fn a_handler_of_faults_that_is_absent_ends_it() {
    let Some(saved) = saved() else { return };
    let backend = json!({ "mem_backend": { "backend_type": "Uffd", "backend_path": "nowhere.sock" } });
    refused_and_ended(saved.beside(), load(backend), "Failed to connect to UDS Unix stream");
}

#[test]
fn a_truncated_state_file_ends_it() {
    let Some(saved) = saved() else { return };
    let length = fs::metadata(saved.path("state")).unwrap().len();
    fs::File::options().write(true).open(saved.path("state")).unwrap().set_len(length / 2).unwrap();
    refused_and_ended(saved.beside(), load(json!({})), "An error occurred during bitcode serialization");
}

#[test]
fn a_state_file_that_is_missing_ends_it() {
    let Some(saved) = saved() else { return };
    fs::remove_file(saved.path("state")).unwrap();
    refused_and_ended(saved.beside(), load(json!({})), "No such file or directory (os error 2)");
}

#[test]
fn a_memory_file_that_is_missing_ends_it() {
    let Some(saved) = saved() else { return };
    fs::remove_file(saved.path("memory")).unwrap();
    refused_and_ended(saved.beside(), load(json!({})), "No such file or directory (os error 2)");
}

#[test]
fn a_memory_file_that_is_too_short_ends_it() {
    let Some(saved) = saved() else { return };
    fs::File::options().write(true).open(saved.path("memory")).unwrap().set_len(GUEST_BYTES / 2).unwrap();
    refused_and_ended(saved.beside(), load(json!({})), "Load snapshot error");
}

#[test]
fn a_drive_that_is_missing_ends_it() {
    let Some(saved) = saved() else { return };
    fs::remove_file(saved.path("disk")).unwrap();
    refused_and_ended(saved.beside(), load(json!({})), "No such file or directory (os error 2)");
}

#[test]
fn nothing_is_loaded_after_a_boot_was_configured() {
    let Some(saved) = saved() else { return };
    let vmm = saved.beside();
    vmm.put_machine(true);
    vmm.put("/snapshot/load", load(json!({})))
        .refused("Loading a microVM snapshot not allowed after configuring boot-specific resources.");
}

#[test]
fn an_unknown_field_of_a_load_is_refused_and_it_lives_on() {
    let Some(saved) = saved() else { return };
    let mut vmm = saved.beside();
    vmm.put("/snapshot/load", load(json!({ "drive_hopes": [] })))
        .refused("unknown field `drive_hopes`, expected one of");
    assert!(vmm.is_alive());
    vmm.put("/snapshot/load", load(json!({}))).accepted();
}

#[test]
fn two_memories_of_a_load_are_refused_and_it_lives_on() {
    let Some(saved) = saved() else { return };
    let mut vmm = saved.beside();
    vmm.put("/snapshot/load", load(json!({ "mem_file_path": "memory" }))).refused("too many fields");
    vmm.put("/snapshot/load", json!({ "snapshot_path": "state" })).refused("missing field");
    assert!(vmm.is_alive());
    vmm.put("/snapshot/load", load(json!({}))).accepted();
}

#[test]
fn the_old_fields_of_a_load_are_accepted() {
    let Some(saved) = saved() else { return };
    let body = json!({ "snapshot_path": "state", "mem_file_path": "memory", "enable_diff_snapshots": true });
    let vmm = saved.beside();
    vmm.put("/snapshot/load", body).accepted();
    vmm.diff_of_something("state2", "memory2");
}

#[test]
fn outputs_are_put_before_a_load_and_not_after_it() {
    let Some(saved) = saved() else { return };
    let vmm = saved.beside();
    vmm.put("/metrics", json!({ "metrics_path": "metrics" })).accepted();
    vmm.put("/serial", json!({ "serial_out_path": "serial" })).accepted();
    vmm.put("/snapshot/load", load(json!({ "resume_vm": true }))).accepted();
    for (path, body) in [
        ("/metrics", json!({ "metrics_path": "m2" })),
        ("/serial", json!({ "serial_out_path": "s2" })),
        ("/logger", json!({ "log_path": "log" })),
    ] {
        vmm.put(path, body).refused("not supported after starting the microVM");
    }
    assert!(vmm.path("serial").exists());
}

#[test]
fn mmds_data_is_put_again_after_a_load() {
    let Some(saved) = saved() else { return };
    let vmm = saved.beside();
    vmm.put("/snapshot/load", load(json!({}))).accepted();
    vmm.put("/mmds", json!({ "a": "b" })).accepted();
}

#[test]
fn a_loaded_guest_gets_its_own_disk_before_it_runs() {
    let Some(saved) = saved() else { return };
    let vmm = saved.beside();
    vmm.put("/snapshot/load", load(json!({}))).accepted();
    vmm.file("own", 1 << 20);
    vmm.patch("/drives/d", json!({ "drive_id": "d", "path_on_host": "own" })).accepted();
    vmm.resume();
    assert_eq!(vmm.get("/vm/config")["drives"][0]["path_on_host"], "own");
}

#[test]
fn a_state_file_is_described() {
    let Some(saved) = saved() else { return };
    let output = std::process::Command::new(crate::vmm::program())
        .arg("--describe-snapshot")
        .arg(saved.path("state"))
        .output()
        .unwrap();
    assert!(output.status.success());
    assert!(output.stdout.starts_with(b"v"), "{output:?}");
}

/// Pages that a sparse file of changes holds.
fn dirty_extents(path: &std::path::Path) -> Vec<(u64, u64)> {
    use std::os::fd::AsRawFd as _;
    let file = fs::File::open(path).unwrap();
    let seek = |at: u64, whence| {
        // SAFETY: a plain call on an open descriptor.
        u64::try_from(unsafe { libc::lseek(file.as_raw_fd(), i64::try_from(at).unwrap(), whence) }).ok()
    };
    let mut extents = Vec::new();
    let mut at = 0;
    while let Some(data) = seek(at, libc::SEEK_DATA) {
        at = seek(data, libc::SEEK_HOLE).unwrap();
        extents.push((data, at));
    }
    extents
}

fn merge(changes: &[u8], onto: &std::path::Path, extents: &[(u64, u64)]) {
    use std::os::unix::fs::FileExt as _;
    let file = fs::File::options().write(true).open(onto).unwrap();
    for (from, to) in extents {
        let part = &changes[usize::try_from(*from).unwrap()..usize::try_from(*to).unwrap()];
        file.write_all_at(part, *from).unwrap();
    }
}
