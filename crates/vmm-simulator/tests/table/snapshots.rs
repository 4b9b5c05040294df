//! Saving: when it is possible, and what the two files are then.

use std::fs;

use serde_json::json;

use crate::vmm::{GUEST_BYTES, Vmm};

fn running(track_dirty_pages: bool) -> Option<Vmm> {
    let vmm = Vmm::new();
    vmm.put_machine(track_dirty_pages);
    vmm.put_kernel()?;
    vmm.action("InstanceStart").accepted();
    Some(vmm)
}

fn paused(track_dirty_pages: bool) -> Option<Vmm> {
    let vmm = running(track_dirty_pages)?;
    vmm.pause();
    Some(vmm)
}

#[test]
fn a_running_guest_is_not_saved() {
    let Some(vmm) = running(true) else { return };
    vmm.snapshot("Full", "state", "memory")
        .refused("Cannot save the microVM state: Operation not allowed: save/restore unavailable while running");
    assert_eq!(vmm.state(), "Running");
}

#[test]
fn a_full_snapshot_has_the_memory_s_size() {
    let Some(vmm) = paused(true) else { return };
    vmm.snapshot("Full", "state", "memory").accepted();
    assert_eq!(fs::metadata(vmm.path("memory")).unwrap().len(), GUEST_BYTES);
    assert!(fs::metadata(vmm.path("state")).unwrap().len() > 100);
    assert_eq!(vmm.state(), "Paused");
}

#[test]
fn full_is_what_is_meant_when_nothing_is_said() {
    let Some(vmm) = paused(true) else { return };
    vmm.put("/snapshot/create", json!({ "snapshot_path": "state", "mem_file_path": "memory" })).accepted();
    assert!(vmm.allocated("memory") > 0);
}

#[test]
fn a_diff_after_a_full_snapshot_is_empty() {
    let Some(vmm) = paused(true) else { return };
    vmm.snapshot("Full", "state", "memory").accepted();
    vmm.snapshot("Diff", "state2", "memory2").accepted();
    assert_eq!(fs::metadata(vmm.path("memory2")).unwrap().len(), GUEST_BYTES);
    assert_eq!(vmm.allocated("memory2"), 0);
}

#[test]
fn a_diff_after_running_has_some_pages() {
    let Some(vmm) = paused(true) else { return };
    vmm.snapshot("Full", "state", "memory").accepted();
    vmm.diff_of_something("state2", "memory2");
    assert!(vmm.allocated("memory2") < GUEST_BYTES / 2);
}

#[test]
fn without_tracking_a_diff_has_what_was_ever_touched() {
    let Some(vmm) = paused(false) else { return };
    vmm.snapshot("Full", "state", "memory").accepted();
    vmm.snapshot("Diff", "state2", "memory2").accepted();
    let allocated = vmm.allocated("memory2");
    assert!(0 < allocated && allocated < GUEST_BYTES, "{allocated}");
}

#[test]
fn a_diff_is_merged_into_a_file_of_the_memory_s_size() {
    let Some(vmm) = paused(true) else { return };
    vmm.snapshot("Full", "state", "memory").accepted();
    fs::write(vmm.path("memory2"), vec![0xaa; 4096]).unwrap();
    fs::File::options().write(true).open(vmm.path("memory2")).unwrap().set_len(GUEST_BYTES).unwrap();
    vmm.snapshot("Diff", "state2", "memory2").accepted();
    assert_eq!(fs::read(vmm.path("memory2")).unwrap()[..4096], [0xaa; 4096], "nothing was dirty, nothing written");
}

#[test]
fn a_diff_empties_a_file_of_another_size() {
    let Some(vmm) = paused(true) else { return };
    vmm.snapshot("Full", "state", "memory").accepted();
    fs::write(vmm.path("memory2"), vec![0xaa; 8192]).unwrap();
    vmm.snapshot("Diff", "state2", "memory2").accepted();
    assert_eq!(fs::metadata(vmm.path("memory2")).unwrap().len(), GUEST_BYTES);
    assert_eq!(vmm.allocated("memory2"), 0);
}

#[test]
fn an_existing_state_file_is_replaced() {
    let Some(vmm) = paused(true) else { return };
    vmm.file("state", 10 << 20);
    vmm.snapshot("Full", "state", "memory").accepted();
    assert!(fs::metadata(vmm.path("state")).unwrap().len() < 1 << 20);
}

#[test]
fn a_state_file_that_cannot_be_opened_is_a_refusal_and_no_end() {
    let Some(vmm) = paused(true) else { return };
    vmm.snapshot("Full", "nowhere/state", "memory").refused("No such file or directory (os error 2)");
    vmm.snapshot("Full", "state", "memory").accepted();
}

#[test]
fn a_memory_file_that_cannot_be_opened_is_a_refusal_and_loses_nothing() {
    let Some(vmm) = paused(true) else { return };
    vmm.snapshot("Diff", "state", "nowhere/memory").refused("No such file or directory (os error 2)");
    vmm.snapshot("Diff", "state", "memory").accepted();
    assert!(vmm.allocated("memory") > 0, "what was dirty still is");
}

#[test]
fn a_full_disk_is_named() {
    let Some(vmm) = paused(true) else { return };
    // A device that is always full; as a memory file it already fails at its length.
    vmm.snapshot("Full", "/dev/full", "memory").refused("os error 28");
}

#[test]
fn after_a_snapshot_the_guest_goes_on() {
    let Some(vmm) = paused(true) else { return };
    vmm.snapshot("Full", "state", "memory").accepted();
    vmm.resume();
    assert_eq!(vmm.state(), "Running");
    vmm.diff_of_something("state2", "memory2");
}

#[test]
fn an_unknown_kind_of_snapshot_is_refused() {
    let Some(vmm) = paused(true) else { return };
    vmm.snapshot("Half", "state", "memory").refused("unknown variant `Half`");
}
