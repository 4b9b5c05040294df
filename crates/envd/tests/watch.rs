//! Watching directories from outside: every change under its name and in its order, and nothing of envd's own.

mod guest;

use std::fs;
use std::path::Path;

use guest::{Envd, Stream, request, until};
use serde_json::{Value, json};

const WATCH: &str = "/filesystem.Filesystem/WatchDir";

/// `create a`, and the entry's size when there is one.
fn line(event: &Value) -> String {
    let kind =
        event["type"].as_str().unwrap_or("EVENT_TYPE_UNSPECIFIED").trim_start_matches("EVENT_TYPE_").to_lowercase();
    let entry = &event["entry"];
    let size = if entry.is_null() { String::new() } else { format!(" {}", entry["size"].as_str().unwrap_or("0")) };
    format!("{kind} {}{size}", event["name"].as_str().unwrap())
}

async fn upload(envd: &Envd, path: &Path, body: &str) {
    let url = format!("/files?path={}", path.display());
    let octets = [("content-type", "application/octet-stream")];
    assert_eq!(envd.exchange("POST", &url, &octets, body.to_owned()).await.0, 200);
}

struct Watcher<'a> {
    envd: &'a Envd,
    id: String,
}

impl<'a> Watcher<'a> {
    async fn new(envd: &'a Envd, wanted: Value) -> Self {
        let made = envd.call("/filesystem.Filesystem/CreateWatcher", wanted).await.unwrap();
        Self { envd, id: made["watcherId"].as_str().unwrap().to_owned() }
    }

    /// What has happened since the last time.
    async fn lines(&self) -> Vec<String> {
        let message = json!({"watcherId": self.id});
        let got = self.envd.call("/filesystem.Filesystem/GetWatcherEvents", message).await.unwrap();
        got["events"].as_array().map(|events| events.iter().map(line).collect()).unwrap_or_default()
    }
}

async fn next(stream: &mut Stream) -> String {
    line(&stream.next().await.unwrap().1["filesystem"])
}

#[tokio::test]
async fn uploads_look_like_a_program_that_writes() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let mut stream = envd.stream(WATCH, &[], json!({"path": dir.path()})).await;
    assert_eq!(stream.next().await.unwrap().1, json!({"start": {}}));
    let watcher = Watcher::new(&envd, json!({"path": dir.path(), "includeEntry": true})).await;
    upload(&envd, &dir.path().join("f"), "hello").await;
    assert_eq!(watcher.lines().await, ["create f 5", "chmod f 5", "write f 5"]);
    upload(&envd, &dir.path().join("f"), "hello again").await;
    assert_eq!(watcher.lines().await, ["write f 11", "chmod f 11", "write f 11"]);
    assert_eq!(watcher.lines().await, [""; 0]);
    // One that is cut off is never seen.
    let cut = request(
        "POST",
        &format!("/files?path={}/g", dir.path().display()),
        &[("content-type", "multipart/form-data; boundary=X")],
        "--X\r\nContent-Disposition: form-data; name=file; filename=g\r\n\r\nhalf",
    );
    assert_eq!(envd.ask(cut).await.status(), 400);
    until("the hidden file is gone", async || fs::read_dir(dir.path()).unwrap().count() == 1).await;
    assert_eq!(watcher.lines().await, [""; 0]);
    for expected in ["create f", "chmod f", "write f", "write f", "chmod f", "write f"] {
        assert_eq!(next(&mut stream).await, expected);
    }
}

#[tokio::test]
async fn changes_have_their_names() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let at = |name: &str| dir.path().join(name);
    let watcher = Watcher::new(&envd, json!({"path": dir.path()})).await;
    fs::write(at("a"), "x").unwrap();
    assert_eq!(watcher.lines().await, ["create a", "write a"]);
    fs::rename(at("a"), at("b")).unwrap();
    assert_eq!(watcher.lines().await, ["rename a", "create b"]);
    fs::set_permissions(at("b"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    fs::remove_file(at("b")).unwrap();
    assert_eq!(watcher.lines().await, ["chmod b", "remove b"]);
    fs::create_dir(at("sub")).unwrap();
    fs::write(at("sub/unseen"), "x").unwrap();
    assert_eq!(watcher.lines().await, ["create sub"]);
    fs::remove_dir_all(dir.path()).unwrap();
    assert_eq!(watcher.lines().await, ["remove sub", "remove ."]);
    let gone = json!({"watcherId": watcher.id});
    envd.call("/filesystem.Filesystem/RemoveWatcher", gone.clone()).await.unwrap();
    for method in ["RemoveWatcher", "GetWatcherEvents"] {
        let answer = envd.call(&format!("/filesystem.Filesystem/{method}"), gone.clone()).await;
        assert_eq!(answer, Err("not_found".to_owned()), "{method}");
    }
}

#[tokio::test]
async fn new_directories_lose_nothing() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    fs::create_dir_all(dir.path().join("old/deep")).unwrap();
    let watcher = Watcher::new(&envd, json!({"path": dir.path(), "recursive": true})).await;
    fs::write(dir.path().join("old/deep/f"), "x").unwrap();
    assert_eq!(watcher.lines().await, ["create old/deep/f", "write old/deep/f"]);
    // Made and filled at once, over and over: each directory and each file is told exactly once.
    let root = dir.path().to_owned();
    let made = std::thread::spawn(move || {
        for n in 0..200 {
            let deep = root.join(format!("{n}/a/b"));
            fs::create_dir_all(&deep).unwrap();
            fs::write(deep.join("f"), "x").unwrap();
        }
    });
    let mut lines = Vec::new();
    while !made.is_finished() {
        lines.extend(watcher.lines().await);
    }
    made.join().unwrap();
    lines.extend(watcher.lines().await);
    for n in 0..200 {
        for name in [format!("{n}"), format!("{n}/a"), format!("{n}/a/b"), format!("{n}/a/b/f")] {
            let count = lines.iter().filter(|line| **line == format!("create {name}")).count();
            assert_eq!(count, 1, "create {name}");
        }
        assert!(lines.contains(&format!("write {n}/a/b/f")), "write {n}");
    }
    // An upload makes its directories too.
    upload(&envd, &dir.path().join("up/load/f"), "x").await;
    let lines = watcher.lines().await;
    assert!(lines.contains(&"create up/load".to_owned()) && lines.contains(&"write up/load/f".to_owned()), "{lines:?}");
    assert!(!lines.iter().any(|line| line.contains(".envd")), "{lines:?}");
}

