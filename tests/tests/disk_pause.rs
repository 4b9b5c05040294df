//! A pause that keeps the disk alone: what was written stays, what ran does not go on, and it boots as who it was.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use whole_machine::platform::Platform;
use whole_machine::{objects, wait};

const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";

async fn turn(platform: &Platform, id: &str, verb: &str, body: Option<Value>) -> (StatusCode, Value) {
    platform.call(Method::POST, &format!("/v1/sandboxes/{id}/{verb}?wait_sec=90"), body).await
}

fn files(platform: &Platform, id: &str) -> Vec<String> {
    let directory = platform.dir.join("pool/sandboxes").join(id);
    let generations = std::fs::read_dir(directory).unwrap().flatten();
    let place = generations.map(|entry| entry.path()).find(|path| path.is_dir()).expect("a saved state");
    let mut names: Vec<_> =
        std::fs::read_dir(place).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.retain(|name| !name.starts_with("digests"));
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_stays_and_the_guest_boots() {
    let platform = Platform::start();
    let before = platform.objects();
    let made = json!({"template": "minimal", "memory_mb": 256, "envs": {"GREETING": "hello"}});
    let id = platform.create_with(made).await;
    // Not one of these is flushed by the one who writes it.
    let write = "head -c 20000000 /dev/urandom >/root/big; sha256sum </root/big >/root/sum; echo gone >/dev/shm/gone; sleep 600 & echo";
    assert_eq!(platform.shell(&id, write).await.0, 0);
    // Not its first state: a copy of it has another number.
    for verb in ["pause", "resume"] {
        assert_eq!(turn(&platform, &id, verb, None).await.0, StatusCode::OK);
    }
    let booted = platform.shell(&id, BOOT_ID).await.1;
    let (_, sandbox) = platform.call(Method::GET, &format!("/v1/sandboxes/{id}"), None).await;
    assert_eq!(sandbox["kept"], Value::Null, "{sandbox}");
    for (body, field) in [(json!({"memory": "no"}), "memory"), (json!({"memory": 0}), "memory"), (json!("no"), "")] {
        let (status, answer) = turn(&platform, &id, "pause", Some(body)).await;
        assert_eq!(
            (status, &answer["error"]["code"]),
            (StatusCode::BAD_REQUEST, &json!("invalid_request")),
            "{answer}"
        );
        assert!(answer["error"]["message"].as_str().unwrap().contains(field), "{answer}");
    }

    let (status, paused) = turn(&platform, &id, "pause", Some(json!({"memory": false}))).await;
    assert_eq!(
        (status, &paused["status"], &paused["kept"]),
        (StatusCode::OK, &json!("paused"), &json!("disk")),
        "{paused}"
    );
    assert_eq!(files(&platform, &id), ["disk", "manifest"]);
    assert_eq!(objects::microvms(&platform.tag()), Vec::<i32>::new());
    // It is the same again, also wished otherwise.
    assert_eq!(turn(&platform, &id, "pause", None).await.1["kept"], "disk");
    wait::until("digests", Duration::from_secs(60), || async {
        platform.dir.join("pool/sandboxes").join(&id).join("gen-00002/digests").exists().then_some(())
    })
    .await;
    let (status, named) =
        platform.call(Method::POST, "/v1/snapshots", Some(json!({"sandbox_id": id, "name": "disk.only"}))).await;
    assert_eq!(status, StatusCode::CREATED, "{named}");
    platform.kill_9("wrenn-agent");
    platform.wait_ready().await;

    let (status, resumed) = turn(&platform, &id, "resume", None).await;
    assert_eq!((status, &resumed["status"]), (StatusCode::OK, &json!("running")), "{resumed}");
    let look = r#"[ "$(sha256sum </root/big)" = "$(cat /root/sum)" ] && echo whole; ls /dev/shm; echo $GREETING; pgrep -c sleep; hostname"#;
    assert_eq!(platform.shell(&id, look).await.1, format!("whole\nhello\n0\n{id}\n"));
    let again = platform.shell(&id, BOOT_ID).await.1;
    assert_ne!(again, booted);

    // With memory from here, and once more without.
    assert_eq!(turn(&platform, &id, "pause", Some(json!({"memory": true}))).await.1["kept"], "memory");
    assert_eq!(files(&platform, &id), ["device", "disk", "manifest", "memory"]);
    assert_eq!(turn(&platform, &id, "resume", None).await.1["status"], "running");
    assert_eq!(platform.shell(&id, BOOT_ID).await.1, again);
    assert!(platform.wrenn(&["sandbox", "pause", "--disk-only", &id]).status.success());
    assert!(platform.wrenn(&["sandbox", "resume", &id]).status.success());
    assert!(platform.shell(&id, look).await.1.starts_with("whole\n"));

    // What begins with its snapshot boots, too.
    let child = platform.create_with(json!({"template": "disk.only"})).await;
    assert_eq!(platform.shell(&child, look).await.1, format!("whole\n\n0\n{child}\n"));
    assert_eq!(platform.call(Method::DELETE, "/v1/snapshots/disk.only", None).await.0, StatusCode::NO_CONTENT);
    for id in [&child, &id] {
        platform.kill(id).await;
    }
    platform.expect_objects(&before).await;
    assert_eq!(platform.finish(), Default::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn its_time_can_end_so_and_who_cannot_say_that_all_is_written_goes_on() {
    let platform = Platform::start();
    let wrong = json!({"template": "minimal", "on_timeout": "pause_memory"});
    let (status, answer) = platform.call(Method::POST, "/v1/sandboxes", Some(wrong)).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(answer["error"]["message"].as_str().unwrap().contains("pause_disk"), "{answer}");
    let timed = ["sandbox", "create", "--timeout", "3", "--on-timeout", "pause_disk", "--memory", "256"];
    let made = platform.wrenn(&timed);
    assert!(made.status.success(), "{made:?}");
    let id = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    platform.wait_status(&id, "paused", Duration::from_secs(60)).await;
    let sandbox = platform.get(&id).await;
    assert_eq!((&sandbox["on_timeout"], &sandbox["kept"]), (&json!("pause_disk"), &json!("disk")), "{sandbox}");
    assert_eq!(files(&platform, &id), ["disk", "manifest"]);
    platform.kill(&id).await;

    // envd stands still: nobody can say what of its files is on its disk.
    let id = platform.create().await;
    let _ = platform.shell(&id, "(sleep 1; kill -STOP $(pidof envd)) >/dev/null 2>&1 & echo").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (_, answer) = turn(&platform, &id, "pause", Some(json!({"memory": false}))).await;
    let sandbox = platform.get(&id).await;
    assert_eq!(sandbox["status"], "running", "{answer}");
    assert_eq!(objects::microvms(&platform.tag()).len(), 1);
    let (_, timeline) = platform.call(Method::GET, &format!("/v1/sandboxes/{id}/timeline"), None).await;
    assert!(timeline.to_string().contains("failed"), "{timeline}");
    // With its memory nothing can be lost.
    assert_eq!(turn(&platform, &id, "pause", None).await.1["status"], "paused");
    platform.kill(&id).await;
    assert_eq!(platform.finish(), Default::default());
}
