//! Creates that are restored from their template's booted state: each is somebody of its own, and the state is there whoever dies.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::future::join_all;
use serde_json::{Value, json};
use whole_machine::platform::{Options, Platform};
use whole_machine::wait;

/// Of one state, at once.
const CLONES: usize = 6;

fn states(platform: &Platform) -> Vec<PathBuf> {
    let places = std::fs::read_dir(platform.dir.join("pool/templates")).unwrap().flatten();
    places.map(|place| place.path().join("gen-00001")).filter(|sealed| sealed.exists()).collect()
}

async fn until_kept(platform: &Platform, count: usize) {
    wait::until("the booted state is kept", Duration::from_secs(30), || async {
        (states(platform).len() == count).then_some(())
    })
    .await;
}

fn is_restored(platform: &Platform, id: &str) -> bool {
    let text = std::fs::read(platform.dir.join("pool/sandboxes").join(id).join("state.json")).unwrap();
    let state: Value = serde_json::from_slice(&text).unwrap();
    state["record"]["phase"]["run"]["template_generation"].is_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn clones_of_one_booted_state_share_nothing_that_is_their_own() {
    let platform = Platform::start_with(&Options { pool_mib: Some(8192), ..Options::default() });
    let before = platform.objects();
    let first = platform.create().await;
    assert!(!is_restored(&platform, &first));
    until_kept(&platform, 1).await;

    // The agent dies and comes back: the state is still good.
    platform.kill_9("wrenn-agent");
    platform.wait_ready().await;
    let clones = join_all((0..CLONES).map(|_| platform.create())).await;
    let facts =
        "hostname; cat /etc/machine-id; head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid";
    let mut seen = [const { BTreeSet::new() }; 5];
    for id in clones.iter().chain([&first]) {
        let (code, said) = platform.shell(id, facts).await;
        assert_eq!(code, 0, "{said}");
        let token = platform.guest(id).access_token;
        let own = said.lines().map(str::to_owned).chain([token]);
        own.zip(&mut seen).for_each(|(fact, seen)| assert!(seen.insert(fact.clone()), "{fact} is another's too"));
        assert!(said.starts_with(id.as_str()), "{said}");
    }
    assert!(seen.iter().all(|seen| seen.len() == CLONES + 1), "{seen:?}");
    let log = |id: &str| String::from_utf8(platform.wrenn(&["sandbox", "logs", id]).stdout).unwrap();
    let booted = log(&first);
    for id in &clones {
        assert!(is_restored(&platform, id));
        let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let (_, said) = platform.shell(id, "date +%s.%N").await;
        let ended = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let theirs: f64 = said.trim().parse().unwrap();
        assert!((began - 1.0..ended + 1.0).contains(&theirs), "{theirs} is not between {began} and {ended}");
        // What the kernel said when it booted is what people look for in the log.
        assert!(log(id).starts_with(booted.lines().next().expect("a kernel that boots says something")), "{}", log(id));
    }

    // What one writes no other sees, neither now nor later.
    assert_eq!(platform.shell(&clones[0], "echo mine >/root/mine; sync; echo 1 >/dev/shm/mine").await.0, 0);
    let late = platform.create().await;
    for id in [&clones[1], &late, &first] {
        assert_eq!(platform.shell(id, "ls /root/mine /dev/shm/mine 2>/dev/null").await.1, "");
    }
    // A clone is paused and resumed as any other, with what it has written.
    for verb in ["pause", "resume"] {
        let path = format!("/v1/sandboxes/{}/{verb}?wait_sec=60", clones[0]);
        let (status, sandbox) = platform.call(reqwest::Method::POST, &path, None).await;
        assert_eq!(status, 200, "{sandbox}");
    }
    assert_eq!(platform.shell(&clones[0], "cat /root/mine /dev/shm/mine").await.1, "mine\n1\n");

    // Another shape is another state.
    let other = platform.create_with(json!({"template": "minimal", "memory_mb": 256, "vcpus": 2})).await;
    assert!(!is_restored(&platform, &other));
    assert_eq!(platform.shell(&other, "nproc").await.1, "2\n");
    until_kept(&platform, 2).await;
    let other = platform.create_with(json!({"template": "minimal", "memory_mb": 256, "vcpus": 2})).await;
    assert!(is_restored(&platform, &other));
    assert_eq!(platform.shell(&other, "nproc").await.1, "2\n");

    // A state that does not come up is not tried twice.
    for state in states(&platform) {
        std::fs::write(state.join("device"), "nonsense").unwrap();
    }
    let booted = platform.create().await;
    assert!(!is_restored(&platform, &booted));
    let (_, all) = platform.call(reqwest::Method::GET, "/v1/sandboxes", None).await;
    for sandbox in all.as_array().unwrap() {
        platform.kill(sandbox["id"].as_str().unwrap()).await;
    }
    platform.expect_objects(&before).await;
}
