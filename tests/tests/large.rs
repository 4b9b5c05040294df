//! The main paths of a sandbox that is not of the smallest kind: two vCPUs and 2 GiB, of which it uses a good part.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use whole_machine::platform::{Options, Platform};

/// Both processors are used all the while, and much of the memory must not change.
const FILL: &str = "head -c 300000000 /dev/urandom >/dev/shm/filled; sha256sum </dev/shm/filled >/root/sum; \
    for n in 1 2; do : >/dev/shm/count$n; (while :; do echo >>/dev/shm/count$n; sleep 0.02; done) >/dev/null 2>&1 & done";
const WHOLE: &str = r#"[ "$(sha256sum </dev/shm/filled)" = "$(cat /root/sum)" ] && echo whole; nproc"#;

async fn post(platform: &Platform, path: &str, body: Value) -> (StatusCode, Value) {
    platform.call(Method::POST, path, Some(body)).await
}

async fn is_whole(platform: &Platform, id: &str) {
    assert_eq!(platform.shell_soon(id, WHOLE).await, (0, "whole\n2\n".to_owned()), "{id}");
    for n in [1, 2] {
        let counted =
            format!("a=$(wc -c </dev/shm/count{n}); sleep 1; [ $(wc -c </dev/shm/count{n}) -gt $a ] && echo counts");
        assert_eq!(platform.shell(id, &counted).await.1, "counts\n", "{id} {n}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_vcpus_and_two_gib_go_through_everything() {
    let platform = Platform::start_with(&Options { pool_mib: Some(20_480), ..Options::default() });
    let before = platform.objects();
    let shape = json!({"template": "minimal", "vcpus": 2, "memory_mb": 2048, "disk_size_mb": 2048});
    // The first boots, the second is restored.
    let mut all = vec![platform.create_with(shape.clone()).await];
    tokio::time::sleep(Duration::from_secs(2)).await;
    all.push(platform.create_with(shape).await);
    for id in &all {
        let (_, said) = platform.shell(id, "nproc; sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo").await;
        let (processors, kib) = said.trim().split_once('\n').unwrap();
        assert!(processors == "2" && (1_900_000..2_097_152).contains(&kib.parse::<u64>().unwrap()), "{said}");
    }
    let id = all[1].clone();
    assert_eq!(platform.shell(&id, FILL).await.0, 0);
    for round in 0..2 {
        let (status, paused) = post(&platform, &format!("/v1/sandboxes/{id}/pause?wait_sec=100"), json!({})).await;
        assert_eq!((status, &paused["status"]), (StatusCode::OK, &json!("paused")), "{paused}");
        if round == 1 {
            platform.kill_9("wrenn-agent");
            platform.wait_ready().await;
        }
        let (status, resumed) = post(&platform, &format!("/v1/sandboxes/{id}/resume?wait_sec=100"), json!({})).await;
        assert_eq!((status, &resumed["status"]), (StatusCode::OK, &json!("running")), "{resumed}");
        is_whole(&platform, &id).await;
    }
    // The agent's death does not reach it while it runs, either.
    platform.kill_9("wrenn-agent");
    platform.wait_ready().await;
    is_whole(&platform, &id).await;

    let (status, made) =
        post(&platform, "/v1/snapshots?wait_sec=100", json!({"sandbox_id": id, "name": "large"})).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let (status, forked) = post(&platform, &format!("/v1/sandboxes/{id}/fork?wait_sec=100"), json!({"count": 2})).await;
    assert_eq!(status, StatusCode::CREATED, "{forked}");
    all.extend(forked["sandboxes"].as_array().unwrap().iter().map(|child| child["id"].as_str().unwrap().to_owned()));
    all.push(platform.create_with(json!({"template": "large"})).await);
    for id in &all[1..] {
        is_whole(&platform, id).await;
    }
    assert_eq!(platform.call(Method::DELETE, "/v1/snapshots/large", None).await.0, StatusCode::NO_CONTENT);
    let (status, paused) =
        post(&platform, &format!("/v1/sandboxes/{id}/pause?wait_sec=100"), json!({"memory": false})).await;
    assert_eq!((status, &paused["kept"]), (StatusCode::OK, &json!("disk")), "{paused}");
    let (status, _) = post(&platform, &format!("/v1/sandboxes/{id}/resume?wait_sec=100"), json!({})).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(platform.shell(&id, "nproc; ls /dev/shm | wc -l; wc -l </root/sum").await.1, "2\n0\n1\n");
    for id in &all {
        platform.kill(id).await;
    }
    platform.expect_objects(&before).await;
    assert_eq!(platform.finish(), Default::default());
}
