//! Wrong input and exhausted resources on the whole platform: a clear error each, nothing lost, nothing leaked.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use whole_machine::platform::{Options, Platform};

#[tokio::test(flavor = "multi_thread")]
async fn wrong_creates_are_refused_and_cost_nothing() {
    let platform = Platform::start();
    let before = platform.objects();
    for (body, status, code) in [
        (json!({"template": "no-such-template"}), 404, "not_found"),
        (json!({"template": "../../etc"}), 400, "invalid_request"),
        (json!({"vcpus": 0}), 400, "invalid_request"),
        (json!({"vcpus": -1}), 400, "invalid_request"),
        (json!({"vcpus": 1.5}), 400, "invalid_request"),
        (json!({"vcpus": "2"}), 400, "invalid_request"),
        (json!({"memory_mb": 10 * 1024 * 1024}), 400, "invalid_request"),
        (json!({"memory_mb": 1024 * 1024}), 503, "no_hosts_available"),
        (json!({"memory_mb": 513}), 400, "invalid_request"),
        (json!({"disk_size_mb": 1}), 400, "invalid_request"),
        (json!({"timeout_sec": -1}), 400, "invalid_request"),
        (json!({"on_timeout": "snooze"}), 400, "invalid_request"),
        (json!({"envs": {"A=B": "x"}}), 400, "invalid_request"),
        (json!({"metadata": {"a": "x".repeat(10_000)}}), 400, "invalid_request"),
        (json!([]), 400, "invalid_request"),
    ] {
        let (got, answer) = platform.call(Method::POST, "/v1/sandboxes", Some(body.clone())).await;
        assert_eq!((got.as_u16(), answer["error"]["code"].as_str()), (status, Some(code)), "{body}: {answer}");
        assert!(answer["error"]["request_id"].as_str().is_some_and(|id| id.starts_with("req_")), "{answer}");
    }
    let (_, list) = platform.call(Method::GET, "/v1/sandboxes", None).await;
    assert!(list.as_array().unwrap().is_empty(), "{list}");
    platform.expect_objects(&before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_host_is_said_and_heals() {
    let platform = Platform::start();
    let id = platform.create().await;
    let agent = platform.pid_of("wrenn-agent").unwrap();
    // Stopped, not dead: it accepts connections and never answers. The worst kind of dead.
    // SAFETY: the pid was just found to be the agent of this very platform.
    unsafe { libc::kill(agent, libc::SIGSTOP) };
    let began = std::time::Instant::now();
    let (status, answer) = platform
        .call(Method::POST, &format!("/v1/sandboxes/{id}/exec"), Some(json!({"cmd": "true", "timeout_sec": 5})))
        .await;
    let waited = began.elapsed();
    // SAFETY: as above.
    unsafe { libc::kill(agent, libc::SIGCONT) };
    assert!(matches!(status.as_u16(), 503 | 504), "{status}: {answer}");
    assert!(waited < Duration::from_secs(45), "{waited:?}");
    assert!(platform.get(&id).await["status"] == "running", "silence is not news about a sandbox");
    assert_eq!(platform.shell(&id, "echo back").await, (0, "back\n".to_owned()));
    platform.kill(&id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_creates_and_spares_what_runs() {
    let platform = Platform::start_with(&Options { pool_mib: Some(3072), ..Options::default() });
    let before = platform.objects();
    let id = platform.create().await;
    // Fill the pool from outside, as a neighbour's data would.
    let filler = platform.dir.join("pool/filler");
    let fill = std::process::Command::new("fallocate").args(["-l", "64G"]).arg(&filler).output().unwrap();
    assert!(!fill.status.success(), "the pool is smaller than that");
    let free = free_mib(&platform.dir.join("pool"));
    let file = std::fs::File::create(&filler).unwrap();
    nix::fcntl::fallocate(
        &file,
        nix::fcntl::FallocateFlags::empty(),
        0,
        i64::try_from(free.saturating_sub(64)).unwrap() << 20,
    )
    .unwrap();
    let (status, answer) =
        platform.call(Method::POST, "/v1/sandboxes?wait_sec=30", Some(json!({"memory_mb": 256}))).await;
    let code = answer["error"]["code"].as_str().unwrap_or_default().to_owned();
    assert!(
        matches!((status.as_u16(), code.as_str()), (507, "insufficient_storage") | (503, "no_hosts_available")),
        "{status}: {answer}"
    );
    assert_eq!(platform.shell(&id, "echo well").await, (0, "well\n".to_owned()));
    drop(file);
    std::fs::remove_file(&filler).unwrap();
    // The host tells of its room by its next heartbeat, within 36 s.
    let after = whole_machine::wait::until("room again", Duration::from_secs(90), || async {
        let body = json!({"memory_mb": 256});
        let (status, sandbox) = platform.call(Method::POST, "/v1/sandboxes?wait_sec=60", Some(body)).await;
        (status == 201).then(|| sandbox["id"].as_str().expect("an id").to_owned())
    })
    .await;
    platform.kill(&after).await;
    platform.kill(&id).await;
    platform.expect_objects(&before).await;
}

fn free_mib(path: &std::path::Path) -> u64 {
    let stat = nix::sys::statvfs::statvfs(path).unwrap();
    stat.blocks_available() as u64 * stat.fragment_size() as u64 / (1 << 20)
}