#[tokio::test]
async fn directories_keep_being_watched_under_their_new_name() {
    let (envd, dir, other) = (Envd::start(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("a/sub")).unwrap();
    fs::create_dir_all(other.path().join("in/sub")).unwrap();
    fs::write(other.path().join("in/sub/f"), "").unwrap();
    let watcher = Watcher::new(&envd, json!({"path": dir.path(), "recursive": true})).await;
    fs::rename(at("a"), at("b")).unwrap();
    fs::write(at("b/sub/f"), "").unwrap();
    assert_eq!(watcher.lines().await, ["rename a", "create b", "create b/sub/f"]);
    fs::rename(other.path().join("in"), at("in")).unwrap();
    assert_eq!(watcher.lines().await, ["create in", "create in/sub", "create in/sub/f"]);
    fs::write(at("in/sub/g"), "").unwrap();
    assert_eq!(watcher.lines().await, ["create in/sub/g"]);
    fs::rename(at("b"), other.path().join("out")).unwrap();
    assert_eq!(watcher.lines().await, ["rename b"]);
    until("what has left is not watched any more", async || {
        fs::write(other.path().join("out/sub/h"), "").unwrap();
        fs::remove_file(other.path().join("out/sub/h")).unwrap();
        watcher.lines().await.is_empty()
    })
    .await;
    fs::create_dir(at("b")).unwrap();
    fs::write(at("b/new"), "").unwrap();
    assert_eq!(watcher.lines().await, ["create b", "create b/new"]);
}

#[tokio::test]
async fn lost_events_are_told() {
    // In memory: what is measured is not the disk.
    let (envd, dir) = (Envd::start(), tempfile::tempdir_in("/dev/shm").unwrap());
    let watcher = Watcher::new(&envd, json!({"path": dir.path(), "recursive": true})).await;
    for n in 0..20_000 {
        fs::write(dir.path().join(format!("{n}")), "x").unwrap();
    }
    fs::create_dir(dir.path().join("after")).unwrap();
    let mut lines = watcher.lines().await;
    while lines.last().is_none_or(|line| !line.starts_with("unspecified")) && lines.len() < 60_000 {
        let more = watcher.lines().await;
        assert!(!more.is_empty(), "{} events, and no word of those lost", lines.len());
        lines.extend(more);
    }
    assert_eq!(lines.last().unwrap(), "unspecified .");
    // What was made meanwhile is watched all the same.
    fs::write(dir.path().join("after/f"), "").unwrap();
    assert_eq!(watcher.lines().await, ["create after/f"]);
    assert!(envd.resident_kib() < 32 * 1024, "{} KiB", envd.resident_kib());
}

#[tokio::test]
async fn what_cannot_be_watched_is_refused() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir_in("/dev/shm").unwrap());
    fs::write(dir.path().join("file"), "").unwrap();
    for (path, code) in [("file", "invalid_argument"), ("none", "not_found"), ("file/below", "invalid_argument")] {
        let wanted = json!({"path": dir.path().join(path)});
        let answer = envd.call("/filesystem.Filesystem/CreateWatcher", wanted.clone()).await;
        assert_eq!(answer, Err(code.to_owned()), "{path}");
        let outcome = envd.stream(WATCH, &[], wanted).await.outcome().await;
        assert_eq!(outcome.error.as_deref(), Some(code), "{path}");
    }
    assert_eq!(envd.call("/filesystem.Filesystem/CreateWatcher", json!({})).await, Err("invalid_argument".to_owned()));
    for n in 0..17_000 {
        fs::create_dir_all(dir.path().join(format!("many/{n}"))).unwrap();
    }
    let many = json!({"path": dir.path(), "recursive": true});
    let answer = envd.call("/filesystem.Filesystem/CreateWatcher", many).await;
    assert_eq!(answer, Err("resource_exhausted".to_owned()));
    let mut streams = Vec::new();
    loop {
        let mut stream = envd.stream(WATCH, &[], json!({"path": dir.path()})).await;
        let (flags, first) = stream.next().await.unwrap();
        if flags & 2 != 0 {
            assert_eq!(first["error"]["code"], "resource_exhausted");
            break;
        }
        streams.push(stream);
        assert!(streams.len() < 200, "there is no bound");
    }
    // A watch ends with its stream.
    drop(streams);
    until("there is room again", async || {
        envd.call("/filesystem.Filesystem/CreateWatcher", json!({"path": dir.path()})).await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn a_silent_watch_is_kept_alive() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let mut stream = envd.stream(WATCH, &[("keepalive-ping-interval", "1")], json!({"path": dir.path()})).await;
    assert_eq!(stream.next().await.unwrap().1, json!({"start": {}}));
    assert_eq!(stream.next().await.unwrap().1, json!({"keepalive": {}}));
    fs::remove_dir(dir.path()).unwrap();
    assert_eq!(next(&mut stream).await, "remove .");
    assert_eq!(stream.next().await.unwrap().0, 2, "the stream ends with its directory");
}
