//! `wrenn files get` against a server whose connections break and whose files change: what is put together is always one whole file. And what a
//! guest calls its files leads nowhere and steers nothing.

use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{any, post};
use axum::{Json, Router};
use serde_json::{Value, json};

const ID: &str = "sb0123456789abcdefghij12";

#[derive(Default)]
struct World {
    content: Vec<u8>,
    version: u32,
    /// Each answer breaks off after so many bytes; none: none does.
    breaks_after: Option<usize>,
    /// After so many GETs the file is another one.
    changes_in: Option<u32>,
    /// `Range` and `If-Range` of each GET.
    asked: Vec<(String, String)>,
    entries: Value,
}

type Shared = Arc<Mutex<World>>;

struct Server {
    api: String,
    world: Shared,
    _runtime: tokio::runtime::Runtime,
}

impl Server {
    fn start(content: &[u8]) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let world = Shared::default();
        world.lock().unwrap().content = content.to_vec();
        let routes = Router::new()
            .route("/v1/sandboxes/{id}/files/content", any(self::content))
            .route("/v1/sandboxes/{id}/files/stat", post(stat))
            .route("/v1/sandboxes/{id}/files/list", post(list))
            .with_state(world.clone());
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let api = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(async move { axum::serve(listener, routes).await });
        Self { api, world, _runtime: runtime }
    }

    fn wrenn(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn"));
        command.args(arguments).env("WRENN_API_URL", &self.api).env("WRENN_API_KEY", "wrn_test").stdin(Stdio::null());
        command.current_dir("/").output().unwrap()
    }
}

fn entry(name: &str, kind: &str, size: usize) -> Value {
    json!({"name": name, "path": format!("/srv/{name}"), "type": kind, "size": size, "mode": 0o755, "permissions": "-rwxr-xr-x",
           "owner": "root", "group": "root", "modified_at": 1})
}

async fn stat(State(world): State<Shared>, Json(body): Json<Value>) -> Response {
    let world = world.lock().unwrap();
    let path = body["path"].as_str().unwrap();
    let name = path.rsplit('/').next().unwrap();
    let kind = if path == "/srv" { "directory" } else { "file" };
    Json(json!({ "entry": entry(name, kind, world.content.len()) })).into_response()
}

async fn list(State(world): State<Shared>) -> Response {
    Json(json!({ "entries": world.lock().unwrap().entries })).into_response()
}

async fn content(State(world): State<Shared>, method: Method, headers: HeaderMap) -> Response {
    let mut world = world.lock().unwrap();
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default();
    if method == Method::GET {
        world.asked.push((text("range"), text("if-range")));
        if world.changes_in == Some(0) {
            world.version += 1;
            world.content.reverse();
        }
        world.changes_in = world.changes_in.and_then(|count| count.checked_sub(1));
    }
    let etag = format!("\"v{}\"", world.version);
    let size = world.content.len();
    let is_same = text("if-range") == etag;
    let from: Option<usize> =
        text("range").strip_prefix("bytes=").and_then(|range| range.split('-').next()?.parse().ok());
    let (status, from) = match from {
        Some(from) if is_same && from < size => (StatusCode::PARTIAL_CONTENT, from),
        _ => (StatusCode::OK, 0),
    };
    let rest = world.content[from..].to_vec();
    let mut response = Response::builder().status(status).header("etag", etag).header("content-length", rest.len());
    if status == StatusCode::PARTIAL_CONTENT {
        response = response.header("content-range", format!("bytes {from}-{}/{size}", size - 1));
    }
    let body = match world.breaks_after {
        _ if method == Method::HEAD => Body::empty(),
        Some(limit) if limit < rest.len() => {
            let piece: Result<Bytes, std::io::Error> = Ok(rest[..limit].to_vec().into());
            // What goes before the break is under way by then: else it would be thrown away with the connection.
            let broken = async {
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                Err(std::io::Error::other("the cable"))
            };
            let broken = futures::stream::once(broken);
            Body::from_stream(futures::StreamExt::chain(futures::stream::iter([piece]), broken))
        }
        _ => rest.into(),
    };
    response.body(body).unwrap()
}

