//! Files of a sandbox by the public API, and what the host says that it takes: listings, changes of names, downloads that break off and are
//! resumed, uploads that break off, slow readers; and metrics of a sandbox that runs, is paused and is killed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt as _;
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use whole_machine::platform::Platform;
use whole_machine::wait;

const LARGE_BYTES: usize = 64 << 20;
/// What one transfer may make a program hold: two windows of streams and some pieces, whatever the file has.
const GROWTH_MIB_MAX: u64 = 48;

/// One sandbox, and the routes of its files.
struct Files<'a> {
    platform: &'a Platform,
    id: String,
}

impl Files<'_> {
    async fn post(&self, route: &str, body: Value) -> (u16, Value) {
        let path = format!("/v1/sandboxes/{}/files/{route}", self.id);
        let (status, answer) = self.platform.call(Method::POST, &path, Some(body)).await;
        (status.as_u16(), answer)
    }

    async fn refused(&self, route: &str, body: Value) -> (u16, String) {
        let (status, answer) = self.post(route, body).await;
        (status, answer["error"]["code"].as_str().unwrap_or_default().to_owned())
    }

    fn content(&self, method: Method, path: &str) -> RequestBuilder {
        let url = format!("{}/v1/sandboxes/{}/files/content", self.platform.api, self.id);
        let request = self.platform.http.request(method, url).header("X-API-Key", &self.platform.api_key);
        request.query(&[("path", path)])
    }

    async fn put(&self, path: &str, content: impl Into<reqwest::Body>) {
        let answer = self.content(Method::PUT, path).body(content).send().await.unwrap();
        assert_eq!(answer.status(), 204, "{}", answer.text().await.unwrap());
    }

    async fn shell(&self, script: &str) -> String {
        let (code, said) = self.platform.shell(&self.id, script).await;
        assert_eq!(code, 0, "{script}: {said}");
        said
    }
}

fn header<'a>(answer: &'a Response, name: &str) -> &'a str {
    answer.headers().get(name).map(|value| value.to_str().unwrap()).unwrap_or_default()
}

