//! A sandbox that was asked to runs again for the call that needs it, once for all who call.

use std::time::Duration;

use futures::future::join_all;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use whole_machine::platform::{Options, Platform};

async fn pause(platform: &Platform, id: &str, body: Value) {
    let path = format!("/v1/sandboxes/{id}/pause?wait_sec=60");
    assert_eq!(platform.call(Method::POST, &path, Some(body)).await.1["status"], "paused");
}

async fn exec(platform: &Platform, id: &str) -> (StatusCode, Value) {
    let body = json!({"cmd": "cat", "args": ["/dev/shm/kept"]});
    platform.call(Method::POST, &format!("/v1/sandboxes/{id}/exec"), Some(body)).await
}

async fn resumes(platform: &Platform, id: &str) -> usize {
    let (_, timeline) = platform.call(Method::GET, &format!("/v1/sandboxes/{id}/timeline"), None).await;
    timeline.as_array().unwrap().iter().filter(|entry| entry["kind"] == "resume").count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_lets_a_paused_sandbox_run_again_where_that_was_asked_for() {
    let env = [("WRENN_TEST_IDLE_TIMEOUT_MIN_SEC".to_owned(), "1".to_owned())].into();
    let platform = Platform::start_with(&Options { env, ..Options::default() });
    let made = platform.wrenn(&["sandbox", "create", "--memory", "256", "--auto-resume", "--on-timeout", "pause"]);
    assert!(made.status.success(), "{made:?}");
    let id = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    assert_eq!(platform.get(&id).await["auto_resume"], true);
    assert_eq!(platform.shell(&id, "echo kept >/dev/shm/kept").await.0, 0);

    // Twenty at once: one resume, and an answer for each.
    pause(&platform, &id, json!({})).await;
    for (status, said) in join_all((0..20).map(|_| exec(&platform, &id))).await {
        assert_eq!((status, &said["stdout"]), (StatusCode::OK, &json!("kept\n")), "{said}");
    }
    assert_eq!(resumes(&platform, &id).await, 1);
    // Files, through the command line; and a call in the middle of the pause.
    pause(&platform, &id, json!({})).await;
    let copied = platform.wrenn(&["sandbox", "cp", &format!("{id}:/dev/shm/kept"), "-"]);
    assert_eq!(String::from_utf8_lossy(&copied.stdout), "kept\n", "{copied:?}");
    let path = format!("/v1/sandboxes/{id}/pause?wait_sec=0");
    let (status, _) = platform.call(Method::POST, &path, None).await;
    assert!(matches!(status.as_u16(), 200 | 202), "{status}");
    assert_eq!(exec(&platform, &id).await.0, StatusCode::OK);
    assert_eq!(resumes(&platform, &id).await, 3);
    // What only looks wakes nobody.
    pause(&platform, &id, json!({})).await;
    let (status, error) = platform.call(Method::GET, &format!("/v1/sandboxes/{id}/processes"), None).await;
    assert_eq!((status, &error["error"]["code"]), (StatusCode::CONFLICT, &json!("invalid_state")));
    assert_eq!(platform.get(&id).await["status"], "paused");
    // Whoever dies meanwhile: the call may fail, and the next one is answered.
    let (answer, ()) = tokio::join!(exec(&platform, &id), async {
        tokio::time::sleep(Duration::from_millis(60)).await;
        platform.kill_9("wrenn-agent");
    });
    eprintln!("a call beside the death of the agent: {}", answer.0);
    platform.wait_ready().await;
    assert_eq!(platform.shell_soon(&id, "cat /dev/shm/kept").await, (0, "kept\n".to_owned()));

    // Idle, it pauses; called, it is back; not of its disk alone, and not when it is switched off.
    assert!(platform.wrenn(&["sandbox", "timeout", &id, "--idle-timeout", "15"]).status.success());
    platform.wait_status(&id, "paused", Duration::from_secs(120)).await;
    assert_eq!(exec(&platform, &id).await.0, StatusCode::OK);
    pause(&platform, &id, json!({"memory": false})).await;
    let (status, error) = exec(&platform, &id).await;
    assert_eq!((status, &error["error"]["code"]), (StatusCode::CONFLICT, &json!("invalid_state")));
    assert!(platform.wrenn(&["sandbox", "resume", &id]).status.success());
    let off = ["sandbox", "timeout", &id, "--auto-resume", "false", "--idle-timeout", "0"];
    assert!(platform.wrenn(&off).status.success());
    pause(&platform, &id, json!({})).await;
    assert_eq!(exec(&platform, &id).await.0, StatusCode::CONFLICT);
    platform.kill(&id).await;
    assert!(exec(&platform, &id).await.0.is_client_error());
    assert_eq!(platform.finish(), Default::default());
}
