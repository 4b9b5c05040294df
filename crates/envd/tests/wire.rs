//! What envd answers to tokens and bytes that are wrong: a clear refusal, at once, and it goes on serving.

mod guest;

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use guest::{Envd, JSON, SOON, START, STREAM, envelope};
use serde_json::{Value, json};
use sha2::Digest as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

async fn with_identity() -> Envd {
    let envd = Envd::start();
    let init = json!({"incarnation": "one", "accessToken": "secret", "controlToken": "host", "envVars": {"A": "b"}});
    let (status, headers, _) = envd.exchange("POST", "/init", &[], init.to_string()).await;
    assert_eq!((status.as_u16(), headers["x-envd-version"].to_str().unwrap()), (204, "0.6.13"));
    envd
}

#[tokio::test]
async fn every_route_but_health_asks_for_the_token() {
    let envd = with_identity().await;
    let routes = [
        ("GET", "/envs"),
        ("GET", "/metrics"),
        ("GET", "/files?path=/etc/hostname"),
        ("POST", "/files?path=/tmp/never"),
        ("POST", "/process.Process/List"),
        ("POST", "/filesystem.Filesystem/Stat"),
        ("POST", "/no.Service/Method"),
        ("GET", "/no/such/route"),
    ];
    let wrong: [&[(&str, &str)]; 7] = [
        &[],
        &[("x-access-token", "")],
        &[("x-access-token", "Secret")],
        &[("x-access-token", "secre")],
        &[("x-access-token", "host")],
        &[("authorization", "Bearer secret")],
        &[("x-access-token", "secret"), ("x-access-token", "secret")],
    ];
    for (method, route) in routes {
        for shown in wrong {
            let headers = [&JSON, shown].concat();
            let (status, _, body) = envd.exchange(method, route, &headers, "{}").await;
            assert_eq!(status, 401, "{method} {route} {shown:?}");
            let fault: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!((fault["code"].as_u64(), fault["message"].is_string()), (Some(401), true));
        }
    }
    assert!(!std::path::Path::new("/tmp/never").exists());
    assert_eq!(envd.exchange("GET", "/health", &[], "").await.0, 204);
    let (status, _, body) = envd.exchange("GET", "/envs", &[("x-access-token", "secret")], "").await;
    assert_eq!((status.as_u16(), serde_json::from_slice::<Value>(&body).unwrap()["A"].as_str()), (200, Some("b")));
    let (_, _, body) = envd.exchange("GET", "/metrics", &[("x-access-token", "secret")], "").await;
    assert!(serde_json::from_slice::<Value>(&body).unwrap()["mem_total"].as_u64() > Some(0));
}

#[tokio::test]
async fn control_routes_are_the_hosts() {
    let envd = with_identity().await;
    let init = json!({"incarnation": "two", "accessToken": "mine"}).to_string();
    for shown in [None, Some("secret"), Some("Host"), Some("")] {
        let headers: Vec<_> = shown.iter().map(|token| ("x-control-token", *token)).collect();
        for route in ["/init", "/init/held", "/snapshot/prepare"] {
            assert_eq!(envd.exchange("POST", route, &headers, init.clone()).await.0, 401, "{route} {shown:?}");
        }
    }
    let host = [("x-control-token", "host")];
    for body in ["", "[]", "{", "{}", r#"{"incarnation":"x","entropy":"!"}"#] {
        assert_eq!(envd.exchange("POST", "/init", &host, body).await.0, 400, "{body}");
    }
    let large = json!({"incarnation": "x", "envVars": {"A": "x".repeat(1 << 20)}}).to_string();
    assert_eq!(envd.exchange("POST", "/init", &host, large).await.0, 413);
    // Nothing of all that has changed who may come in; the right host has, and the old token is out.
    assert_eq!(envd.exchange("GET", "/envs", &[("x-access-token", "secret")], "").await.0, 200);
    assert_eq!(envd.exchange("POST", "/init", &host, init).await.0, 204);
    assert_eq!(envd.exchange("GET", "/envs", &[("x-access-token", "secret")], "").await.0, 401);
    assert_eq!(envd.exchange("GET", "/envs", &[("x-access-token", "mine")], "").await.0, 200);
    for method in ["GET", "PUT", "DELETE"] {
        assert!(envd.exchange(method, "/init", &host, "").await.0.is_client_error(), "{method}");
    }
}

