//! Wrong requests on every route: refused in one shape, with a code and a field, and nothing is changed by them.

mod replica;

use std::time::Duration;

use control_plane::http::access::TABLE;
use replica::{Replica, Who};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Routes that take a JSON object, with a body that is right but for what does not exist.
const JSON_ROUTES: [(&str, &str); 13] = [
    ("/v1/auth/login", "{\"email\":\"a\",\"password\":\"b\"}"),
    ("/v1/hosts", "{\"type\":\"regular\"}"),
    ("/v1/hosts/register", "{}"),
    ("/v1/sandboxes", "{}"),
    ("/v1/admin/capsules", "{}"),
    ("/v1/sandboxes/sb0000000000000000000000/exec", "{\"cmd\":\"true\"}"),
    ("/v1/sandboxes/sb0000000000000000000000/files/read", "{\"path\":\"/x\"}"),
    ("/v1/sandboxes/sb0000000000000000000000/files/stream/read", "{\"path\":\"/x\"}"),
    ("/v1/sandboxes/sb0000000000000000000000/files/list", "{\"path\":\"/x\"}"),
    ("/v1/sandboxes/sb0000000000000000000000/files/stat", "{\"path\":\"/x\"}"),
    ("/v1/sandboxes/sb0000000000000000000000/files/mkdir", "{\"path\":\"/x\"}"),
    ("/v1/sandboxes/sb0000000000000000000000/files/move", "{\"from\":\"/x\",\"to\":\"/y\"}"),
    ("/v1/sandboxes/sb0000000000000000000000/files/remove", "{\"path\":\"/x\"}"),
];

