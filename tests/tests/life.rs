//! A sandbox from create to kill, by the public API and by the CLI, on a real microVM; and nothing left behind.

use std::process::Stdio;

use reqwest::{Method, StatusCode};
use serde_json::json;
use whole_machine::platform::{Options, Platform};

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_lives_and_leaves_nothing_behind() {
    let platform = Platform::start();
    let before = platform.objects();

    let (status, created) = platform
        .call(
            Method::POST,
            "/v1/sandboxes?wait_sec=60",
            Some(json!({"metadata": {"who": "me"}, "envs": {"GREETING": "hej"}})),
        )
        .await;
    assert_eq!(status, StatusCode::CREATED, "{created}");
    let id = created["id"].as_str().unwrap();
    assert_eq!(created["status"], "running");
    assert_eq!(created["template"], "minimal");
    assert_eq!((created["vcpus"].as_i64(), created["memory_mb"].as_i64()), (Some(1), Some(512)));
    assert_eq!(created["metadata"]["who"], "me");
    let isolation = platform.isolation();
    assert_eq!(created["isolation"], isolation.as_str(), "{created}");
    match std::env::var("WRENN_VMM").as_deref() {
        Ok("firecracker") => assert_eq!(isolation, "firecracker/kvm"),
        Ok("qemu") => assert!(isolation.starts_with("qemu/"), "{isolation}"),
        _ => assert!(["firecracker/kvm", "qemu/kvm", "qemu/emulated"].contains(&isolation.as_str()), "{isolation}"),
    }

    // Commands: output apart, exit codes, environment, user, binary output.
    let run = async |body| platform.call(Method::POST, &format!("/v1/sandboxes/{id}/exec"), Some(body)).await;
    let (status, outcome) = run(json!({"cmd": "/bin/sh", "args": ["-c", "echo out; echo err >&2; exit 7"]})).await;
    assert_eq!(status, 200, "{outcome}");
    assert_eq!((outcome["stdout"].as_str(), outcome["stderr"].as_str()), (Some("out\n"), Some("err\n")));
    assert_eq!(outcome["exit_code"], 7);
    let (_, outcome) = run(
        json!({"cmd": "/bin/sh", "args": ["-c", "echo $GREETING $MORE; pwd"], "envs": {"MORE": "du"}, "cwd": "/usr"}),
    )
    .await;
    assert_eq!(outcome["stdout"], "hej du\n/usr\n");
    let (_, outcome) = run(json!({"cmd": "python3", "args": ["-c", "print(sum(range(101)))"]})).await;
    assert_eq!(outcome["stdout"], "5050\n");
    let (_, outcome) = run(json!({"cmd": "/bin/sh", "args": ["-c", "printf '\\377\\000'"]})).await;
    assert_eq!((outcome["encoding"].as_str(), outcome["stdout"].as_str()), (Some("base64"), Some("/wA=")));
    let (_, outcome) = run(json!({"cmd": "whoami", "user": "user"})).await;
    assert_eq!(outcome["stdout"], "user\n");

    // Files: what was written is what is read, binary too; a missing one is 404.
    let content: Vec<u8> = (0..300_000u32).flat_map(|n| n.to_le_bytes()).collect();
    let form = reqwest::multipart::Form::new()
        .text("path", "/home/wrenn-user/some/where/data.bin")
        .part("file", reqwest::multipart::Part::bytes(content.clone()).file_name("data.bin"));
    let url = format!("{}/v1/sandboxes/{id}/files", platform.api);
    let answer = platform
        .http
        .post(format!("{url}/write"))
        .header("X-API-Key", &platform.api_key)
        .multipart(form)
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 204, "{}", answer.text().await.unwrap());
    let read = platform.http.post(format!("{url}/read")).header("X-API-Key", &platform.api_key);
    let answer = read.json(&json!({"path": "/home/wrenn-user/some/where/data.bin"})).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert!(answer.bytes().await.unwrap() == content.as_slice(), "the file changed on its way");
    let (status, missing) =
        platform.call(Method::POST, &format!("/v1/sandboxes/{id}/files/read"), Some(json!({"path": "/nowhere"}))).await;
    assert_eq!((status.as_u16(), missing["error"]["code"].as_str()), (404, Some("not_found")), "{missing}");

    // The same sandbox under the name that published clients use, and in the list.
    let (status, capsule) = platform.call(Method::GET, &format!("/v1/capsules/{id}"), None).await;
    assert_eq!((status.as_u16(), capsule["id"].as_str()), (200, Some(id)));
    let (_, list) = platform.call(Method::GET, "/v1/sandboxes", None).await;
    assert!(list.as_array().unwrap().iter().any(|sandbox| sandbox["id"] == id), "{list}");

    let (status, _) = platform.call(Method::DELETE, &format!("/v1/sandboxes/{id}"), None).await;
    assert_eq!(status, 204);
    let (status, _) = platform.call(Method::DELETE, &format!("/v1/sandboxes/{id}"), None).await;
    assert_eq!(status, 204, "a second kill is no error");
    assert_eq!(platform.get(id).await["status"], "stopped");
    let (status, outcome) = run(json!({"cmd": "true"})).await;
    assert_eq!((status.as_u16(), outcome["error"]["code"].as_str()), (409, Some("invalid_state")), "{outcome}");
    let (_, list) = platform.call(Method::GET, "/v1/sandboxes", None).await;
    assert!(list.as_array().unwrap().is_empty(), "{list}");

    platform.expect_objects(&before).await;
    assert_eq!(platform.finish(), Default::default(), "after `wrenn down` nothing is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cli_does_what_its_manual_says() {
    let platform = Platform::start();
    let before = platform.objects();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();

    // `run` gives the command's output and exit code, and kills its sandbox.
    let output = platform.wrenn(&["run", "--memory", "256", "--", "sh", "-c", "echo from inside; echo no >&2; exit 3"]);
    assert_eq!(
        (output.status.code(), text(&output.stdout)),
        (Some(3), "from inside\n".to_owned()),
        "{}",
        text(&output.stderr)
    );
    assert!(text(&output.stderr).contains("no\n"));
    platform.expect_objects(&before).await;

    let output = platform.wrenn(&["sandbox", "create", "--memory", "256", "--json"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let created: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let id = created["id"].as_str().unwrap();
    platform.wait_status(id, "running", whole_machine::platform::CREATE_LIMIT).await;

    // A file there and back, byte for byte.
    let scratch = tempfile::tempdir().unwrap();
    let (there, back) = (scratch.path().join("there"), scratch.path().join("back"));
    let content: Vec<u8> = (0..=255u8).cycle().take(3 << 20).collect();
    std::fs::write(&there, &content).unwrap();
    let output = platform.wrenn(&["sandbox", "cp", there.to_str().unwrap(), &format!("{id}:/tmp/x.bin")]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let output = platform.wrenn(&["sandbox", "cp", &format!("{id}:/tmp/x.bin"), back.to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(std::fs::read(&back).unwrap() == content, "the file changed on its way");

    // Binary output of any size by exec, and its exit code.
    let output = platform.wrenn(&["sandbox", "exec", id, "--", "cat", "/tmp/x.bin"]);
    assert!(
        output.stdout == content && output.status.success(),
        "{} bytes, {}",
        output.stdout.len(),
        text(&output.stderr)
    );

    let output = platform.wrenn(&["sandbox", "list", "--json"]);
    assert!(text(&output.stdout).contains(id));
    let output = platform.wrenn(&["host", "list", "--json"]);
    assert!(text(&output.stdout).contains(&platform.host_id), "{}", text(&output.stderr));
    assert!(platform.wrenn(&["sandbox", "kill", id]).status.success());

    // For scripts: one document, and still the command's own exit code.
    let output =
        platform.wrenn(&["run", "--memory", "256", "--json", "--", "sh", "-c", "echo out; echo err >&2; exit 3"]);
    let outcome: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    assert_eq!((outcome["stdout"].as_str(), outcome["stderr"].as_str()), (Some("out\n"), Some("err\n")), "{outcome}");
    assert_eq!((outcome["exit_code"].as_i64(), output.status.code()), (Some(3), Some(3)));

    // Wrong input: a message for a person, no success.
    for (args, says) in [
        (vec!["run", "--template", "no-such-template", "--", "true"], "no-such-template"),
        (vec!["run", "--vcpus", "0", "--", "true"], "vcpus"),
        (vec!["run", "--memory", "10485760", "--", "true"], "memory_mb"),
        (vec!["sandbox", "get", "sb0000000000000000000000"], "not_found"),
        (vec!["sandbox", "cp", "/nonexistent-file", "sb0000000000000000000000:/x"], "nonexistent-file"),
    ] {
        let output = platform.wrenn(&args);
        let (code, said) = (output.status.code(), format!("{}{}", text(&output.stdout), text(&output.stderr)));
        assert!(code.is_some_and(|code| code != 0), "{args:?} succeeded");
        assert!(said.contains(says) && !said.contains("panicked"), "{args:?} said: {said}");
    }

    // Ctrl-C in the middle of a run kills the sandbox too.
    let mut child = platform
        .command(&["run", "--memory", "256", "--", "sh", "-c", "echo begun; sleep 600"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut first = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut first).unwrap();
    assert_eq!(first, "begun\n");
    // SAFETY: the pid is that of our own child, which has not been waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    assert!(!child.wait().unwrap().success());
    platform.expect_objects(&before).await;
}

/// The operators' manuals name these two calls, made by curl with the administrator's JWT.
#[tokio::test(flavor = "multi_thread")]
async fn the_two_host_calls_of_the_operators_manual_work_verbatim() {
    let platform = Platform::start();
    let token = platform.wrenn(&["admin", "token"]);
    let token = String::from_utf8_lossy(&token.stdout).trim().to_owned();
    assert!(token.starts_with("ey"), "an administrator's JWT: {token}");
    let curl = |url: &str, body: Option<&str>| {
        let mut command = std::process::Command::new("curl");
        command.args(["-sS", "-X", "POST", url, "-H", &format!("Authorization: Bearer {token}")]);
        if let Some(body) = body {
            command.args(["-H", "Content-Type: application/json", "-d", body]);
        }
        let output = command.output().expect("curl");
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
    };
    let made = curl(&format!("{}/v1/hosts", platform.api), Some(r#"{"type":"regular"}"#));
    let first = made["registration_token"].as_str().unwrap_or_else(|| panic!("{made}"));
    let id = made["host"]["id"].as_str().unwrap();
    assert_eq!(made["host"]["status"], "pending");
    let again = curl(&format!("{}/v1/hosts/{id}/token", platform.api), None);
    let second = again["registration_token"].as_str().unwrap_or_else(|| panic!("{again}"));
    assert_ne!(first, second);
    let removed = platform.wrenn(&["host", "rm", id]);
    assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_platforms_on_one_machine_do_not_get_in_each_others_way() {
    let (one, two) = std::thread::scope(|scope| {
        let one = scope.spawn(Platform::start);
        let two = scope.spawn(Platform::start);
        (one.join().unwrap(), two.join().unwrap())
    });
    assert_ne!(one.tag(), two.tag());
    let (a, b) = tokio::join!(one.create(), two.create());
    assert_eq!(one.shell(&a, "echo one > /root/name; cat /root/name").await, (0, "one\n".to_owned()));
    assert_eq!(two.shell(&b, "cat /root/name 2>/dev/null || echo none").await, (0, "none\n".to_owned()));
    let (status, foreign) = two.call(Method::GET, &format!("/v1/sandboxes/{a}"), None).await;
    assert_eq!(status, 404, "{foreign}");
    assert_eq!(one.finish(), Default::default());
    assert_eq!(two.shell(&b, "echo still here").await, (0, "still here\n".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_leaves_sandboxes_running_and_down_ends_them() {
    let mut platform = Platform::start();
    let id = platform.create().await;
    platform.shell(&id, "echo kept > /root/kept").await;
    platform.stop_programs();
    assert_eq!(platform.objects().get("microvms"), Some(&1), "the sandbox goes on without the programs");
    assert_eq!((platform.pid_of("wrenn-agent"), platform.pid_of("wrenn-cp")), (None, None));
    platform.restart(&Options::default());
    platform.wait_status(&id, "running", std::time::Duration::from_secs(20)).await;
    assert_eq!(platform.shell(&id, "cat /root/kept").await, (0, "kept\n".to_owned()));
    platform.stop_programs();
    assert_eq!(platform.finish(), Default::default(), "down works when nothing is up");
}