#[tokio::test]
async fn a_signed_url_opens_one_file_for_one_purpose() {
    let envd = with_identity().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f").to_str().unwrap().to_owned();
    std::fs::write(&path, "content").unwrap();
    let sign = |text: String| format!("v1_{}", STANDARD_NO_PAD.encode(sha2::Sha256::digest(text.as_bytes())));
    let url = |path: &str, signature: &str, more: &str| {
        let query = url::form_urlencoded::Serializer::new(String::new())
            .extend_pairs([("path", path), ("signature", signature)])
            .finish();
        format!("/files?{query}{more}")
    };
    let good = sign(format!("{path}:read::secret"));
    let later = chrono::Utc::now().timestamp() + 60;
    let timed = sign(format!("{path}:read::secret:{later}"));
    for (url, status) in [
        (url(&path, &good, ""), 200),
        (url(&path, &timed, &format!("&signature_expiration={later}")), 200),
        (url(&path, &timed, &format!("&signature_expiration={}", later + 1)), 401),
        (url(&path, &good, "&username=root"), 401),
        (url("/etc/hostname", &good, ""), 401),
        (url(&path, &sign(format!("{path}:write::secret")), ""), 401),
        (url(&path, &sign(format!("{path}:read::wrong")), ""), 401),
        (url(&path, "", ""), 401),
    ] {
        assert_eq!(envd.exchange("GET", &url, &[], "").await.0, status, "{url}");
    }
    let expired = url(&path, &sign(format!("{path}:read::secret:5")), "&signature_expiration=5");
    let (status, _, body) = envd.exchange("GET", &expired, &[], "").await;
    let fault: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((status.as_u16(), fault), (401, json!({"code": 401, "message": "signature is already expired"})));
}

