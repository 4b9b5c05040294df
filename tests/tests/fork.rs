//! Snapshots and forks: what begins with one stands where its source stood, is somebody of its own, and needs the source no more.

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use whole_machine::platform::{Options, Platform};
use whole_machine::wait;

const COUNTER: &str = ": >/dev/shm/count; (while :; do echo >>/dev/shm/count; sleep 0.05; done) >/dev/null 2>&1 &";

async fn call(platform: &Platform, method: Method, path: &str, body: Option<Value>) -> (u16, Value) {
    let (status, answer) = platform.call(method, path, body).await;
    (status.as_u16(), answer)
}

async fn fork(platform: &Platform, id: &str, body: Value) -> (u16, Value) {
    call(platform, Method::POST, &format!("/v1/sandboxes/{id}/fork?wait_sec=110"), Some(body)).await
}

async fn forked(platform: &Platform, id: &str, count: usize) -> Vec<String> {
    let (status, answer) = fork(platform, id, json!({"count": count})).await;
    assert_eq!(status, 201, "{answer}");
    ids(&answer)
}

fn ids(answer: &Value) -> Vec<String> {
    let sandboxes = answer["sandboxes"].as_array().unwrap();
    sandboxes.iter().map(|sandbox| sandbox["id"].as_str().unwrap().to_owned()).collect()
}

async fn snapshot(platform: &Platform, id: &str, name: &str) -> (u16, Value) {
    let body = json!({"sandbox_id": id, "name": name});
    call(platform, Method::POST, "/v1/snapshots?overwrite=true&wait_sec=110", Some(body)).await
}

async fn turn(platform: &Platform, id: &str, verb: &str) {
    let path = format!("/v1/sandboxes/{id}/{verb}?wait_sec=110");
    let (status, sandbox) = call(platform, Method::POST, &path, None).await;
    assert_eq!(status, 200, "{sandbox}");
}

async fn counts(platform: &Platform, id: &str) {
    let look = "a=$(wc -c </dev/shm/count); sleep 1; b=$(wc -c </dev/shm/count); test \"$b\" -gt \"$a\" && echo on";
    assert_eq!(platform.shell(id, look).await.1, "on\n", "{id} stands still");
}

fn kept(platform: &Platform) -> usize {
    std::fs::read_dir(platform.dir.join("pool/snapshots")).unwrap().count()
}

async fn until_kept(platform: &Platform, count: usize) {
    wait::until("the snapshots of forks are gone", Duration::from_secs(60), || async {
        (kept(platform) == count).then_some(())
    })
    .await;
}

async fn kill_all(platform: &Platform) {
    let (_, all) = call(platform, Method::GET, "/v1/sandboxes", None).await;
    for sandbox in all.as_array().unwrap() {
        platform.kill(sandbox["id"].as_str().unwrap()).await;
    }
}

/// Nothing that is a sandbox's own was another's.
async fn differs(platform: &Platform, id: &str, seen: &mut [BTreeSet<String>; 5]) {
    let facts =
        "hostname; cat /etc/machine-id; head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid";
    let (code, said) = platform.shell(id, facts).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.starts_with(id), "{said}");
    let own = said.lines().map(str::to_owned).chain([platform.guest(id).access_token]);
    own.zip(seen).for_each(|(fact, seen)| assert!(seen.insert(fact.clone()), "{fact} is another's too"));
}