fn rss_mib(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_listed_made_moved_and_removed() {
    let platform = Platform::start();
    let before = platform.objects();
    let files = Files { platform: &platform, id: platform.create().await };
    files.shell("mkdir -p /srv/t/a/b && echo one >/srv/t/one && echo deep >/srv/t/a/b/deep && ln -s one /srv/t/link && chmod 640 /srv/t/one").await;

    let names = |listed: &Value| -> Vec<String> {
        let entries = listed["entries"].as_array().unwrap().iter();
        entries.map(|entry| entry["path"].as_str().unwrap().to_owned()).collect()
    };
    let (status, listed) = files.post("list", json!({"path": "/srv/t"})).await;
    assert_eq!(status, 200, "{listed}");
    assert_eq!(names(&listed), ["/srv/t/a", "/srv/t/link", "/srv/t/one"]);
    let one = &listed["entries"][2];
    for (field, value) in [
        ("name", json!("one")),
        ("type", json!("file")),
        ("size", json!(4)),
        ("mode", json!(0o640)),
        ("permissions", json!("-rw-r-----")),
        ("owner", json!("root")),
        ("group", json!("root")),
    ] {
        assert_eq!(one[field], value, "{field}: {one}");
    }
    let age = chrono::Utc::now().timestamp() - one["modified_at"].as_i64().unwrap();
    assert!((-5..120).contains(&age), "{one}");
    assert!(one.get("symlink_target").is_none(), "{one}");
    assert_eq!(
        (&listed["entries"][0]["type"], &listed["entries"][1]["type"]),
        (&json!("directory"), &json!("symlink"))
    );
    assert_eq!(listed["entries"][1]["symlink_target"], "/srv/t/one");
    let (_, deep) = files.post("list", json!({"path": "/srv/t", "depth": 3})).await;
    assert_eq!(names(&deep), ["/srv/t/a", "/srv/t/a/b", "/srv/t/a/b/deep", "/srv/t/link", "/srv/t/one"]);
    for (body, refusal) in [
        (json!({"path": "/srv/none"}), (404, "not_found")),
        (json!({"path": "/srv/t/one"}), (400, "invalid_request")),
        (json!({"path": ""}), (400, "invalid_request")),
        (json!({"path": "/srv/t", "depth": -1}), (400, "invalid_request")),
        (json!({"path": "/root", "user": "user"}), (403, "forbidden")),
        (json!({"path": "/", "user": "nobody-of-that-name"}), (400, "invalid_request")),
    ] {
        assert_eq!(files.refused("list", body.clone()).await, (refusal.0, refusal.1.to_owned()), "{body}");
    }
    files.shell("mkdir /srv/many && cd /srv/many && seq 20001 | xargs touch").await;
    assert_eq!(files.refused("list", json!({"path": "/srv/many"})).await, (400, "invalid_request".to_owned()));
    files.shell("rm /srv/many/1").await;
    let (status, many) = files.post("list", json!({"path": "/srv/many"})).await;
    assert_eq!((status, many["entries"].as_array().map(Vec::len)), (200, Some(20_000)));

    let (status, made) = files.post("mkdir", json!({"path": "/srv/new/er/est"})).await;
    assert_eq!(
        (status, &made["entry"]["type"], &made["entry"]["path"]),
        (200, &json!("directory"), &json!("/srv/new/er/est"))
    );
    assert_eq!(files.refused("mkdir", json!({"path": "/srv/new/er"})).await, (409, "conflict".to_owned()));
    assert_eq!(files.refused("mkdir", json!({"path": "/srv/t/one"})).await.0, 400);
    assert_eq!(files.refused("mkdir", json!({"path": "/srv/no", "user": "user"})).await, (403, "forbidden".to_owned()));
    let (status, made) = files.post("mkdir", json!({"path": "mine", "user": "user"})).await;
    assert_eq!(
        (status, &made["entry"]["owner"], &made["entry"]["path"]),
        (200, &json!("user"), &json!("/home/user/mine"))
    );

    let (status, stat) = files.post("stat", json!({"path": "/srv/t/link"})).await;
    assert_eq!((status, &stat["entry"]["type"], &stat["entry"]["name"]), (200, &json!("symlink"), &json!("link")));
    assert_eq!(files.refused("stat", json!({"path": "/srv/none"})).await, (404, "not_found".to_owned()));

    let (status, moved) = files.post("move", json!({"from": "/srv/t/one", "to": "/srv/other/place/two"})).await;
    assert_eq!(
        (status, &moved["entry"]["path"], &moved["entry"]["size"]),
        (200, &json!("/srv/other/place/two"), &json!(4))
    );
    assert_eq!(
        files.refused("move", json!({"from": "/srv/t/one", "to": "/srv/x"})).await,
        (404, "not_found".to_owned())
    );
    assert_eq!(
        files.refused("move", json!({"from": "/srv/t/a", "to": "/srv/other"})).await,
        (409, "conflict".to_owned())
    );

    for path in ["/", "//", "/srv/..", "~", ".", "/root", "/srv/../root"] {
        assert_eq!(files.refused("remove", json!({"path": path})).await, (400, "invalid_request".to_owned()), "{path}");
    }
    assert_eq!(files.refused("remove", json!({"path": ""})).await.0, 400);
    assert_eq!(files.refused("remove", json!({"path": "/etc/hostname", "user": "user"})).await.0, 403);
    for path in ["/srv/t", "/srv/other/place/two"] {
        assert_eq!(files.post("remove", json!({"path": path})).await.0, 204, "{path}");
        assert_eq!(files.refused("remove", json!({"path": path})).await, (404, "not_found".to_owned()), "{path}");
    }
    assert_eq!(
        files.shell("ls /srv /srv/other").await.replace('\n', " ").trim(),
        "/srv: many new other  /srv/other: place"
    );

    // The user of a form, and a disk without room.
    let form = reqwest::multipart::Form::new().text("path", "from-form").text("user", "user").text("file", "x");
    let url = format!("{}/v1/capsules/{}/files/write", platform.api, files.id);
    let answer = platform.http.post(url).header("X-API-Key", &platform.api_key).multipart(form).send().await.unwrap();
    assert_eq!(answer.status(), 204);
    assert_eq!(files.shell("stat -c %U /home/user/from-form").await, "user\n");
    files.shell("mkdir /srv/small && mount -t tmpfs -o size=64k,nr_inodes=3 none /srv/small && mkdir /srv/small/a /srv/small/b").await;
    assert_eq!(files.refused("mkdir", json!({"path": "/srv/small/c"})).await, (507, "insufficient_storage".to_owned()));

    platform.kill(&files.id).await;
    assert_eq!(files.refused("list", json!({"path": "/"})).await, (409, "invalid_state".to_owned()));
    platform.expect_objects(&before).await;
    assert_eq!(platform.finish(), Default::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn transfers_that_break_off_are_resumed_or_were_never_there() {
    let platform = Platform::start();
    let before = platform.objects();
    let files =
        Files { platform: &platform, id: platform.create_with(json!({"template": "minimal", "memory_mb": 512})).await };
    let content: Vec<u8> =
        (0..LARGE_BYTES as u64 / 8).flat_map(|n| (n.wrapping_mul(0x9E37_79B9_7F4A_7C15)).to_le_bytes()).collect();
    files.put("/srv/large", content.clone()).await;
    // A file's tag is a strong one when it is a second old.
    let settled = async |path: &str| {
        wait::until("the file to settle", Duration::from_secs(30), async || {
            let head = files.content(Method::HEAD, path).send().await.unwrap();
            assert_eq!(head.status(), StatusCode::OK);
            (!header(&head, "etag").starts_with("W/")).then_some(head)
        })
        .await
    };
    let head = settled("/srv/large").await;
    assert_eq!(header(&head, "content-length"), LARGE_BYTES.to_string());
    assert_eq!(header(&head, "accept-ranges"), "bytes");
    assert_eq!(header(&head, "content-disposition"), "attachment; filename=\"large\"");
    let tag = header(&head, "etag").to_owned();
    assert!(tag.len() > 2 && !header(&head, "last-modified").is_empty(), "{head:?}");

    // Broken off in the middle, and gone on with from there.
    let mut got: Vec<u8> = Vec::new();
    let answer = files.content(Method::GET, "/srv/large").send().await.unwrap();
    assert_eq!((answer.status(), header(&answer, "etag")), (StatusCode::OK, tag.as_str()));
    let mut pieces = answer.bytes_stream();
    while got.len() < LARGE_BYTES / 2 {
        got.extend_from_slice(&pieces.next().await.unwrap().unwrap());
    }
    drop(pieces);
    let resume = |from: usize| {
        let request = files.content(Method::GET, "/srv/large").header("Range", format!("bytes={from}-"));
        request.header("If-Range", &tag)
    };
    let answer = resume(got.len()).send().await.unwrap();
    assert_eq!(answer.status(), 206);
    assert_eq!(header(&answer, "content-range"), format!("bytes {}-{}/{LARGE_BYTES}", got.len(), LARGE_BYTES - 1));
    got.extend_from_slice(&answer.bytes().await.unwrap());
    assert!(got == content, "what was joined is not the file");

    let answer = files.content(Method::GET, "/srv/large").header("If-None-Match", &tag).send().await.unwrap();
    assert_eq!((answer.status(), header(&answer, "etag")), (StatusCode::NOT_MODIFIED, tag.as_str()));
    let answer = files.content(Method::GET, "/srv/large").header("Range", "bytes=99999999999-").send().await.unwrap();
    assert_eq!(
        (answer.status().as_u16(), header(&answer, "content-range")),
        (416, format!("bytes */{LARGE_BYTES}").as_str())
    );
    let refused: Value = answer.json().await.unwrap();
    assert_eq!(refused["error"]["code"], "range_not_satisfiable");
    for route in ["read", "stream/read"] {
        let url = format!("{}/v1/sandboxes/{}/files/{route}", platform.api, files.id);
        let request = platform.http.post(url).header("X-API-Key", &platform.api_key).header("Range", "bytes=-8");
        let answer = request.json(&json!({"path": "/srv/large"})).send().await.unwrap();
        assert_eq!(answer.status(), 206, "{route}");
        assert_eq!(answer.bytes().await.unwrap(), &content[LARGE_BYTES - 8..], "{route}");
    }
    for method in [Method::GET, Method::HEAD] {
        let answer = files.content(method.clone(), "/srv/none").send().await.unwrap();
        assert_eq!(answer.status(), 404, "{method}");
        let answer = files.content(method.clone(), "/srv").send().await.unwrap();
        assert_eq!(answer.status(), 400, "{method}");
        let answer = files.content(method.clone(), "/etc/shadow").query(&[("user", "user")]).send().await.unwrap();
        assert_eq!(answer.status(), 403, "{method}");
    }

    // Another file under the name: the rest of the old one is not to be had, the whole new one is.
    files.put("/srv/large", "new").await;
    let answer = resume(LARGE_BYTES / 2).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_ne!(header(&answer, "etag"), tag);
    assert_eq!(answer.bytes().await.unwrap(), "new");

    // An upload that breaks off leaves what was there, and nothing beside it.
    let broken = futures::stream::iter((0..64).map(|_| Ok(Bytes::from(vec![7; 64 * 1024]))))
        .chain(futures::stream::iter([Err(std::io::Error::other("the client is gone"))]));
    let sent = files.content(Method::PUT, "/srv/large").body(reqwest::Body::wrap_stream(broken)).send().await;
    assert!(sent.is_err() || !sent.unwrap().status().is_success());
    let (_, shown) = files.post("list", json!({"path": "/srv"})).await;
    assert_eq!(
        (shown["entries"].as_array().map(Vec::len), &shown["entries"][0]["size"]),
        (Some(1), &json!(3)),
        "{shown}"
    );
    wait::until("the broken upload to be gone", Duration::from_secs(30), async || {
        (files.shell("ls -A /srv").await == "large\n").then_some(())
    })
    .await;
    let request = files.content(Method::PUT, "/srv/large").header("Content-Range", "bytes 0-2/3").body("abc");
    assert_eq!(request.send().await.unwrap().status(), 400);
    let request =
        files.content(Method::PUT, "/srv/large").header("Content-Type", "multipart/form-data; boundary=x").body("abc");
    assert_eq!(request.send().await.unwrap().status(), 415);

    // A hole of a terabyte and its end.
    files.shell("truncate -s 1T /srv/sparse && printf end >>/srv/sparse").await;
    let answer =
        files.content(Method::GET, "/srv/sparse").header("Range", "bytes=1099511627774-").send().await.unwrap();
    assert_eq!(
        (answer.status().as_u16(), header(&answer, "content-range")),
        (206, "bytes 1099511627774-1099511627778/1099511627779")
    );
    assert_eq!(answer.bytes().await.unwrap(), &b"\0\0end"[..]);

    // A reader that does not read holds nothing of it in our programs.
    let pids = ["wrenn-cp", "wrenn-agent"].map(|name| platform.pid_of(name).unwrap());
    let before_reading = pids.map(rss_mib);
    let answer = files.content(Method::GET, "/srv/sparse").send().await.unwrap();
    assert_eq!((answer.status().as_u16(), answer.content_length()), (200, Some((1 << 40) + 3)));
    let mut pieces = answer.bytes_stream();
    let began = Instant::now();
    let mut read = 0;
    while began.elapsed() < Duration::from_secs(10) {
        read += pieces.next().await.unwrap().unwrap().len();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(read > 0);
    for (pid, before) in pids.into_iter().zip(before_reading) {
        let grown = rss_mib(pid).saturating_sub(before);
        assert!(grown <= GROWTH_MIB_MAX, "process {pid} has grown by {grown} MiB");
    }
    drop(pieces);
    platform.kill(&files.id).await;
    platform.expect_objects(&before).await;
    assert_eq!(platform.finish(), Default::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_sandbox_takes_is_known_while_it_is_there() {
    let platform = Platform::start();
    let id = platform.create().await;
    let metrics = async |range: &str| {
        let query = if range.is_empty() { String::new() } else { format!("?range={range}") };
        let (status, answer) = platform.call(Method::GET, &format!("/v1/sandboxes/{id}/metrics{query}"), None).await;
        (status.as_u16(), answer)
    };
    let points = |answer: &Value| answer["points"].as_array().cloned().unwrap_or_default();
    let busy = platform
        .shell(
            &id,
            "(timeout 40 sh -c 'while :; do :; done') >/dev/null 2>&1 & head -c 20000000 /dev/urandom >/root/x; sync",
        )
        .await;
    assert_eq!(busy.0, 0, "{busy:?}");
    let hot = wait::until("points of a busy sandbox", Duration::from_secs(60), async || {
        let (status, answer) = metrics("").await;
        assert_eq!((status, &answer["range"], &answer["sandbox_id"]), (200, &json!("10m"), &json!(id)), "{answer}");
        points(&answer).into_iter().find(|point| point["cpu_pct"].as_f64().unwrap() > 30.0)
    })
    .await;
    assert!(hot["cpu_pct"].as_f64().unwrap() <= 100.0, "{hot}");
    assert!(hot["mem_bytes"].as_i64().unwrap() > 20 << 20 && hot["disk_bytes"].as_i64().unwrap() > 1 << 20, "{hot}");
    assert!((chrono::Utc::now().timestamp() - hot["timestamp_unix"].as_i64().unwrap()).abs() < 120, "{hot}");
    for range in ["5m", "10m", "1h", "2h", "6h", "12h", "24h"] {
        let (status, answer) = metrics(range).await;
        assert!(status == 200 && !points(&answer).is_empty(), "{range}: {answer}");
    }
    for range in ["30d", "0", "10M", "%20"] {
        assert_eq!(metrics(range).await.0, 400, "{range}");
    }

    let stats = |range: &str| {
        let path = format!("/v1/capsules/stats?range={range}");
        let platform = &platform;
        async move { platform.call(Method::GET, &path, None).await }
    };
    for (range, buckets) in [("5m", 100), ("1h", 120), ("6h", 120), ("24h", 120), ("30d", 120)] {
        let (status, answer) = stats(range).await;
        assert_eq!((status.as_u16(), &answer["current"]["running_count"]), (200, &json!(1)), "{answer}");
        assert_eq!(answer["current"], json!({"running_count": 1, "vcpus_reserved": 1, "memory_mb_reserved": 256}));
        assert_eq!(answer["peaks"], json!({"running_count": 1, "vcpus": 1, "memory_mb": 256}));
        let lengths: BTreeSet<_> = ["labels", "running", "vcpus", "memory_mb"]
            .map(|name| answer["series"][name].as_array().unwrap().len())
            .into();
        assert_eq!(lengths, [buckets].into(), "{range}");
        assert_eq!(answer["series"]["running"].as_array().unwrap().last(), Some(&json!(1)), "{range}");
    }

    let (status, paused) = platform.call(Method::POST, &format!("/v1/sandboxes/{id}/pause?wait_sec=60"), None).await;
    assert_eq!((status.as_u16(), &paused["status"]), (200, &json!("paused")), "{paused}");
    let (status, kept) = metrics("24h").await;
    assert!(status == 200 && !points(&kept).is_empty(), "{kept}");
    let (_, answer) = stats("1h").await;
    assert_eq!(
        (&answer["current"]["running_count"], &answer["peaks"]["running_count"]),
        (&json!(0), &json!(1)),
        "{answer}"
    );
    // A pause is not forgotten by another start of the agent, once it was looked at.
    let file = platform.dir.join("metrics").join(&id);
    wait::until("the points to be written", Duration::from_secs(30), async || file.exists().then_some(())).await;
    platform.kill_9("wrenn-agent");
    platform.wait_ready().await;
    let kept = wait::until("the agent to answer", Duration::from_secs(60), async || {
        let (status, answer) = metrics("10m").await;
        (status == 200).then_some(answer)
    })
    .await;
    assert!(!points(&kept).is_empty(), "{kept}");

    let (status, used) = platform.call(Method::GET, "/v1/capsules/usage", None).await;
    assert_eq!(status, 200, "{used}");
    let minutes: f64 = points(&used).iter().map(|point| point["cpu_minutes"].as_f64().unwrap()).sum();
    assert!(minutes > 0.05 && minutes < 10.0, "{used}");
    platform.kill(&id).await;
    for range in ["", "24h"] {
        let (status, gone) = metrics(range).await;
        assert_eq!((status, &gone["error"]["code"]), (404, &json!("not_found")), "{gone}");
    }
    wait::until("the file of the points to be gone", Duration::from_secs(30), async || (!file.exists()).then_some(()))
        .await;
    assert_eq!(platform.finish(), Default::default());
}