#[tokio::test]
async fn bad_envelopes_are_refused_and_nothing_runs() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("ran");
    let message = json!({"process": {"cmd": "touch", "args": [trace.to_str().unwrap()]}}).to_string();
    let good = envelope(0, message.as_bytes());
    let announced = |length: u32| [&[0], length.to_be_bytes().as_slice(), message.as_bytes()].concat();
    let bodies = [
        ("no message", Vec::new()),
        ("cut head", vec![0, 0, 0]),
        ("cut message", good[..good.len() - 3].to_vec()),
        ("endless length", announced(u32::MAX)),
        ("too large", announced(64 << 20)),
        ("two messages", [good.clone(), good.clone()].concat()),
        ("compressed without encoding", envelope(1, message.as_bytes())),
        ("no JSON", envelope(0, b"{")),
        ("wrong type", envelope(0, br#"{"process": 5}"#)),
        ("wrong field type", envelope(0, br#"{"process": {"cmd": ["a"]}}"#)),
        ("bad UTF-8", envelope(0, b"{\"process\": {\"cmd\": \"\xff\"}}")),
        ("deep", envelope(0, "[".repeat(100_000).as_bytes())),
    ];
    for (name, body) in bodies {
        let (status, _, answer) = envd.exchange("POST", START, &STREAM, body).await;
        let end: Value = if status == 200 {
            assert_eq!(answer[0], 2, "{name}: the only envelope is the last");
            serde_json::from_slice(&answer[5..]).unwrap()
        } else {
            json!({"error": serde_json::from_slice::<Value>(&answer).unwrap()})
        };
        let code = end["error"]["code"].as_str().unwrap_or_default();
        assert!(
            ["invalid_argument", "resource_exhausted", "unimplemented", "internal"].contains(&code),
            "{name}: {end}"
        );
        assert!(!trace.exists(), "{name}");
    }
    // Binary: wrong wire type, bad UTF-8 in a string, groups nested without end.
    for message in [&b"\x08\x01"[..], b"\x0a\x04\x0a\x02\xff\xfe", &b"\x0b".repeat(100_000)] {
        let headers = [("content-type", "application/connect+proto"), ("connect-protocol-version", "1")];
        let (_, _, answer) = envd.exchange("POST", START, &headers, envelope(0, message)).await;
        assert_eq!(answer[0], 2);
        let end: Value = serde_json::from_slice(&answer[5..]).unwrap();
        assert_eq!(end["error"]["code"], "invalid_argument", "{message:?}");
    }
    assert!(envd.resident_kib() < 24 * 1024, "{} KiB", envd.resident_kib());
    // Unknown fields are for newer clients.
    let newer = json!({"process": {"cmd": "touch", "args": [trace.to_str().unwrap()], "later": 1}, "newer": [{}]});
    assert_eq!(envd.stream(START, &[], newer).await.outcome().await.exit_code(), 0);
    assert!(trace.exists());
}

#[tokio::test]
async fn bodies_are_refused_before_they_fill_the_memory() {
    let envd = Envd::start();
    let announced = "x".repeat(64 << 20);
    let large = (0..40).map(|n| {
        let (path, headers) = if n % 2 == 0 { (START, &STREAM) } else { ("/process.Process/SendInput", &JSON) };
        let asked = guest::request("POST", path, headers, envelope(0, &announced.as_bytes()[..4 << 20]));
        let envd = &envd;
        async move { timeout(SOON, envd.connection().await.send_request(asked)).await.map(drop) }
    });
    // A refusal may come before all is sent, and then break the sending.
    for (path, headers) in [(START, &STREAM), ("/process.Process/List", &JSON)] {
        let mut connection = envd.connection().await;
        let asked = guest::request("POST", path, headers, envelope(0, announced.as_bytes()));
        if let Ok(answer) = timeout(SOON, connection.send_request(asked)).await.unwrap() {
            assert!([200, 400, 413, 429].contains(&answer.status().as_u16()), "{path}: {}", answer.status());
        }
    }
    assert!(envd.resident_kib() < 40 * 1024, "{} KiB", envd.resident_kib());
    assert!(futures::future::join_all(large).await.iter().all(Result::is_ok));
    assert!(envd.resident_kib() < 96 * 1024, "{} KiB", envd.resident_kib());
    assert_eq!(envd.sh("echo well").await.text(), "well\n");
}

#[tokio::test]
async fn pages_may_read_every_answer_that_is_not_the_hosts() {
    let envd = with_identity().await;
    let token = ("x-access-token", "secret");
    for (path, headers, status) in [
        ("/health", &[][..], 204),
        ("/envs", &[], 401),
        ("/envs", &[token], 200),
        ("/metrics", &[token], 200),
        ("/no.Service/Method", &[], 401),
    ] {
        for origin in [None, Some(("origin", "https://page.test"))] {
            let asked = headers.iter().copied().chain(origin).collect::<Vec<_>>();
            let (answered, headers, _) = envd.exchange("GET", path, &asked, "").await;
            assert_eq!(answered, status, "{path}");
            let allowed = headers.get("access-control-allow-origin").map(|allowed| allowed.as_bytes());
            assert_eq!(allowed, origin.map(|_| &b"*"[..]), "{path}");
        }
    }
}

#[tokio::test]
async fn the_host_is_heard_when_all_places_are_taken() {
    // This test has more than a thousand connections of its own.
    envd::process::spawn::raise_open_files();
    let envd = with_identity().await;
    let token = ("x-access-token", "secret");
    let mut first = envd.stream(START, &[token], json!({"process": {"cmd": "sleep", "args": ["1000"]}})).await;
    let pid = first.pid().await;
    let streams = (0..1062).map(|_| async {
        let headers = [&STREAM[..], &[token]].concat();
        let asked = json!({"process": {"pid": pid}}).to_string();
        envd.ask(guest::request("POST", guest::CONNECT, &headers, envelope(0, asked.as_bytes()))).await
    });
    let streams = futures::future::join_all(streams).await;
    let served = streams.iter().filter(|answer| answer.status() == 200).count();
    assert!((1000..=1024).contains(&served), "{served}");
    assert!(streams.iter().all(|answer| [200, 503].contains(&answer.status().as_u16())));
    let init = json!({"incarnation": "two", "accessToken": "secret", "controlToken": "host"}).to_string();
    assert_eq!(envd.exchange("GET", "/envs", &[token], "").await.0, 503);
    assert_eq!(envd.exchange("GET", "/health", &[], "").await.0, 204);
    assert_eq!(envd.exchange("POST", "/snapshot/prepare", &[("x-control-token", "host")], "").await.0, 204);
    assert_eq!(envd.exchange("POST", "/init", &[("x-control-token", "host")], init).await.0, 204);
    // The restore has reset them all.
    guest::until("there is room", async || envd.exchange("GET", "/envs", &[token], "").await.0 == 200).await;
    let kill = json!({"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"}).to_string();
    let headers = [&JSON[..], &[token]].concat();
    assert_eq!(envd.exchange("POST", "/process.Process/SendSignal", &headers, kill).await.0, 200);
}

#[tokio::test]
async fn unary_calls_check_kind_and_size() {
    let envd = Envd::start();
    let list = "/process.Process/List";
    for (method, path, headers, body, statuses) in [
        ("POST", list, &JSON[..], "{}".to_owned(), &[200][..]),
        ("GET", list, &JSON, String::new(), &[405]),
        ("POST", list, &[("content-type", "text/plain")], "{}".to_owned(), &[415]),
        ("POST", list, &JSON, "{".to_owned(), &[400]),
        ("POST", list, &JSON, "[1]".to_owned(), &[400]),
        ("POST", "/process.Process/Nothing", &JSON, "{}".to_owned(), &[404, 501]),
        ("POST", "/no.Service/Nothing", &JSON, "{}".to_owned(), &[404, 501]),
        ("POST", list, &[JSON[0], JSON[1], ("content-encoding", "br")], "{}".to_owned(), &[501, 415]),
        ("POST", list, &[JSON[0], JSON[1], ("connect-timeout-ms", "-1")], "{}".to_owned(), &[400]),
        ("POST", list, &[JSON[0], JSON[1], ("connect-timeout-ms", "12345678901")], "{}".to_owned(), &[400]),
        ("POST", list, &[JSON[0], JSON[1], ("connect-timeout-ms", "soon")], "{}".to_owned(), &[400]),
        ("POST", list, &[JSON[0], ("connect-protocol-version", "2")], "{}".to_owned(), &[400]),
        ("POST", "/process.Process/SendInput", &JSON, format!("{{\"x\":\"{}\"}}", "y".repeat(5 << 20)), &[429, 413]),
    ] {
        let (status, _, body) = envd.exchange(method, path, headers, body).await;
        assert!(statuses.contains(&status.as_u16()), "{method} {path} {headers:?}: {status} {body:?}");
    }
}

#[tokio::test]
async fn bytes_that_are_no_http_end_their_own_connection_only() {
    let envd = Envd::start();
    let headers = "a: b\r\n".repeat(200);
    for (name, sent) in [
        ("no HTTP", "hello\r\n\r\n".to_owned()),
        ("TLS", "\u{16}\u{3}\u{1}\r\n\r\n".to_owned()),
        ("many headers", format!("GET /health HTTP/1.1\r\nhost: x\r\n{headers}\r\n")),
        ("large header", format!("GET /health HTTP/1.1\r\nhost: x\r\na: {}\r\n\r\n", "b".repeat(200_000))),
        (
            "two lengths",
            "POST /init HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab".to_owned(),
        ),
    ] {
        let mut stream = TcpStream::connect(envd.address()).await.unwrap();
        // It may be closed before all is sent.
        let _ = stream.write_all(sent.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = timeout(SOON, stream.read_to_end(&mut answer)).await.expect(name);
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{name}: {answer}");
    }
    let mut half = TcpStream::connect(envd.address()).await.unwrap();
    half.write_all(b"GET /hea").await.unwrap();
    assert_eq!(timeout(Duration::from_secs(5), envd.exchange("GET", "/health", &[], "")).await.unwrap().0, 204);
}
