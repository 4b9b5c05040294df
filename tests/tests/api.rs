//! The public API on a sandbox that runs: commands collected and streamed, files, processes, and what clients do wrong with them.

use std::time::{Duration, Instant};

use futures::{SinkExt as _, StreamExt as _};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use whole_machine::platform::Platform;

type Socket = tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>;

async fn stream(platform: &Platform, id: &str) -> Socket {
    stream_by(platform, id, &platform.api_key).await
}

async fn stream_by(platform: &Platform, id: &str, api_key: &str) -> Socket {
    let url = format!("{}/v1/sandboxes/{id}/exec/stream", platform.api.replace("http", "ws"));
    let mut request = url.into_client_request().unwrap();
    request.headers_mut().insert("X-API-Key", api_key.parse().unwrap());
    tokio_tungstenite::connect_async(request).await.unwrap().0
}

async fn frame(socket: &mut Socket) -> Option<Value> {
    loop {
        let message = tokio::time::timeout(Duration::from_secs(60), socket.next()).await.expect("a frame in time");
        match message?.ok()? {
            Message::Text(text) => return Some(serde_json::from_str(&text).unwrap()),
            Message::Close(_) => return None,
            _ => {}
        }
    }
}

async fn say(socket: &mut Socket, frame: Value) {
    socket.send(Message::Text(frame.to_string().into())).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_files_and_processes_of_a_running_sandbox() {
    let platform = Platform::start();
    let id = platform.create().await;
    let path = |rest: &str| format!("/v1/sandboxes/{id}{rest}");

    // Collected: both streams, the code, what is no text, what is too much.
    let (status, outcome) =
        platform.call(Method::POST, &path("/exec"), Some(json!({"cmd": "echo out; echo err >&2; exit 3"}))).await;
    assert_eq!(status, 200, "{outcome}");
    assert_eq!(
        (&outcome["stdout"], &outcome["stderr"], &outcome["exit_code"], &outcome["encoding"]),
        (&json!("out\n"), &json!("err\n"), &json!(3), &json!("utf-8"))
    );
    let (_, binary) = platform.call(Method::POST, &path("/exec"), Some(json!({"cmd": "printf '\\377'"}))).await;
    assert_eq!((&binary["stdout"], &binary["encoding"]), (&json!("/w=="), &json!("base64")));
    let (_, much) = platform
        .call(
            Method::POST,
            &path("/exec"),
            Some(json!({"cmd": "head -c 12000000 /dev/zero | tr '\\0' x", "timeout_sec": 60})),
        )
        .await;
    assert_eq!((much["stdout"].as_str().unwrap().len(), &much["truncated"]), (10 << 20, &json!(true)));
    let with = json!({"cmd": "sh", "args": ["-c", "echo $A in $PWD as $(id -un)"], "envs": {"A": "b c"}, "cwd": "/tmp", "user": "user"});
    let (_, outcome) = platform.call(Method::POST, &path("/exec"), Some(with)).await;
    assert_eq!(outcome["stdout"], "b c in /tmp as user\n", "{outcome}");
    let began = Instant::now();
    let (status, late) =
        platform.call(Method::POST, &path("/exec"), Some(json!({"cmd": "sleep 600", "timeout_sec": 1}))).await;
    assert_eq!((status.as_u16(), late["error"]["code"].as_str()), (504, Some("deadline_exceeded")), "{late}");
    assert!(began.elapsed() < Duration::from_secs(15));
    for (body, status, code) in [
        (json!({"cmd": "/no/such/program"}), 404, "not_found"),
        (json!({"cmd": "/etc/passwd"}), 403, "forbidden"),
        (json!({"cmd": "true", "cwd": "/no/such/folder"}), 404, "not_found"),
        (json!({"cmd": "true", "user": "no-such-user"}), 400, "invalid_request"),
    ] {
        let (got, answer) = platform.call(Method::POST, &path("/exec"), Some(body.clone())).await;
        let said = (got.as_u16(), answer["error"]["code"].as_str().unwrap_or_default());
        // Which of the refusals it is depends on where it is noticed; that it is one, and in words, does not.
        let is_refusal = said == (status, code) || said == (400, "invalid_request") || said == (409, "conflict");
        assert!(is_refusal && !answer["error"]["message"].as_str().unwrap().is_empty(), "{body}: {got} {answer}");
    }

    // Files: whole, binary, refused.
    let content: Vec<u8> = (0..3_000_000u32).map(|n| u8::try_from(n % 253).unwrap()).collect();
    for route in ["/files/write", "/files/stream/write"] {
        let part = reqwest::multipart::Part::bytes(content.clone()).file_name("x");
        let form = reqwest::multipart::Form::new().text("path", "/root/a folder/x.bin").part("file", part);
        let request =
            platform.http.post(format!("{}{}", platform.api, path(route))).header("X-API-Key", &platform.api_key);
        assert_eq!(request.multipart(form).send().await.unwrap().status(), StatusCode::NO_CONTENT, "{route}");
        for read in ["/files/read", "/files/stream/read"] {
            let request =
                platform.http.post(format!("{}{}", platform.api, path(read))).header("X-API-Key", &platform.api_key);
            let answer = request.json(&json!({"path": "/root/a folder/x.bin"})).send().await.unwrap();
            assert!(answer.status() == 200 && answer.bytes().await.unwrap() == content, "{read}");
        }
    }
    for (file, statuses) in [("/no/such/file", [404, 404]), ("/root", [400, 409]), ("/dev/zero", [400, 409])] {
        let (status, answer) = platform.call(Method::POST, &path("/files/read"), Some(json!({"path": file}))).await;
        assert!(statuses.contains(&status.as_u16()), "{file}: {status} {answer}");
    }
    // A full disk in the guest is told as that, and what was there stays.
    platform
        .shell(&id, "mkdir -p /root/small && mount -t tmpfs -o size=1m none /root/small && echo old > /root/small/f")
        .await;
    let form = reqwest::multipart::Form::new()
        .text("path", "/root/small/f")
        .part("file", reqwest::multipart::Part::bytes(content));
    let request =
        platform.http.post(format!("{}{}", platform.api, path("/files/write"))).header("X-API-Key", &platform.api_key);
    let full = request.multipart(form).send().await.unwrap();
    let (status, body) = (full.status(), full.json::<Value>().await.unwrap());
    assert_eq!((status.as_u16(), &body["error"]["details"]["where"]), (507, &json!("guest")), "{body}");
    assert_eq!(platform.shell(&id, "cat /root/small/f; ls -A /root/small").await, (0, "old\nf\n".to_owned()));

    // Streamed: start, output, exit.
    let mut socket = stream(&platform, &id).await;
    say(
        &mut socket,
        json!({"type": "start", "cmd": "sh", "args": ["-c", "echo one; sleep 0.2; echo two >&2; exit 5"]}),
    )
    .await;
    assert!(frame(&mut socket).await.unwrap()["pid"].as_u64().unwrap() > 0);
    assert_eq!(frame(&mut socket).await.unwrap(), json!({"type": "stdout", "data": "one\n"}));
    assert_eq!(frame(&mut socket).await.unwrap(), json!({"type": "stderr", "data": "two\n"}));
    assert_eq!(frame(&mut socket).await.unwrap(), json!({"type": "exit", "exit_code": 5}));
    assert_eq!(frame(&mut socket).await, None);

    // Nonsense is answered, a little of it is forgiven, and a lot is not.
    let mut socket = stream(&platform, &id).await;
    for nonsense in ["", "[]", "{\"type\":\"dance\"}", "{\"type\":\"start\"}"] {
        socket.send(Message::Text(nonsense.into())).await.unwrap();
        let error = frame(&mut socket).await.unwrap();
        assert_eq!(
            (&error["code"], &error["fatal"]),
            (&json!("invalid_request"), &json!(false)),
            "{nonsense}: {error}"
        );
    }
    say(&mut socket, json!({"type": "start", "cmd": "sleep", "args": ["600"]})).await;
    let pid = frame(&mut socket).await.unwrap()["pid"].as_u64().unwrap();
    say(&mut socket, json!({"type": "start", "cmd": "true"})).await;
    assert_eq!(frame(&mut socket).await.unwrap()["code"], "invalid_state");
    for _ in 0..20 {
        let _ = socket.send(Message::Text("{}".into())).await;
    }
    while frame(&mut socket).await.is_some() {}

    // The command goes on without its client, is listed, and is ended by its number.
    let (status, listed) = platform.call(Method::GET, &path("/processes"), None).await;
    let has = |listed: &Value| listed["processes"].as_array().unwrap().iter().any(|process| process["pid"] == pid);
    assert!(status == 200 && has(&listed), "{listed}");
    assert_eq!(
        platform.call(Method::DELETE, &path(&format!("/processes/{pid}")), None).await.0,
        StatusCode::NO_CONTENT
    );
    let (status, missing) = platform.call(Method::DELETE, &path("/processes/999999"), None).await;
    assert_eq!((status.as_u16(), missing["error"]["code"].as_str()), (404, Some("not_found")), "{missing}");

    // A client that takes nothing slows its own command down, and nobody else's.
    let mut slow = stream(&platform, &id).await;
    say(&mut slow, json!({"type": "start", "cmd": "sh", "args": ["-c", "head -c 200000000 /dev/zero | tr '\\0' y"]}))
        .await;
    assert!(frame(&mut slow).await.is_some());
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(platform.shell(&id, "echo meanwhile").await, (0, "meanwhile\n".to_owned()));
    drop(slow);

    // Whose key is revoked sees no more of a command that runs, within a minute, and is told why. The command goes on.
    let key = platform.wrenn(&["key", "create", "--name", "for a while", "--json"]);
    let key: Value = serde_json::from_slice(&key.stdout).unwrap_or_else(|_| panic!("{key:?}"));
    let mut watched = stream_by(&platform, &id, key["key"].as_str().unwrap()).await;
    let talk = "while :; do echo still; sleep 1; done";
    say(&mut watched, json!({"type": "start", "cmd": "sh", "args": ["-c", talk]})).await;
    let pid = frame(&mut watched).await.unwrap()["pid"].as_u64().unwrap();
    let revoked = platform.wrenn(&["key", "rm", key["id"].as_str().unwrap()]);
    assert!(revoked.status.success(), "{revoked:?}");
    let began = Instant::now();
    let code = loop {
        match tokio::time::timeout(Duration::from_secs(60), watched.next()).await.expect("an end in time") {
            Some(Ok(Message::Close(frame))) => break frame.map(|frame| u16::from(frame.code)),
            Some(Ok(_)) => assert!(began.elapsed() < Duration::from_secs(60), "it is still told"),
            other => panic!("the end says why: {other:?}"),
        }
    };
    assert_eq!(code, Some(4401));
    assert_eq!(platform.shell(&id, &format!("kill -0 {pid}")).await.0, 0, "the command goes on");

    let (status, console) = platform.call(Method::GET, &path("/console"), None).await;
    assert_eq!(status, 200, "{console}");
    platform.kill(&id).await;
    let (status, answer) = platform.call(Method::POST, &path("/exec"), Some(json!({"cmd": "true"}))).await;
    assert_eq!((status.as_u16(), answer["error"]["code"].as_str()), (409, Some("invalid_state")), "{answer}");
    assert_eq!(platform.finish(), Default::default());
}
