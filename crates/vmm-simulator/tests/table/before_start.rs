//! Configuration: what is opened when it is put, and what is refused then.

use std::fs;

use nix::sys::stat::Mode;
use serde_json::json;

use crate::vmm::Vmm;

#[test]
fn a_machine_is_put_read_and_patched() {
    let vmm = Vmm::new();
    for track in [true, false] {
        vmm.put_machine(track);
        assert_eq!(vmm.get("/machine-config")["track_dirty_pages"], track);
    }
    vmm.patch("/machine-config", json!({ "vcpu_count": 3 })).accepted();
    assert_eq!(vmm.get("/machine-config")["vcpu_count"], 3, "without smt an odd number is taken");
}

#[test]
fn vcpus_have_a_least_and_a_most() {
    let vmm = Vmm::new();
    for count in [0, 33] {
        vmm.put("/machine-config", json!({ "vcpu_count": count, "mem_size_mib": 128 })).refused("vCPU number");
    }
    vmm.put("/machine-config", json!({ "vcpu_count": 3, "mem_size_mib": 128, "smt": true })).refused("vCPU number");
}

#[test]
fn memory_is_a_multiple_of_the_huge_page() {
    let vmm = Vmm::new();
    let machine = |mib, pages| json!({ "vcpu_count": 1, "mem_size_mib": mib, "huge_pages": pages });
    vmm.put("/machine-config", machine(128, "Transparent")).accepted();
    let refusal = "memory size (MiB) is either 0, or not a multiple of the configured page size";
    vmm.put("/machine-config", machine(127, "Transparent")).refused(refusal);
    vmm.put("/machine-config", machine(0, "None")).refused(refusal);
    vmm.put("/machine-config", machine(127, "None")).accepted();
}

#[test]
fn a_kernel_that_is_missing_is_refused_at_once() {
    Vmm::new()
        .put("/boot-source", json!({ "kernel_image_path": "nowhere" }))
        .refused("The kernel file cannot be opened");
}

#[test]
fn an_initrd_that_is_missing_is_refused_at_once() {
    let vmm = Vmm::new();
    let kernel = vmm.file("any", 4096);
    vmm.put("/boot-source", json!({ "kernel_image_path": kernel, "initrd_path": "nowhere" })).refused("initrd");
}

#[test]
fn a_drive_has_engines_limits_and_caches() {
    let vmm = Vmm::new();
    let limiter = json!({ "bandwidth": { "size": 1000, "refill_time": 100 }, "ops": { "size": 10, "one_time_burst": 5, "refill_time": 100 } });
    let disk = vmm.file("disk", 1 << 20);
    vmm.put(
        "/drives/plain",
        json!({ "drive_id": "plain", "is_root_device": true, "path_on_host": disk, "io_engine": "Sync" }),
    )
    .accepted();
    vmm.put("/drives/rich", json!({
        "drive_id": "rich", "is_root_device": false, "path_on_host": disk, "cache_type": "Writeback", "rate_limiter": limiter,
        "is_read_only": true,
    }))
    .accepted();
    assert_eq!(vmm.get("/vm/config")["drives"].as_array().unwrap().len(), 2);
}

#[test]
fn a_drive_that_is_missing_is_refused_at_once() {
    let drive = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": "nowhere" });
    let vmm = Vmm::new();
    vmm.put("/drives/d", drive.clone()).refused("Unable to create the virtio block device");
    vmm.put("/drives/d", drive).refused("No such file or directory (os error 2)");
}

#[test]
fn a_second_root_drive_is_refused() {
    let vmm = Vmm::new();
    let disk = vmm.file("disk", 4096);
    let root = |id: &str| json!({ "drive_id": id, "is_root_device": true, "path_on_host": disk });
    vmm.put("/drives/a", root("a")).accepted();
    vmm.put("/drives/a", root("a")).accepted();
    vmm.put("/drives/b", root("b")).refused("root");
}

#[test]
fn a_vsock_listens_from_its_put_on() {
    let vmm = Vmm::new();
    let vsock = json!({ "guest_cid": 3, "uds_path": "v.sock" });
    vmm.put("/vsock", vsock.clone()).accepted();
    crate::host::client::connect(&vmm.path("v.sock")).unwrap();
    assert_eq!(vmm.get("/vm/config")["vsock"]["guest_cid"], 3);
}

#[test]
fn a_vsock_path_in_use_is_refused() {
    let vmm = Vmm::new();
    vmm.file("v.sock", 0);
    vmm.put("/vsock", json!({ "guest_cid": 3, "uds_path": "v.sock" })).refused("(os error 98)");
}

