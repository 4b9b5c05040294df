//! A started guest: what it still takes, and what not any more.

use std::fs;

use serde_json::{Value, json};

use crate::host::until;
use crate::vmm::{Vmm, simulated};

fn started(arguments: &[&str]) -> Option<Vmm> {
    let vmm = Vmm::with(arguments);
    let disk = vmm.file("disk", 1 << 20);
    vmm.put_machine(true);
    vmm.put_kernel()?;
    vmm.put("/drives/d", json!({ "drive_id": "d", "is_root_device": false, "path_on_host": disk })).accepted();
    vmm.put("/metrics", json!({ "metrics_path": "metrics" })).accepted();
    vmm.put("/balloon", json!({ "amount_mib": 0, "deflate_on_oom": true, "free_page_hinting": true })).accepted();
    let pmem = vmm.file("pmem", 2 << 20);
    vmm.put("/pmem/p", json!({ "id": "p", "path_on_host": pmem })).accepted();
    vmm.put("/hotplug/memory", json!({ "total_size_mib": 256 })).accepted();
    vmm.action("InstanceStart").accepted();
    Some(vmm)
}

#[test]
fn it_runs_after_the_start() {
    let Some(vmm) = started(&[]) else { return };
    assert_eq!(vmm.state(), "Running");
    for path in ["/version", "/machine-config", "/vm/config"] {
        vmm.get(path);
    }
}

#[test]
fn pause_and_resume_may_be_said_twice() {
    let Some(vmm) = started(&[]) else { return };
    for (say, state) in [("Paused", "Paused"), ("Resumed", "Running")] {
        for _ in 0..2 {
            vmm.patch("/vm", json!({ "state": say })).accepted();
            assert_eq!(vmm.state(), state);
        }
    }
}

#[test]
fn it_is_started_once() {
    let Some(vmm) = started(&[]) else { return };
    vmm.action("InstanceStart").refused("not supported after starting the microVM");
}

#[test]
fn configuration_ends_with_the_start() {
    let Some(vmm) = started(&[]) else { return };
    let drive = json!({ "drive_id": "e", "is_root_device": false, "path_on_host": "disk" });
    for (path, body) in [
        ("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 128 })),
        ("/boot-source", json!({ "kernel_image_path": "kernel" })),
        ("/drives/e", drive),
        ("/vsock", json!({ "guest_cid": 3, "uds_path": "v.sock" })),
        ("/entropy", json!({})),
        ("/logger", json!({ "log_path": "log" })),
        ("/metrics", json!({ "metrics_path": "m2" })),
        ("/serial", json!({ "serial_out_path": "serial" })),
        ("/snapshot/load", crate::vmm::load(json!({}))),
    ] {
        vmm.put(path, body).refused("not supported after starting the microVM");
    }
}

#[test]
fn over_pci_a_drive_is_plugged_in_and_out() {
    let Some(vmm) = started(&["--enable-pci"]) else { return };
    vmm.put("/drives/e", json!({ "drive_id": "e", "is_root_device": false, "path_on_host": "disk" })).accepted();
    if simulated() {
        // A real one waits for its guest to let go first.
        vmm.call("DELETE", "/drives/e", "").accepted();
    }
}

#[test]
fn rate_limits_are_changed_while_it_runs() {
    let Some(vmm) = started(&[]) else { return };
    let limiter = json!({ "bandwidth": { "size": 1000, "refill_time": 100 } });
    vmm.patch("/drives/d", json!({ "drive_id": "d", "rate_limiter": limiter })).accepted();
    vmm.patch("/pmem/p", json!({ "id": "p", "rate_limiter": limiter })).accepted();
}

#[test]
fn another_file_becomes_the_disk() {
    let Some(vmm) = started(&[]) else { return };
    vmm.file("disk2", 1 << 20);
    vmm.patch("/drives/d", json!({ "drive_id": "d", "path_on_host": "disk2" })).accepted();
    assert_eq!(vmm.get("/vm/config")["drives"][0]["path_on_host"], "disk2");
    let open: Vec<_> = fs::read_dir(format!("/proc/{}/fd", vmm.pid()))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok()?.file_name().map(|name| name.to_owned()))
        .collect();
    assert!(open.iter().any(|name| name == "disk2") && !open.iter().any(|name| name == "disk"), "{open:?}");
}

#[test]
fn a_missing_file_does_not_become_the_disk() {
    let Some(vmm) = started(&[]) else { return };
    let change = json!({ "drive_id": "d", "path_on_host": "nowhere" });
    vmm.patch("/drives/d", change).refused("No such file or directory (os error 2)");
}

#[test]
fn an_unknown_drive_is_not_changed() {
    let Some(vmm) = started(&[]) else { return };
    let answer = vmm.patch("/drives/x", json!({ "drive_id": "x", "path_on_host": "disk" }));
    assert_eq!(answer.status, 400, "{answer:?}");
}

#[test]
fn a_balloon_whose_driver_is_not_up_is_not_ready() {
    let Some(vmm) = started(&[]) else { return };
    vmm.patch("/balloon", json!({ "amount_mib": 10 })).refused("not activated");
    vmm.patch("/balloon/hinting/start", json!({})).refused("not activ");
}

#[test]
fn memory_whose_driver_is_not_up_is_not_ready() {
    let Some(vmm) = started(&[]) else { return };
    assert_eq!(vmm.get("/hotplug/memory")["plugged_size_mib"], 0);
    vmm.patch("/hotplug/memory", json!({ "requested_size_mib": 128 })).refused("not active");
}

#[test]
fn metrics_are_flushed_as_a_line_of_json() {
    let Some(vmm) = started(&[]) else { return };
    let lines = || fs::read_to_string(vmm.path("metrics")).unwrap().lines().map(str::to_owned).collect::<Vec<_>>();
    let before = lines().len();
    vmm.action("FlushMetrics").accepted();
    let after = lines();
    assert_eq!(after.len(), before + 1);
    assert!(serde_json::from_str::<Value>(after.last().unwrap()).unwrap()["utc_timestamp_ms"].is_number());
}

#[test]
fn mmds_is_put_while_it_runs() {
    let Some(vmm) = started(&[]) else { return };
    vmm.put("/mmds", json!({ "late": "yes" })).accepted();
    assert_eq!(vmm.get("/mmds")["late"], "yes");
}

#[test]
fn ctrl_alt_del_is_taken() {
    let Some(mut vmm) = started(&[]) else { return };
    vmm.action("SendCtrlAltDel").accepted();
    if simulated() {
        // A real guest decides for itself.
        assert_eq!(vmm.exit_code(), Some(0));
    }
}

#[test]
fn the_console_is_the_standard_output_without_a_path() {
    let Some(vmm) = started(&[]) else { return };
    until("a line of the guest", || (!vmm.console().is_empty()).then_some(()));
}

#[test]
fn the_console_is_a_file_when_one_is_named() {
    let vmm = Vmm::new();
    vmm.put_machine(false);
    if vmm.put_kernel().is_none() {
        return;
    }
    vmm.put("/serial", json!({ "serial_out_path": "serial" })).accepted();
    vmm.action("InstanceStart").accepted();
    until("a line of the guest", || {
        fs::read_to_string(vmm.path("serial")).is_ok_and(|text| text.contains('\n')).then_some(())
    });
}