/// `count` forks of one sandbox, and what of them must differ.
async fn forks_differ(count: usize) {
    let platform = Platform::start_with(&Options { pool_mib: Some(16_384), ..Options::default() });
    let before = platform.objects();
    let body =
        json!({"template": "minimal", "memory_mb": 256, "metadata": {"a": "1", "b": "2"}, "envs": {"E": "source"}});
    let source = platform.create_with(body).await;
    assert_eq!(
        platform.shell(&source, &format!("echo mine >/root/mine; echo memory >/dev/shm/mark; {COUNTER}")).await.0,
        0
    );

    // A command that is under way in the source hears nothing of it.
    let under_way = platform.shell(&source, "for n in 1 2 3 4 5 6 7 8; do echo $n; sleep 1; done");
    let forking = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let asked = json!({"count": count, "metadata": {"b": "3"}, "envs": {"F": "fork"}, "timeout_sec": 3000, "on_timeout": "pause"});
        fork(&platform, &source, asked).await
    };
    let ((code, said), (status, answer)) = tokio::join!(under_way, forking);
    assert_eq!((code, said.as_str()), (0, "1\n2\n3\n4\n5\n6\n7\n8\n"));
    assert_eq!(status, 201, "{answer}");
    let children = ids(&answer);
    assert_eq!(children.iter().collect::<BTreeSet<_>>().len(), count);
    for child in answer["sandboxes"].as_array().unwrap() {
        assert_eq!(child["status"], "running");
        assert_eq!((&child["timeout_sec"], &child["on_timeout"]), (&json!(3000), &json!("pause")));
        assert_eq!((&child["metadata"]["a"], &child["metadata"]["b"]), (&json!("1"), &json!("3")));
        assert_eq!((&child["template"], &child["memory_mb"]), (&json!("minimal"), &json!(256)));
    }
    let mut seen = [const { BTreeSet::new() }; 5];
    for id in children.iter().chain([&source]) {
        differs(&platform, id, &mut seen).await;
    }
    assert!(seen.iter().all(|seen| seen.len() == count + 1), "{seen:?}");
    for id in &children {
        let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let (_, said) = platform.shell(id, "date +%s.%N; cat /root/mine /dev/shm/mark; echo $E $F").await;
        let ended = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let (time, rest) = said.split_once('\n').unwrap();
        assert!((began - 1.0..ended + 1.0).contains(&time.parse().unwrap()), "{time}, {began}, {ended}");
        assert_eq!(rest, "mine\nmemory\nsource fork\n");
    }
    for id in children.iter().take(3).chain([&source]) {
        counts(&platform, id).await;
    }
    until_kept(&platform, 0).await;

    // What one writes no other sees, nor the source; the source's end is not theirs.
    assert_eq!(platform.shell(&children[0], "echo child >/root/child; echo child >/dev/shm/child; sync").await.0, 0);
    for id in [&children[1], &source] {
        assert_eq!(platform.shell(id, "ls /root/child /dev/shm/child 2>/dev/null").await.1, "");
    }
    platform.kill(&source).await;
    platform.kill_9("wrenn-agent");
    platform.wait_ready().await;
    turn(&platform, &children[0], "pause").await;
    turn(&platform, &children[0], "resume").await;
    assert_eq!(platform.shell(&children[0], "cat /root/mine /dev/shm/child").await.1, "mine\nchild\n");
    counts(&platform, &children[0]).await;
    // A fork of a fork, and one of what is paused, which stays so.
    let [grandchild] = forked(&platform, &children[0], 1).await.try_into().unwrap();
    assert_eq!(platform.shell(&grandchild, "cat /root/child /dev/shm/child").await.1, "child\nchild\n");
    turn(&platform, &grandchild, "pause").await;
    let great = forked(&platform, &grandchild, 2).await;
    for id in &great {
        counts(&platform, id).await;
    }
    let (_, sandbox) = call(&platform, Method::GET, &format!("/v1/sandboxes/{grandchild}"), None).await;
    assert_eq!(sandbox["status"], "paused");
    turn(&platform, &grandchild, "resume").await;
    counts(&platform, &grandchild).await;
    until_kept(&platform, 0).await;
    kill_all(&platform).await;
    platform.expect_objects(&before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn forks_go_on_where_their_source_stood_and_share_nothing_that_is_their_own() {
    forks_differ(5).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: make check-long"]
async fn fifty_forks_share_nothing_that_is_their_own() {
    let platform = Platform::start_with(&Options { pool_mib: Some(16_384), ..Options::default() });
    let before = platform.objects();
    let source = platform.create().await;
    let mut seen = [const { BTreeSet::new() }; 5];
    // As many at once as two processors are sold for beside the source.
    for count in [25, 25] {
        let children = forked(&platform, &source, count).await;
        for id in &children {
            differs(&platform, id, &mut seen).await;
        }
        for id in &children {
            platform.kill(id).await;
        }
    }
    assert!(seen.iter().all(|seen| seen.len() == 50), "{seen:?}");
    kill_all(&platform).await;
    until_kept(&platform, 0).await;
    platform.expect_objects(&before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_a_template_until_it_is_deleted() {
    let platform = Platform::start_with(&Options { pool_mib: Some(8192), ..Options::default() });
    let before = platform.objects();
    let source = platform.create_with(json!({"template": "minimal", "memory_mb": 256, "disk_size_mb": 2048})).await;
    assert_eq!(platform.shell(&source, &format!("echo one >/root/mark; {COUNTER}")).await.0, 0);
    let (status, made) = snapshot(&platform, &source, "ready.one").await;
    assert_eq!(status, 201, "{made}");
    for (field, value) in [
        ("name", json!("ready.one")),
        ("type", json!("snapshot")),
        ("vcpus", json!(1)),
        ("memory_mb", json!(256)),
        ("platform", json!(false)),
        ("id", json!(source)),
        ("status", json!("running")),
    ] {
        assert_eq!(made[field], value, "{field}: {made}");
    }
    assert!(made["size_bytes"].as_i64().unwrap() > 1 << 20, "{made}");
    counts(&platform, &source).await;
    assert_eq!(platform.shell(&source, "echo two >/root/mark").await.0, 0);

    // Wrong input, each in words.
    let code = |answer: &(u16, Value)| (answer.0, answer.1["error"]["code"].as_str().unwrap_or_default().to_owned());
    let wanted = |status: u16, code: &str| (status, code.to_owned());
    assert_eq!(code(&snapshot(&platform, &source, "ready.one").await), wanted(409, "template_name_taken"));
    assert_eq!(code(&snapshot(&platform, &source, "minimal").await), wanted(409, "name_reserved"));
    assert_eq!(code(&snapshot(&platform, &source, "../x").await), wanted(400, "invalid_request"));
    assert_eq!(code(&snapshot(&platform, "sb0000000000000000000000", "x").await), wanted(404, "not_found"));
    assert_eq!(code(&snapshot(&platform, "nonsense", "x").await), wanted(400, "invalid_request"));
    for count in [json!(0), json!(-1), json!(65), json!("five")] {
        assert_eq!(code(&fork(&platform, &source, json!({"count": count})).await), wanted(400, "invalid_request"));
    }
    let list = async |kind: &str| {
        let (status, list) = call(&platform, Method::GET, &format!("/v1/snapshots{kind}"), None).await;
        assert_eq!(status, 200, "{list}");
        let named = |template: &Value| template["name"].as_str().unwrap().to_owned();
        list.as_array().unwrap().iter().map(named).collect::<Vec<_>>()
    };
    // Of the base ones there are as many as the host has images.
    let bases = list("?type=base").await;
    assert!(bases.contains(&"minimal".to_owned()) && !bases.contains(&"ready.one".to_owned()), "{bases:?}");
    assert_eq!(list("").await, [vec!["ready.one".to_owned()], bases].concat());
    assert_eq!(list("?type=snapshot").await, ["ready.one"]);
    assert_eq!(code(&call(&platform, Method::GET, "/v1/snapshots?type=x", None).await), wanted(400, "invalid_request"));
    let delete = async |name: &str| call(&platform, Method::DELETE, &format!("/v1/snapshots/{name}"), None).await;
    assert_eq!(code(&delete("minimal").await), wanted(403, "forbidden"));
    assert_eq!(code(&delete("nothing").await), wanted(404, "not_found"));

    // What begins with it has its shape and stands where it stood; also after the source has gone and everything was started anew.
    platform.kill(&source).await;
    platform.kill_9("wrenn-agent");
    platform.kill_9("wrenn-cp");
    platform.wait_ready().await;
    let gone = snapshot(&platform, &source, "late").await;
    assert_eq!(code(&gone), wanted(409, "invalid_state"), "{}", gone.1);
    let begun =
        join_all((0..2).map(|_| platform.create_with(json!({"template": "ready.one", "memory_mb": 512})))).await;
    for id in &begun {
        assert_eq!(platform.shell(id, "cat /root/mark").await.1, "one\n");
        counts(&platform, id).await;
        let (_, sandbox) = call(&platform, Method::GET, &format!("/v1/sandboxes/{id}"), None).await;
        assert_eq!((&sandbox["template"], &sandbox["memory_mb"]), (&json!("ready.one"), &json!(256)));
        assert_eq!(sandbox["disk_size_mb"], 2048);
    }
    // A paused one is kept under a name, too, and stays paused.
    turn(&platform, &begun[0], "pause").await;
    let (status, made) = snapshot(&platform, &begun[0], "ready.two").await;
    assert_eq!((status, &made["status"]), (201, &json!("paused")), "{made}");

    // Deleted, it is nobody's template any more, its name is free, and what began with it lives on.
    assert_eq!(delete("ready.one").await.0, 204);
    assert_eq!(code(&delete("ready.one").await), wanted(404, "not_found"));
    let late = call(&platform, Method::POST, "/v1/sandboxes", Some(json!({"template": "ready.one"}))).await;
    assert_eq!(code(&late), wanted(404, "not_found"));
    until_kept(&platform, 1).await;
    turn(&platform, &begun[0], "resume").await;
    for id in &begun {
        counts(&platform, id).await;
    }
    let (status, _) = snapshot(&platform, &begun[1], "ready.one").await;
    assert_eq!(status, 201);
    for name in ["ready.one", "ready.two"] {
        assert_eq!(delete(name).await.0, 204);
    }
    until_kept(&platform, 0).await;
    kill_all(&platform).await;
    platform.expect_objects(&before).await;
}

/// Whoever dies in the middle of it: all of the fork runs in the end, the source goes on, and nothing is left behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_fork_survives_the_death_of_whoever_makes_it() {
    let platform = Platform::start_with(&Options { pool_mib: Some(8192), ..Options::default() });
    let before = platform.objects();
    let source = platform.create().await;
    assert_eq!(platform.shell(&source, COUNTER).await.0, 0);
    for (round, program) in ["wrenn-agent", "wrenn-cp", "wrenn-agent", "wrenn-cp"].into_iter().enumerate() {
        let path = format!("/v1/sandboxes/{source}/fork?wait_sec=0");
        let (status, answer) = call(&platform, Method::POST, &path, Some(json!({"count": 2}))).await;
        assert_eq!(status, 202, "{answer}");
        tokio::time::sleep(Duration::from_millis(120 * round as u64)).await;
        platform.kill_9(program);
        platform.wait_ready().await;
        for id in ids(&answer) {
            let began = Instant::now();
            loop {
                let (status, sandbox) = call(&platform, Method::GET, &format!("/v1/sandboxes/{id}"), None).await;
                match (status, sandbox["status"].as_str()) {
                    (200, Some("running")) => break,
                    (200, Some("starting")) if began.elapsed() < Duration::from_secs(100) => {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                    _ => panic!("{status} {sandbox}"),
                }
            }
            let (_, sandbox) = call(&platform, Method::GET, &format!("/v1/sandboxes/{id}"), None).await;
            assert_eq!(sandbox["status"], "running", "{sandbox}");
            counts(&platform, &id).await;
            platform.kill(&id).await;
        }
        counts(&platform, &source).await;
        until_kept(&platform, 0).await;
    }
    platform.kill(&source).await;
    platform.expect_objects(&before).await;
}