fn who<'a>(replica: &'a Replica, path: &str) -> Who<'a> {
    let of_a_person = ["/v1/hosts", "/v1/me", "/v1/teams", "/v1/admin"].iter().any(|prefix| path.starts_with(prefix));
    if of_a_person { Who::Bearer(&replica.admin) } else { Who::Key(&replica.key) }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_one_json_object_is_refused_everywhere() {
    let replica = Replica::start().await;
    let deep = format!("{{\"x\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let large = format!("{{\"x\":\"{}\"}}", "y".repeat(1 << 20));
    for (path, good) in JSON_ROUTES {
        let send = |body: &str, kind: Option<&str>, encoding: Option<&str>| {
            let mut request = replica.http.post(format!("{}{path}", replica.url)).body(body.to_owned());
            for (name, value) in [("content-type", kind), ("content-encoding", encoding)] {
                if let Some(value) = value {
                    request = request.header(name, value);
                }
            }
            replica.send(who(&replica, path), request)
        };
        for wrong in [
            "",
            "null",
            "[]",
            "\"x\"",
            "{}{}",
            "{} x",
            "\u{feff}{}",
            "{\"a\":1,\"a\":2}",
            "{\"a\":NaN}",
            "{",
            "{\"a\":\"\\u0000\"}",
            &deep,
        ] {
            let answer = send(wrong, Some("application/json"), None).await;
            assert_eq!(answer.error(), (400, "invalid_request"), "{path} {}", &wrong[..wrong.len().min(30)]);
        }
        assert_eq!(send(&large, Some("application/json"), None).await.error(), (413, "too_large"), "{path}");
        for kind in [
            None,
            Some("text/plain"),
            Some("application/x-www-form-urlencoded"),
            Some("multipart/form-data; boundary=x"),
        ] {
            assert_eq!(send(good, kind, None).await.error(), (415, "unsupported_media_type"), "{path} {kind:?}");
        }
        assert_eq!(
            send(good, Some("application/json"), Some("gzip")).await.error(),
            (415, "unsupported_media_type"),
            "{path}"
        );
        assert_ne!(send(good, Some("application/json; charset=utf-8"), None).await.status, 415, "{path}");
    }
}

/// By hand, because clients of their own accord hide what became of a connection.
#[tokio::test(flavor = "multi_thread")]
async fn who_still_sends_when_it_is_refused_hears_the_refusal_and_keeps_the_connection() {
    const BODY_BYTES: usize = 8 << 20;
    let replica = Replica::start().await;
    let mut connection = TcpStream::connect(replica.url.trim_start_matches("http://")).await.unwrap();
    let chunk = vec![b'x'; 64 << 10];
    for (path, wanted) in [("/v1/sandboxes", "413 "), ("/v1/nowhere", "404 "), ("/v1/sandboxes", "413 ")] {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\ncontent-type: application/json\r\ncontent-length: {BODY_BYTES}\r\n\r\n",
            replica.key
        );
        connection.write_all(head.as_bytes()).await.unwrap();
        // Long enough for the refusal to be on its way before most of the body is.
        for number in 0..BODY_BYTES / chunk.len() {
            if number % 32 == 0 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            connection.write_all(&chunk).await.unwrap();
        }
        let mut answer = vec![0; 64 << 10];
        let length = connection.read(&mut answer).await.unwrap();
        let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
        assert!(answer.starts_with(&format!("HTTP/1.1 {wanted}")), "{path}: {answer}");
        assert!(!answer.contains("connection: close"), "{path}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn values_out_of_range_are_named_with_their_range() {
    let replica = Replica::start().await;
    replica.host(4096).await;
    let wrong = [
        ("vcpus", json!(0)),
        ("vcpus", json!(-1)),
        ("vcpus", json!(1.5)),
        ("vcpus", json!("2")),
        ("vcpus", json!(1_000_000_000)),
        ("vcpus", json!(u64::MAX)),
        ("memory_mb", json!(0)),
        ("memory_mb", json!(513)),
        ("memory_mb", json!(10 * 1024 * 1024)),
        ("disk_size_mb", json!(1)),
        ("timeout_sec", json!(-1)),
        ("timeout_sec", json!(1i64 << 31)),
        ("timeout_sec", json!(i64::MAX)),
        ("idle_timeout_sec", json!(-1)),
        ("idle_timeout_sec", json!(1)),
        ("idle_timeout_sec", json!(59)),
        ("idle_timeout_sec", json!(365 * 86_400 + 1)),
        ("idle_timeout_sec", json!("60")),
        ("idle_timeout_sec", json!(60.5)),
        ("template", json!("")),
        ("template", json!("../../etc")),
        ("template", json!("ä")),
        ("template", json!("x".repeat(200))),
        ("metadata", json!({"a": "x".repeat(257)})),
        ("metadata", json!({"": "x"})),
        ("metadata", json!({"a\nb": "x"})),
        ("metadata", json!({"a": 1})),
        ("envs", json!({"A=B": "x"})),
        ("envs", json!({"A\nB": "x"})),
        ("envs", json!({"A": "x".repeat(40_000)})),
    ];
    for (field, value) in wrong {
        let said: String = value.to_string().chars().take(40).collect();
        let answer = replica.as_team(Method::POST, "/v1/sandboxes", Some(json!({ field: value }))).await;
        assert_eq!(answer.error(), (400, "invalid_request"), "{field} {said}");
        let named = answer.body["error"]["details"]["field"].as_str().unwrap();
        assert!(named.starts_with(field), "{field} {said} is told as {named}");
    }
    let range = replica.as_team(Method::POST, "/v1/sandboxes", Some(json!({"vcpus": 0}))).await.body;
    assert!(range["error"]["details"]["min"].is_number() && range["error"]["details"]["max"].is_number(), "{range}");
    for wait in ["-1", "121", "x", "1.5", "99999999999999999999"] {
        let answer = replica.as_team(Method::POST, &format!("/v1/sandboxes?wait_sec={wait}"), Some(json!({}))).await;
        assert_eq!(answer.error(), (400, "invalid_request"), "{wait}");
    }
    // What only a request of ours could mean is ignored, never stored.
    let answer = replica
        .as_team(
            Method::POST,
            "/v1/sandboxes?wait_sec=0",
            Some(json!({"team_id": "x", "host_id": "y", "is_admin": true, "status": "killed"})),
        )
        .await;
    assert_eq!(answer.status, 202, "{}", answer.body);
    assert_eq!(answer.body["status"], "starting");
    let rows = replica.database.sql("select count(*) from sandboxes").await;
    assert_eq!(rows.trim(), "1", "refused creates wrote nothing");
    for (path, body, field) in [
        ("/v1/hosts", json!({"type": "rented"}), "type"),
        ("/v1/hosts", json!({"type": "BYOC"}), "type"),
        ("/v1/hosts", json!({"type": "byoc"}), "team_id"),
        ("/v1/hosts", json!({"type": "byoc", "team_id": ""}), "team_id"),
        ("/v1/hosts", json!({"type": "byoc", "team_id": "team-x"}), "team_id"),
        ("/v1/hosts", json!({"type": "byoc", "team_id": 7}), "team_id"),
        ("/v1/hosts", json!({"type": "regular", "team_id": Replica::no_team()}), "team_id"),
        ("/v1/hosts", json!({"type": "regular", "provider": "x".repeat(200)}), "provider"),
        ("/v1/hosts", json!({}), "type"),
    ] {
        let answer = replica.as_admin(Method::POST, path, Some(body)).await;
        assert_eq!((answer.error().0, answer.body["error"]["code"].as_str()), (400, Some("invalid_request")), "{path}");
        assert!(answer.body["error"]["message"].as_str().unwrap().contains(field), "{}", answer.body);
    }
    for body in [json!({}), json!({"enabled": "yes"}), json!({"enabled": false}), json!({"enabled": null})] {
        let path = format!("/v1/admin/teams/{}/byoc", Replica::no_team());
        let answer = replica.as_admin(Method::PUT, &path, Some(body)).await;
        assert_eq!(answer.error(), (400, "invalid_request"));
        assert!(answer.body["error"]["message"].as_str().unwrap().contains("enabled"), "{}", answer.body);
    }
    for name in ["", " ", "a\u{202e}b", "a\nb", &"x".repeat(129)] {
        let answer = replica.as_team(Method::POST, "/v1/api-keys", Some(json!({ "name": name }))).await;
        assert_eq!(answer.error(), (400, "invalid_request"), "{name:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn builds_are_understood_before_anything_is_made() {
    let replica = Replica::start().await;
    let config = |name: &str, value: Value| {
        let mut config = json!({"name": "x", "recipe": ["RUN true"]});
        config[name] = value;
        config
    };
    for (body, field) in [
        (json!({}), "name"),
        (json!({"name": "x"}), "recipe"),
        (config("name", json!("a b")), "name"),
        (config("name", json!("")), "name"),
        (config("base_template", json!("../x")), "base_template"),
        (config("recipe", json!([])), "recipe"),
        (config("recipe", json!("RUN true")), "recipe"),
        (config("recipe", json!(["RUN true", "EAT it"])), "recipe[1]"),
        (config("recipe", json!(vec!["RUN true"; 257])), "recipe"),
        (config("recipe", json!(["COPY a b"])), "archive"),
        (config("recipe", json!(["COPY ../a b"])), "recipe[0]"),
        (config("recipe", json!(["USER a;b"])), "recipe[0]"),
        (config("healthcheck", json!("--retries=x true")), "healthcheck"),
        (config("healthcheck", json!(7)), "healthcheck"),
        (config("vcpus", json!(0)), "vcpus"),
        (config("memory_mb", json!(513)), "memory_mb"),
        (config("disk_size_mb", json!(1)), "disk_size_mb"),
    ] {
        let answer = replica.as_admin(Method::POST, "/v1/admin/builds", Some(body.clone())).await;
        assert_eq!(answer.error(), (400, "invalid_request"), "{body}");
        assert!(answer.body.to_string().contains(field), "{field}: {}", answer.body);
        let form = reqwest::multipart::Form::new().text("config", body.to_string());
        let request = replica.http.post(format!("{}/v1/admin/builds", replica.url)).multipart(form);
        let answer = replica.send(Who::Bearer(&replica.admin), request).await;
        assert_eq!(answer.error(), (400, "invalid_request"), "{body} in a form");
    }
    let good = config("vcpus", json!(1)).to_string();
    let part = |bytes: Vec<u8>| reqwest::multipart::Part::bytes(bytes).file_name("x");
    let zip = [b"PK\x03\x04".as_slice(), &[0; 3_000_000]].concat();
    let large = [b"\x1f\x8b".as_slice(), &vec![0; (100 << 20) + 1]].concat();
    let forms = [
        (vec![("archive", part(zip.clone()))], (400, "invalid_request")),
        (vec![("config", part(b"{".to_vec()))], (400, "invalid_request")),
        (vec![("config", part(good.clone().into())), ("config", part(good.clone().into()))], (400, "invalid_request")),
        (
            vec![("config", part(good.clone().into())), ("archive", part(b"#!/bin/sh".to_vec()))],
            (400, "invalid_request"),
        ),
        (vec![("archive", part(zip.clone())), ("archive", part(zip.clone()))], (400, "invalid_request")),
        (vec![("archive", part(zip)), ("config", part(b"{}".to_vec()))], (400, "invalid_request")),
        (vec![("config", part(good.into())), ("archive", part(large))], (413, "too_large")),
    ];
    for (number, (fields, wanted)) in forms.into_iter().enumerate() {
        let form = fields.into_iter().fold(reqwest::multipart::Form::new(), |form, (name, part)| form.part(name, part));
        let request = replica.http.post(format!("{}/v1/admin/builds", replica.url)).multipart(form);
        let answer = replica.send(Who::Bearer(&replica.admin), request).await;
        assert_eq!(answer.error(), wanted, "form {number}: {}", answer.body);
    }
    let rows =
        replica.database.sql("select (select count(*) from builds) + (select count(*) from build_archives)").await;
    assert_eq!(rows.trim(), "0", "what was refused has left nothing");
    // As many as may wait: nobody answers for the host, so none of them ends.
    replica.host(65_536).await;
    let mut statuses = Vec::new();
    for number in 0..33 {
        let body = json!({"name": format!("b{number}"), "recipe": ["RUN true"]});
        statuses.push(replica.as_admin(Method::POST, "/v1/admin/builds", Some(body)).await);
    }
    assert!(statuses[..32].iter().all(|answer| answer.status == 201));
    assert_eq!(statuses[32].error(), (429, "quota_exceeded"), "{}", statuses[32].body);
    // A base with memory has a shape; a name that the team has given is not to be had.
    let (platform, host) =
        (replica.serving.app.store.platform_team().await.unwrap().unwrap(), replica.host(4096).await);
    let kept = format!(
        "insert into snapshots (id, team_id, name, sandbox_id, host_id, template, vcpus, memory_mib, disk_mib, default_user, state)
         values (gen_random_uuid(), '{}', 'kept', 'sb', '{}', 'minimal', 2, 1024, 5120, '', 'ready')",
        platform.0, host.0
    );
    replica.database.sql(&kept.replace("'sb'", "'sb0000000000000000000000'")).await;
    for (body, wanted) in [
        (json!({"name": "x", "base_template": "kept", "vcpus": 1, "recipe": ["RUN true"]}), (400, "invalid_request")),
        (json!({"name": "kept", "recipe": ["RUN true"]}), (409, "template_name_taken")),
    ] {
        assert_eq!(replica.as_admin(Method::POST, "/v1/admin/builds", Some(body)).await.error(), wanted);
    }
    let reserved = json!({"name": "minimal", "recipe": ["RUN true"]});
    let refused = replica.as_admin(Method::POST, "/v1/admin/builds", Some(reserved)).await;
    assert_eq!(refused.error(), (409, "name_reserved"));
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_ids_methods_and_addresses_lead_nowhere() {
    let replica = Replica::start().await;
    let ids = [
        "..",
        "%2e%2e",
        "%00",
        "SB0000000000000000000000",
        "sb-000000000000000000000",
        "sb00000000000000000000000",
        "usr-1",
        "%2F",
        "sb0000000000000000000000%0a",
        "a;b",
        "%ff",
    ];
    let long = "x".repeat(2000);
    for (method, route, _) in TABLE.iter().filter(|(_, route, _)| route.contains("{id}")) {
        let method: Method = method.parse().unwrap();
        for id in ids.into_iter().chain([long.as_str()]) {
            let path = route
                .replace("{id}", id)
                .replace("{selector}", "1")
                .replace("{tag}", "gpu")
                .replace("{user_id}", id)
                .replace("{invitation_id}", id);
            let answer = replica.call(who(&replica, route), method.clone(), &path, Some(json!({}))).await;
            let allowed = matches!(answer.status.as_u16(), 400 | 401 | 404 | 405 | 415);
            assert!(allowed, "{method} {path}: {} {}", answer.status, answer.body);
            answer.error();
        }
    }
    for path in [
        "/nothing",
        "/v1",
        "/v1/",
        "//v1//sandboxes",
        "/v1/sandboxes/../hosts",
        "/v2/sandboxes",
        "/%76%31/sandboxes/x/y",
    ] {
        let answer = replica.as_team(Method::GET, path, None).await;
        assert!(matches!(answer.error(), (404, "not_found")) || answer.status == 403, "{path}: {}", answer.body);
    }
    for (method, path) in [
        (Method::PUT, "/v1/sandboxes"),
        (Method::PUT, "/v1/sandboxes/sb0000000000000000000000"),
        (Method::DELETE, "/health"),
        (Method::TRACE, "/v1/sandboxes"),
    ] {
        let answer = replica.as_team(method.clone(), path, None).await;
        assert_eq!(answer.error(), (405, "method_not_allowed"), "{method} {path}");
        assert!(answer.headers.contains_key("allow"), "{method} {path}");
    }
    let answer = replica.as_team(Method::GET, &format!("/v1/sandboxes?x={}", "y".repeat(9000)), None).await;
    assert_eq!(answer.error(), (431, "headers_too_large"));
    let mut request = replica.http.get(format!("{}/v1/sandboxes", replica.url));
    for n in 0..120 {
        request = request.header(format!("x-{n}"), "y");
    }
    assert_eq!(replica.send(Who::Key(&replica.key), request).await.error(), (431, "headers_too_large"));
    let both = replica.http.get(format!("{}/v1/sandboxes", replica.url)).bearer_auth(&replica.admin);
    assert_eq!(replica.send(Who::Key(&replica.key), both).await.error(), (400, "invalid_request"));
}

/// A sandbox whose host does not answer: every use of it is refused as that, and its state stays what it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_not_there_is_told_as_that() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let sandbox = replica.sandbox(host).await;
    let path = |rest: &str| format!("/v1/sandboxes/{sandbox}{rest}");
    for (method, rest, body) in [
        (Method::POST, "/exec", Some(json!({"cmd": "true"}))),
        (Method::POST, "/exec", Some(json!({"cmd": "true", "background": true}))),
        (Method::POST, "/files/read", Some(json!({"path": "/x"}))),
        (Method::POST, "/files/list", Some(json!({"path": "/x"}))),
        (Method::POST, "/files/remove", Some(json!({"path": "/x", "user": "user"}))),
        (Method::GET, "/files/content?path=/x", None),
        (Method::PUT, "/files/content?path=/x", None),
        (Method::GET, "/metrics", None),
        (Method::GET, "/processes", None),
        (Method::DELETE, "/processes/1", None),
        (Method::GET, "/console", None),
    ] {
        let answer = replica.as_team(method, &path(rest), body).await;
        assert_eq!(answer.error(), (503, "host_unavailable"), "{rest}");
        assert!(answer.headers.contains_key("retry-after"), "{rest}");
    }
    let form = reqwest::multipart::Form::new().text("path", "/tmp/x").text("file", "x");
    let request = replica.http.post(format!("{}{}", replica.url, path("/files/write"))).multipart(form);
    assert_eq!(replica.send(Who::Key(&replica.key), request).await.error(), (503, "host_unavailable"));
    let wrong_form = reqwest::multipart::Form::new().text("file", "x");
    let request = replica.http.post(format!("{}{}", replica.url, path("/files/write"))).multipart(wrong_form);
    assert_eq!(replica.send(Who::Key(&replica.key), request).await.error(), (400, "invalid_request"));
    replica.database.sql("update hosts set last_heartbeat_at = now() - interval '10 minutes'").await;
    let shown = replica.as_team(Method::GET, &path(""), None).await.body;
    assert_eq!((&shown["status"], &shown["reason"]), (&json!("running"), &json!("host_silent")), "{shown}");
    // The wish to end it stands until the host is back.
    let killed = replica.as_team(Method::DELETE, &path("?wait_sec=1"), None).await;
    assert_eq!((killed.status.as_u16(), &killed.body["status"]), (202, &json!("stopping")), "{}", killed.body);
    let exec = replica.as_team(Method::POST, &path("/exec"), Some(json!({"cmd": "true"}))).await;
    assert_eq!(exec.error(), (409, "invalid_state"));
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_are_checked_before_anything_is_asked() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let sandbox = replica.sandbox(host).await;
    let many: Vec<Value> = (0..2000).map(|_| json!("x")).collect();
    for (body, field) in [
        (json!({}), "cmd"),
        (json!({"cmd": ""}), "cmd"),
        (json!({"cmd": 1}), "cmd"),
        (json!({"cmd": "x".repeat(70_000)}), "args"),
        (json!({"cmd": "x", "args": many}), "args"),
        (json!({"cmd": "x", "timeout_sec": -1}), "timeout_sec"),
        (json!({"cmd": "x", "timeout_sec": 100_000}), "timeout_sec"),
        (json!({"cmd": "x", "envs": {"A=": "b"}}), "envs"),
        (json!({"cmd": "x", "background": "yes"}), "background"),
        (json!({"cmd": "x", "background": true, "timeout_sec": 10_000_000}), "timeout_sec"),
        (json!({"cmd": "x", "background": true, "tag": ""}), "tag"),
        (json!({"cmd": "x", "background": true, "tag": "4711"}), "tag"),
        (json!({"cmd": "x", "tag": "a/b"}), "tag"),
    ] {
        let answer = replica.as_team(Method::POST, &format!("/v1/sandboxes/{sandbox}/exec"), Some(body)).await;
        assert_eq!(answer.error(), (400, "invalid_request"), "{field}: {}", answer.body);
        assert!(answer.body["error"]["message"].as_str().unwrap().contains(field), "{field}: {}", answer.body);
    }
    for body in [
        json!({"timeout_sec": -1}),
        json!({"timeout_sec": 1e12}),
        json!({"on_timeout": "snooze"}),
        json!({"idle_timeout_sec": 59}),
        json!({"idle_timeout_sec": -60}),
        json!({"idle_timeout_sec": i64::MAX}),
    ] {
        for route in ["timeout", "fork"] {
            let path = format!("/v1/sandboxes/{sandbox}/{route}");
            let answer = replica.as_team(Method::POST, &path, Some(body.clone())).await;
            assert_eq!(answer.error(), (400, "invalid_request"), "{route}: {}", answer.body);
        }
    }
    for path in ["", &"x".repeat(5000)] {
        let answer = replica
            .as_team(Method::POST, &format!("/v1/sandboxes/{sandbox}/files/read"), Some(json!({ "path": path })))
            .await;
        assert_eq!(answer.error(), (400, "invalid_request"));
    }
    let long = "x".repeat(5000);
    for (route, body, field) in [
        ("list", json!({}), "path"),
        ("list", json!({"path": ""}), "path"),
        ("list", json!({"path": 1}), "path"),
        ("list", json!({"path": "/", "depth": -1}), "depth"),
        ("list", json!({"path": "/", "depth": "2"}), "depth"),
        ("list", json!({"path": "/", "depth": 1u64 << 32}), "depth"),
        ("list", json!({"path": "/", "user": "a:b"}), "user"),
        ("stat", json!({ "path": long }), "path"),
        ("mkdir", json!({"path": "/x", "user": "x".repeat(129)}), "user"),
        ("mkdir", json!({"path": "/x", "user": "a\nb"}), "user"),
        ("move", json!({"from": "/x"}), "to"),
        ("move", json!({"from": "/x", "to": ""}), "to"),
        ("move", json!({"from": "", "to": "/x"}), "from"),
        ("remove", json!({"path": ""}), "path"),
    ] {
        let path = format!("/v1/sandboxes/{sandbox}/files/{route}");
        let answer = replica.as_team(Method::POST, &path, Some(body.clone())).await;
        assert_eq!(answer.error(), (400, "invalid_request"), "{route} {body}");
        assert!(answer.body["error"]["message"].as_str().unwrap().contains(field), "{route} {body}: {}", answer.body);
    }
    for method in [Method::GET, Method::PUT] {
        for query in ["", "?path=", "?path=%00", &format!("?path={long}"), "?path=/x&user=a:b", "?path=/x&path=/y"] {
            let path = format!("/v1/sandboxes/{sandbox}/files/content{query}");
            let answer = replica.as_team(method.clone(), &path, None).await;
            assert_eq!(answer.error(), (400, "invalid_request"), "{method} {query}");
        }
    }
    for range in ["", "30d", "1H", "600", "1h,2h"] {
        let path = format!("/v1/sandboxes/{sandbox}/metrics?range={range}");
        assert_eq!(replica.as_team(Method::GET, &path, None).await.error(), (400, "invalid_request"), "{range}");
    }
    for signal in ["KILL;rm", "-1", "SIGSTOP"] {
        let answer = replica
            .as_team(Method::DELETE, &format!("/v1/sandboxes/{sandbox}/processes/1?signal={signal}"), None)
            .await;
        assert_eq!(answer.error(), (400, "invalid_request"), "{signal}");
    }
}

/// Somebody believes in it. The value may be a secret.
#[test]
fn a_variable_that_looks_like_a_setting_and_is_none_is_named() {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_wrenn-cp"));
    command.env("DATABASE_URL", "postgres://x@127.0.0.1:1/x").env("WRENN_LOGG", "hush").env("WRENN_TEST_ANY", "1");
    let output = command.env_remove("WRENN_LOG").arg("check").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("WRENN_LOGG, and there is no such setting; is WRENN_LOG meant?"), "{said}");
    assert!(!said.contains("hush") && !said.contains("WRENN_TEST_ANY"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_team_has_used_is_asked_by_ranges_that_are_known() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let sandbox = replica.sandbox(host).await;
    for path in [
        "/stats?range=",
        "/stats?range=2h",
        "/stats?range=30D",
        "/usage?from=2026-01-01&to=2025-01-01",
        "/usage?from=2020-01-01",
        "/usage?from=yesterday",
        "/usage?to=0000-00-00",
        "/usage?to=99999-01-01",
        "/usage?from=2026-02-30",
        "/usage?from=2026-01-01%27--",
    ] {
        for name in ["sandboxes", "capsules"] {
            let answer = replica.as_team(Method::GET, &format!("/v1/{name}{path}"), None).await;
            assert_eq!(answer.error(), (400, "invalid_request"), "{name}{path}");
        }
    }
    // Neither is a sandbox.
    for name in ["stats", "usage"] {
        assert_eq!(replica.as_team(Method::DELETE, &format!("/v1/sandboxes/{name}"), None).await.status, 405, "{name}");
        assert_eq!(
            replica.as_team(Method::GET, &format!("/v1/sandboxes/{name}/metrics"), None).await.status,
            400,
            "{name}"
        );
    }
    let stats = replica.as_team(Method::GET, "/v1/capsules/stats", None).await;
    assert_eq!((stats.status.as_u16(), &stats.body["range"]), (200, &json!("1h")), "{}", stats.body);
    assert_eq!(stats.body["current"]["running_count"], 1, "{}", stats.body);
    assert_eq!(stats.body["series"]["labels"].as_array().map(Vec::len), Some(120));
    let usage = replica.as_team(Method::GET, "/v1/capsules/usage", None).await;
    assert_eq!(
        (usage.status.as_u16(), usage.body["points"].as_array().map(Vec::len)),
        (200, Some(1)),
        "{}",
        usage.body
    );
    // Of what does not run there are no metrics, whatever its host would say.
    for observed in ["starting", "failed", "killed", "lost"] {
        replica.database.sql(&format!("update sandboxes set observed = '{observed}' where id = '{sandbox}'")).await;
        let answer = replica.as_team(Method::GET, &format!("/v1/sandboxes/{sandbox}/metrics"), None).await;
        assert_eq!(answer.error(), (404, "not_found"), "{observed}");
    }
    let foreign = replica.as_team(Method::GET, "/v1/sandboxes/sb0000000000000000000000/metrics", None).await;
    assert_eq!(foreign.error(), (404, "not_found"));
}
