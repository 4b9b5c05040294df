//! Wrong requests in the raw: what no client library sends, written to the socket byte by byte.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::replica::{Replica, Who};

/// Status and body of the first answer to what is written; the body is read as far as it comes at once.
async fn raw(replica: &Replica, request: &[u8]) -> (u16, String) {
    let mut stream = TcpStream::connect(replica.url.trim_start_matches("http://")).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut text = String::new();
    let mut piece = vec![0; 65_536];
    while let Ok(Ok(read @ 1..)) = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut piece)).await {
        text.push_str(&String::from_utf8_lossy(&piece[..read]));
        let is_whole = text.split_once("\r\n\r\n").is_some_and(|(head, body)| {
            let length =
                head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ").map(str::to_owned));
            length.and_then(|length| length.parse::<usize>().ok()).is_some_and(|length| body.len() >= length)
        });
        if is_whole {
            break;
        }
    }
    let status = text.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or(0);
    (status, text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}

fn code(body: &str) -> String {
    let parsed: Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("no JSON: {body}"));
    parsed["error"]["code"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_odd_in_a_path_leads_to_another_route() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let sandbox = replica.sandbox(host).await;
    for (path, expected) in [
        ("/v1/sandboxes/".to_owned(), 404),
        (format!("/v1/sandboxes/{sandbox}/"), 404),
        (format!("/v1/sandboxes/{sandbox}%2Fconsole"), 400),
        (format!("/v1/sandboxes/{sandbox}%2F..%2F..%2Fhosts"), 400),
        (format!("/v1/sandboxes/{sandbox};x=y"), 400),
        (format!("/v1/sandboxes/{sandbox}%0a"), 400),
        (format!("/v1/sandboxes/%2573b{}", &sandbox.as_str()[2..]), 400),
        (format!("//v1//sandboxes/{sandbox}"), 404),
        (format!("/V1/sandboxes/{sandbox}"), 404),
        ("/v1/sandboxes/%00".to_owned(), 400),
    ] {
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {}\r\nConnection: close\r\n\r\n", replica.key);
        let (status, body) = raw(&replica, request.as_bytes()).await;
        assert_eq!(status, expected, "{path}: {body}");
        assert!(["not_found", "invalid_request"].contains(&code(&body).as_str()), "{path}: {body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn methods_that_a_route_has_not_are_refused_with_those_that_it_has() {
    let replica = Replica::start().await;
    for (method, path) in [
        ("OPTIONS", "/v1/sandboxes"),
        ("TRACE", "/v1/sandboxes"),
        ("PUT", "/v1/sandboxes"),
        ("CONNECT", "/v1/sandboxes"),
        ("PROPFIND", "/v1/sandboxes"),
        ("PATCH", "/v1/snapshots"),
        ("DELETE", "/v1/events/stream"),
    ] {
        let override_ = "X-HTTP-Method-Override: GET\r\n";
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {}\r\n{override_}Content-Length: 0\r\n\r\n",
            replica.key
        );
        let (status, body) = raw(&replica, request.as_bytes()).await;
        if method == "CONNECT" {
            assert!((400..500).contains(&status), "{method}: {status}");
            continue;
        }
        assert_eq!((status, code(&body).as_str()), (405, "method_not_allowed"), "{method} {path}");
    }
    // HEAD is a GET of which the body is kept back, as HTTP has it.
    let head = replica.as_team(Method::HEAD, "/v1/sandboxes", None).await;
    assert_eq!((head.status.as_u16(), &head.body), (200, &Value::String(String::new())));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_is_refused_before_it_is_read() {
    let replica = Replica::start().await;
    let head = |rest: &str| {
        format!(
            "POST /v1/sandboxes HTTP/1.1\r\nHost: x\r\nX-API-Key: {}\r\nContent-Type: application/json\r\n{rest}\r\n\r\n",
            replica.key
        )
    };
    // Nothing of the body is sent: whoever answers has not waited for it.
    for rest in ["Expect: 100-continue\r\nContent-Length: 99999999999", "Content-Length: 99999999999"] {
        let (status, body) = raw(&replica, head(rest).as_bytes()).await;
        assert_eq!((status, code(&body).as_str()), (413, "too_large"), "{rest}");
    }
    let many = format!("X-Long: {}", "y".repeat(40_000));
    let (status, body) = raw(&replica, head(&many).as_bytes()).await;
    assert_eq!((status, code(&body).as_str()), (431, "headers_too_large"));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_credentials_are_one_too_many() {
    let replica = Replica::start().await;
    let url = format!("{}/v1/sandboxes", replica.url);
    let both = replica.http.get(&url).bearer_auth(&replica.admin);
    assert_eq!(replica.send(Who::Key(&replica.key), both).await.error(), (400, "invalid_request"));
    let twice = replica.http.get(&url).header("X-API-Key", &replica.key);
    assert_eq!(replica.send(Who::Key(&replica.key), twice).await.error(), (400, "invalid_request"));
    // Addresses are written down by whatever stands between.
    let in_query = replica.http.get(format!("{url}?api_key={}", replica.key));
    assert_eq!(replica.send(Who::Nobody, in_query).await.error(), (401, "unauthorized"));
    // Nobody is another by saying so.
    let forged = replica.http.get(&url).header("X-Forwarded-For", "127.0.0.1").header("X-Forwarded-User", "admin");
    assert_eq!(replica.send(Who::Nobody, forged).await.error(), (401, "unauthorized"));
}

/// The rows of the published program's table, for the routes that there are.
#[tokio::test(flavor = "multi_thread")]
async fn each_route_refuses_as_published_clients_know_it() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let running = replica.sandbox(host).await;
    let paused = replica.sandbox(host).await;
    let ended = replica.sandbox(host).await;
    let states = format!(
        "update sandboxes set desired = 'paused', observed = 'paused' where id = '{paused}';
         update sandboxes set desired = 'killed', observed = 'killed', killed_at = now() where id = '{ended}';"
    );
    replica.database.sql(&states).await;
    let none = "sb0000000000000000000000";
    let exec = || Some(json!({"cmd": "true"}));
    let read = || Some(json!({"path": "/x"}));
    let table: Vec<(Method, String, Option<Value>, u16, &str)> = vec![
        (Method::POST, "/v1/capsules".into(), Some(json!({"template": "nothing"})), 404, "not_found"),
        (Method::POST, "/v1/capsules".into(), Some(json!({"memory_mb": 65536})), 503, "no_hosts_available"),
        (Method::GET, format!("/v1/capsules/{none}"), None, 404, "not_found"),
        (Method::DELETE, format!("/v1/capsules/{none}"), None, 404, "not_found"),
        (Method::POST, format!("/v1/capsules/{none}/pause"), None, 404, "not_found"),
        (Method::POST, format!("/v1/capsules/{ended}/pause"), None, 409, "invalid_state"),
        (Method::POST, format!("/v1/capsules/{none}/resume"), None, 404, "not_found"),
        (Method::POST, format!("/v1/capsules/{ended}/resume"), None, 409, "invalid_state"),
        (Method::POST, format!("/v1/capsules/{none}/ping"), None, 404, "not_found"),
        (Method::POST, format!("/v1/capsules/{paused}/ping"), None, 409, "invalid_state"),
        (Method::POST, format!("/v1/capsules/{none}/exec"), exec(), 404, "not_found"),
        (Method::POST, format!("/v1/capsules/{paused}/exec"), exec(), 409, "invalid_state"),
        (Method::POST, format!("/v1/capsules/{running}/exec"), exec(), 503, "host_unavailable"),
        (Method::GET, format!("/v1/capsules/{none}/processes"), None, 404, "not_found"),
        (Method::GET, format!("/v1/capsules/{paused}/processes"), None, 409, "invalid_state"),
        (Method::GET, format!("/v1/capsules/{running}/processes"), None, 503, "host_unavailable"),
        (Method::POST, format!("/v1/capsules/{none}/files/read"), read(), 404, "not_found"),
        (Method::POST, format!("/v1/capsules/{paused}/files/read"), read(), 409, "invalid_state"),
        (Method::POST, format!("/v1/capsules/{paused}/files/stream/read"), read(), 409, "invalid_state"),
        (Method::POST, "/v1/snapshots".into(), Some(json!({"sandbox_id": none})), 404, "not_found"),
        (Method::POST, "/v1/snapshots".into(), Some(json!({"sandbox_id": ended.as_str()})), 409, "invalid_state"),
        (
            Method::POST,
            "/v1/snapshots".into(),
            Some(json!({"sandbox_id": running.as_str(), "name": "minimal"})),
            409,
            "name_reserved",
        ),
        (Method::DELETE, "/v1/snapshots/nothing".into(), None, 404, "not_found"),
    ];
    for (method, path, body, status, expected) in table {
        let answer = replica.as_team(method.clone(), &path, body).await;
        assert_eq!(answer.error(), (status, expected), "{method} {path}");
    }
    let id = format!("host-{}", "0".repeat(25));
    for (method, path) in [(Method::GET, format!("/v1/hosts/{host}")), (Method::DELETE, format!("/v1/hosts/{host}"))] {
        let answer = replica.as_admin(method.clone(), &path, None).await;
        assert!(answer.status == 200 || answer.error() == (409, "host_has_sandboxes"), "{method} {path}");
    }
    let gone = replica.as_admin(Method::GET, &format!("/v1/hosts/{id}"), None).await;
    assert!([400, 404].contains(&gone.status.as_u16()), "{}", gone.body);
    let register = replica.call(Who::Nobody, Method::POST, "/v1/hosts/register", Some(json!({}))).await;
    assert!([400, 401].contains(&register.status.as_u16()), "{}", register.body);
    // Ended is ended, each time.
    for _ in 0..2 {
        assert_eq!(replica.as_team(Method::DELETE, &format!("/v1/capsules/{ended}"), None).await.status, 204);
    }
}