fn numbered(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| u8::try_from(at / 7 % 251).unwrap()).collect()
}

#[test]
fn a_download_that_breaks_goes_on_where_it_stopped() {
    let content = numbered(100_000);
    let server = Server::start(&content);
    server.world.lock().unwrap().breaks_after = Some(30_000);
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("copy");
    let got = server.wrenn(&["files", "get", &format!("{ID}:/srv/a"), to.to_str().unwrap(), "--json"]);
    assert!(got.status.success(), "{got:?}");
    assert_eq!(std::fs::read(&to).unwrap(), content);
    let asked: Vec<_> = server.world.lock().unwrap().asked.iter().map(|(range, _)| range.clone()).collect();
    assert_eq!(asked[0], "");
    // What had come by then is the system's affair, but each began where the one before had stopped.
    assert!(asked.len() >= 4 && asked[1..].iter().all(|range| range.starts_with("bytes=")), "{asked:?}");
    assert!(server.world.lock().unwrap().asked[1..].iter().all(|(_, condition)| condition == "\"v0\""));
    // A program is one here, too, and nothing is left beside it.
    assert_eq!(std::fs::metadata(&to).unwrap().mode() & 0o111, 0o111);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    // The same, on standard output.
    let read = server.wrenn(&["files", "cat", &format!("{ID}:/srv/a")]);
    assert!(read.status.success() && read.stdout == content, "{}", read.stdout.len());
}

#[test]
fn what_came_before_is_gone_on_with_unless_it_is_another_file_now() {
    let content = numbered(50_000);
    let server = Server::start(&content);
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("copy");
    let place = format!("{ID}:/srv/a");
    let arguments = ["files", "get", &place, to.to_str().unwrap()];
    // Each answer breaks off at once: at last it is given up, with what there is.
    server.world.lock().unwrap().breaks_after = Some(0);
    let failed = server.wrenn(&arguments);
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "an empty part is of no use");
    // A part of the file as it is, under the name that this version has.
    server.world.lock().unwrap().breaks_after = Some(20_000);
    server.world.lock().unwrap().changes_in = Some(1);
    let got = server.wrenn(&arguments);
    assert!(got.status.success(), "{got:?}");
    let turned: Vec<u8> = content.iter().rev().copied().collect();
    assert_eq!(std::fs::read(&to).unwrap(), turned, "of the version that there is now, and of no other");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    // One that is read straight through cannot be begun anew.
    server.world.lock().unwrap().changes_in = Some(1);
    let read = server.wrenn(&["files", "cat", &place]);
    assert_eq!(read.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&read.stderr).contains("was changed while it was read"), "{read:?}");
}

#[test]
fn names_of_the_guest_lead_nowhere_and_steer_nothing() {
    let server = Server::start(b"x");
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("tree");
    let arguments = ["files", "get", "-r", &format!("{ID}:/srv"), to.to_str().unwrap()];
    server.world.lock().unwrap().entries = json!([entry("../../evil", "file", 1)]);
    let refused = server.wrenn(&arguments);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("no name of a file"));
    server.world.lock().unwrap().entries = json!([entry("fine", "file", 1), entry("li\u{1b}[2Jnk", "symlink", 1)]);
    // What was begun is a directory to put it into.
    std::fs::remove_dir(&to).unwrap();
    let got = server.wrenn(&arguments);
    assert!(got.status.success(), "{got:?}");
    assert_eq!(std::fs::read(to.join("fine")).unwrap(), b"x");
    assert_eq!(std::fs::read_dir(&to).unwrap().count(), 1, "links are left out");
    assert!(String::from_utf8_lossy(&got.stderr).contains("left out: /srv/li\\u{1b}[2Jnk (symlink)"), "{got:?}");
    let listed = server.wrenn(&["files", "ls", &format!("{ID}:/srv")]);
    let shown = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(shown.contains("li\\u{1b}[2Jnk") && !shown.contains('\u{1b}'), "{shown}");
    // A directory is fetched only when that is meant.
    assert_eq!(server.wrenn(&["files", "get", &format!("{ID}:/srv"), to.to_str().unwrap()]).status.code(), Some(2));
}
