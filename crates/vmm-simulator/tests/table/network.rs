//! Taps: opened when they are put, held by one process.

use std::fs;

use serde_json::{Value, json};

use crate::host::netns::NetworkNamespace;
use crate::vmm::{Vmm, load};

fn card(tap: &str) -> Value {
    json!({ "iface_id": "eth0", "host_dev_name": tap, "guest_mac": "02:fc:00:00:00:05" })
}

#[test]
fn a_tap_is_opened_when_it_is_put() {
    let Some(namespace) = NetworkNamespace::new(&["tap0"]) else { return };
    let vmm = Vmm::inside(&namespace);
    vmm.put("/network-interfaces/eth0", card("tap0")).accepted();
    let held = fs::read_dir(format!("/proc/{}/fd", vmm.pid()))
        .unwrap()
        .any(|entry| fs::read_link(entry.unwrap().path()).is_ok_and(|target| target.ends_with("net/tun")));
    assert!(held);
}

#[test]
fn a_tap_of_another_process_is_busy() {
    let Some(namespace) = NetworkNamespace::new(&["tap0"]) else { return };
    let mut holder = Vmm::inside(&namespace);
    holder.put("/network-interfaces/eth0", card("tap0")).accepted();
    let second = Vmm::inside(&namespace);
    second.put("/network-interfaces/eth0", card("tap0")).refused("Open tap device failed");
    second.put("/network-interfaces/eth0", card("tap0")).refused("esource busy (os error 16)");
    holder.kill();
    second.put("/network-interfaces/eth0", card("tap0")).accepted();
}

#[test]
fn a_card_is_put_twice_by_its_own_process() {
    let Some(namespace) = NetworkNamespace::new(&["tap0"]) else { return };
    let vmm = Vmm::inside(&namespace);
    vmm.put("/network-interfaces/eth0", card("tap0")).accepted();
    vmm.put("/network-interfaces/eth0", card("tap0")).accepted();
}

#[test]
fn mmds_listens_on_a_card_that_exists() {
    let Some(namespace) = NetworkNamespace::new(&["tap0"]) else { return };
    let vmm = Vmm::inside(&namespace);
    let config = |card: &str| json!({ "version": "V2", "network_interfaces": [card] });
    vmm.put("/mmds/config", config("eth0")).refused("network interface");
    vmm.put("/network-interfaces/eth0", card("tap0")).accepted();
    vmm.put("/mmds/config", config("eth0")).accepted();
}

#[test]
fn a_loaded_guest_gets_another_tap() {
    let Some(namespace) = NetworkNamespace::new(&["tap0", "tap1"]) else { return };
    let vmm = Vmm::inside(&namespace);
    vmm.put_machine(true);
    if vmm.put_kernel().is_none() {
        return;
    }
    vmm.put("/network-interfaces/eth0", card("tap0")).accepted();
    vmm.action("InstanceStart").accepted();
    let limiter = json!({ "bandwidth": { "size": 1000, "refill_time": 100 } });
    vmm.patch("/network-interfaces/eth0", json!({ "iface_id": "eth0", "rx_rate_limiter": limiter })).accepted();
    vmm.pause();
    vmm.snapshot("Full", "state", "memory").accepted();

    // The saved one still holds its tap.
    let mut same = vmm.beside_inside(&namespace);
    same.put("/snapshot/load", load(json!({}))).refused("esource busy (os error 16)");
    assert_eq!(same.exit_code(), Some(1));
    let other = vmm.beside_inside(&namespace);
    let overridden =
        json!({ "network_overrides": [{ "iface_id": "eth0", "host_dev_name": "tap1" }], "resume_vm": true });
    other.put("/snapshot/load", load(overridden)).accepted();
    assert_eq!(other.get("/vm/config")["network-interfaces"][0]["host_dev_name"], "tap1");
}
