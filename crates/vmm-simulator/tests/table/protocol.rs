//! HTTP, strictness, and what the program says about itself.

use std::process::Command;

use serde_json::json;

use crate::host::client;
use crate::vmm::{Vmm, program};

fn output(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(program()).args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn version_is_one_line_of_the_standard_output() {
    let (code, text, _) = output(&["--version"]);
    assert_eq!(code, Some(0));
    assert!(text.starts_with("Firecracker v1."), "{text}");
}

#[test]
fn the_snapshot_version_has_three_numbers() {
    let (code, text, _) = output(&["--snapshot-version"]);
    assert_eq!(code, Some(0));
    assert!(text.starts_with('v') && text.lines().next().unwrap().split('.').count() == 3, "{text}");
}

#[test]
fn an_unknown_argument_ends_it_at_once() {
    let (code, out, err) = output(&["--no-such-thing"]);
    assert_ne!(code, Some(0));
    assert!(format!("{out}{err}").contains("no-such-thing"), "{out}{err}");
}

#[test]
fn a_socket_that_exists_is_refused() {
    let first = Vmm::new();
    let (code, ..) = output(&["--api-sock", first.socket().to_str().unwrap()]);
    assert_eq!(code, Some(1));
    assert_eq!(first.state(), "Not started");
}

#[test]
fn before_the_start_it_says_who_it_is() {
    let vmm = Vmm::new();
    let info = vmm.get("/");
    assert_eq!(info["id"], "row");
    assert_eq!(info["state"], "Not started");
    assert_eq!(info["app_name"], "Firecracker");
    let version = vmm.get("/version")["firecracker_version"].as_str().unwrap().to_owned();
    assert!(version.starts_with("1."), "no v: {version}");
    assert_eq!(info["vmm_version"], version);
}

#[test]
fn the_defaults_of_a_machine_are_given() {
    let vmm = Vmm::new();
    assert_eq!(vmm.get("/machine-config")["mem_size_mib"], 128);
    assert_eq!(vmm.get("/vm/config")["machine-config"]["vcpu_count"], 1);
}

#[test]
fn an_unknown_path_is_refused_by_name() {
    Vmm::new().put("/foo", json!({})).refused("Invalid request method and/or path: PUT");
}

#[test]
fn the_state_is_changed_and_not_read_at_vm() {
    Vmm::new().call("GET", "/vm", "").refused("Invalid request method and/or path: GET vm");
}

#[test]
fn an_unknown_field_is_refused_with_the_known_ones() {
    let body = json!({ "vcpu_count": 1, "mem_size_mib": 128, "turbo": true });
    let vmm = Vmm::new();
    vmm.put("/machine-config", body.clone()).refused("unknown field `turbo`, expected one of `vcpu_count`");
    vmm.put("/machine-config", body).refused("`huge_pages`");
}

#[test]
fn a_missing_field_is_refused_by_name() {
    Vmm::new().put("/machine-config", json!({ "vcpu_count": 1 })).refused("missing field `mem_size_mib`");
}

#[test]
fn what_is_not_json_is_refused() {
    Vmm::new().call("PUT", "/machine-config", "{").refused("deserializing the json body");
}

#[test]
fn a_put_without_a_body_is_refused() {
    Vmm::new().call("PUT", "/machine-config", "").refused("Empty PUT request.");
}

#[test]
fn a_body_above_the_limit_is_refused_and_the_next_is_not() {
    let vmm = Vmm::new();
    let body = json!({ "text": "x".repeat(51_200) }).to_string();
    // The real one closes while the body is still on its way, which may be seen instead of the answer.
    if let Ok(answer) = client::call(&vmm.socket(), "PUT", "/mmds", &body) {
        assert!(matches!(answer.status, 400 | 413), "{answer:?}");
        assert!(answer.body.to_string().contains("is larger than the limit of 51200"), "{answer:?}");
    }
    assert_eq!(vmm.state(), "Not started");
}

#[test]
fn the_limit_of_a_body_can_be_raised() {
    let vmm = Vmm::with(&["--http-api-max-payload-size", "204800"]);
    vmm.put("/mmds", json!({ "text": "x".repeat(100_000) })).accepted();
}

#[test]
fn a_connection_is_kept_for_the_next_call() {
    let vmm = Vmm::new();
    let mut stream = client::connect(&vmm.socket()).unwrap();
    for (method, path, body, status) in [
        ("GET", "/version", "", 200),
        ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":64}"#, 204),
        ("PUT", "/machine-config", r#"{"vcpu_count":0,"mem_size_mib":64}"#, 400),
        ("GET", "/machine-config", "", 200),
    ] {
        client::send(&mut stream, method, path, body).unwrap();
        assert_eq!(client::receive(&mut stream).unwrap().status, status, "{method} {path}");
    }
}

#[test]
fn the_id_of_the_path_is_that_of_the_body() {
    let vmm = Vmm::new();
    let drive = json!({ "drive_id": "other", "is_root_device": false, "path_on_host": vmm.file("disk", 4096) });
    vmm.put("/drives/one", drive).refused("does not match");
}