#[test]
fn the_smaller_devices_are_taken() {
    let vmm = Vmm::new();
    vmm.put("/entropy", json!({ "rate_limiter": { "bandwidth": { "size": 1000, "refill_time": 100 } } })).accepted();
    vmm.put(
        "/balloon",
        json!({
            "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1, "free_page_hinting": true,
            "free_page_reporting": true,
        }),
    )
    .accepted();
    assert_eq!(vmm.get("/balloon")["stats_polling_interval_s"], 1);
    let pmem = vmm.file("pmem", 2 << 20);
    vmm.put("/pmem/p", json!({ "id": "p", "path_on_host": pmem, "read_only": true })).accepted();
    vmm.put("/hotplug/memory", json!({ "total_size_mib": 1024, "slot_size_mib": 128, "block_size_mib": 2 })).accepted();
    vmm.put("/cpu-config", json!({ "cpuid_modifiers": [] })).accepted();
}

#[test]
fn mmds_is_put_merged_and_read() {
    let vmm = Vmm::new();
    vmm.put("/mmds", json!({ "a": { "b": "1", "c": "2" } })).accepted();
    vmm.patch("/mmds", json!({ "a": { "b": null, "d": "3" } })).accepted();
    assert_eq!(vmm.get("/mmds"), json!({ "a": { "c": "2", "d": "3" } }));
}

#[test]
fn the_outputs_are_files_that_it_makes() {
    let vmm = Vmm::new();
    vmm.put("/logger", json!({ "log_path": "log", "level": "Info", "show_level": true, "show_log_origin": false, "module": "api_server" }))
        .accepted();
    vmm.put("/metrics", json!({ "metrics_path": "metrics" })).accepted();
    vmm.put(
        "/serial",
        json!({ "serial_out_path": "serial", "rate_limiter": { "size": 100_000, "refill_time": 1000 } }),
    )
    .accepted();
    assert!(vmm.path("log").exists() && vmm.path("metrics").exists());
}

#[test]
fn a_fifo_without_a_reader_is_refused() {
    let vmm = Vmm::new();
    nix::unistd::mkfifo(&vmm.path("fifo"), Mode::from_bits_truncate(0o600)).unwrap();
    vmm.put("/logger", json!({ "log_path": "fifo" })).refused("(os error 6)");
    vmm.put("/metrics", json!({ "metrics_path": "fifo" })).refused("(os error 6)");
}

#[test]
fn a_serial_fifo_without_a_reader_is_refused_when_it_is_put_or_at_the_start() {
    let vmm = Vmm::new();
    nix::unistd::mkfifo(&vmm.path("fifo"), Mode::from_bits_truncate(0o600)).unwrap();
    let put = vmm.put("/serial", json!({ "serial_out_path": "fifo" }));
    if put.status == 400 {
        return put.refused("(os error 6)");
    }
    vmm.put_machine(true);
    if vmm.put_kernel().is_some() {
        vmm.action("InstanceStart").refused("(os error 6)");
    }
}

#[test]
fn a_fifo_with_a_reader_is_taken() {
    let vmm = Vmm::new();
    nix::unistd::mkfifo(&vmm.path("fifo"), Mode::from_bits_truncate(0o600)).unwrap();
    // Both ends, so that the open of the reader waits for nobody.
    let _reader = fs::File::options().read(true).write(true).open(vmm.path("fifo")).unwrap();
    vmm.put("/metrics", json!({ "metrics_path": "fifo" })).accepted();
}

#[test]
fn what_needs_a_guest_is_refused_before_the_start() {
    let vmm = Vmm::new();
    let refusal = "not supported before starting the microVM";
    vmm.patch("/vm", json!({ "state": "Paused" })).refused(refusal);
    vmm.snapshot("Full", "state", "memory").refused(refusal);
    vmm.action("FlushMetrics").refused(refusal);
    vmm.action("SendCtrlAltDel").refused(refusal);
    vmm.patch("/drives/d", json!({ "drive_id": "d", "path_on_host": "x" })).refused(refusal);
    vmm.patch("/balloon", json!({ "amount_mib": 1 })).refused(refusal);
    vmm.call("GET", "/balloon/statistics", "").refused(refusal);
}

#[test]
fn a_start_without_a_kernel_is_refused() {
    Vmm::new().action("InstanceStart").refused("kernel");
}

#[test]
fn a_kernel_that_is_none_is_refused_at_the_start() {
    let vmm = Vmm::new();
    let none = vmm.file("none", 100_000);
    vmm.put("/boot-source", json!({ "kernel_image_path": none })).accepted();
    vmm.action("InstanceStart").refused("Start microvm error");
}

#[test]
fn a_static_cpu_template_is_taken_and_refused_at_the_start() {
    let vmm = Vmm::new();
    vmm.put("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 128, "cpu_template": "T2A" })).accepted();
    if vmm.put_kernel().is_some() {
        vmm.action("InstanceStart").refused("The current CPU model is not permitted to apply the CPU template");
    }
}
