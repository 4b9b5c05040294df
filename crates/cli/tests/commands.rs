//! The commands of users against a server that speaks the API and has no sandboxes: what is sent, what is printed, exit codes, and that
//! nothing is left behind whatever happens. The real platform is under test in `tests/` of the repository.

use std::collections::BTreeMap;
use std::io::{BufRead as _, Write as _};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{DefaultBodyLimit, Multipart, Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

const ID: &str = "sb0123456789abcdefghij12";
const KEY: &str = "wrn_test";

#[derive(Default)]
struct World {
    /// Status by id; a sandbox starts at its second look.
    sandboxes: BTreeMap<String, &'static str>,
    files: BTreeMap<String, Vec<u8>>,
    /// What was asked for, in order.
    calls: Vec<String>,
    /// The first so many calls get no answer: the connection is refused by a 503 of a platform that is starting.
    unavailable: usize,
    /// The first so many lists are too many.
    too_many: usize,
}

type Shared = Arc<Mutex<World>>;

struct Server {
    api: String,
    world: Shared,
    _runtime: tokio::runtime::Runtime,
}

impl Server {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let world = Shared::default();
        let routes = Router::new()
            .route("/v1/sandboxes", post(create).get(list))
            .route("/v1/sandboxes/{id}", get(one).delete(kill))
            .route("/v1/sandboxes/{id}/ping", post(ping))
            .route("/v1/sandboxes/{id}/timeout", post(timeout))
            .route("/v1/sandboxes/{id}/exec/stream", get(exec))
            .route("/v1/sandboxes/{id}/files/stream/write", post(write))
            .route("/v1/sandboxes/{id}/files/stream/read", post(read))
            .route("/v1/events/all/stream", get(events))
            .route("/v1/sandboxes/{id}/processes/{selector}/stream", get(said))
            .route("/v1/hosts", post(add_host).get(hosts))
            .route("/v1/hosts/silence", get(|| async { refusal(403, "forbidden", "only administrators may do this") }))
            .route("/v1/admin/teams/{id}/byoc", put(byoc))
            .route("/v1/sandboxes/{id}/console", get(|| async { "boot\r\n\u{1b}[2Jdone\n" }))
            .layer(DefaultBodyLimit::disable())
            .with_state(world.clone());
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let api = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(async move { axum::serve(listener, routes).await });
        Self { api, world, _runtime: runtime }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn"));
        command
            .args(arguments)
            .env("WRENN_API_URL", &self.api)
            .env("WRENN_API_KEY", KEY)
            .stdin(Stdio::null())
            .current_dir("/");
        command
    }

    fn wrenn(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn is_killed(&self) -> bool {
        let world = self.world.lock().unwrap();
        world.calls.iter().any(|call| call == &format!("DELETE {ID}"))
    }

    fn with_sandbox() -> Self {
        let server = Self::start();
        server.world.lock().unwrap().sandboxes.insert(ID.to_owned(), "running");
        server
    }
}

fn refusal(status: u16, code: &str, message: &str) -> Response {
    let body = json!({"error": {"code": code, "message": message, "request_id": "req_7"}});
    (StatusCode::from_u16(status).unwrap(), Json(body)).into_response()
}

fn sandbox(id: &str, status: &str) -> Value {
    json!({"id": id, "status": status, "template": "minimal", "vcpus": 1, "memory_mb": 512, "disk_size_mb": 5120, "timeout_sec": 0,
           "isolation": "qemu/emulated", "created_at": "2026-01-01T00:00:00Z", "last_updated": "2026-01-01T00:00:00Z"})
}

async fn create(State(world): State<Shared>, headers: HeaderMap, Json(body): Json<Value>) -> Response {
    let mut world = world.lock().unwrap();
    if headers.get("x-api-key").is_none_or(|key| key != KEY) {
        return refusal(401, "unauthorized", "no valid credential");
    }
    if world.unavailable > 0 {
        world.unavailable -= 1;
        return refusal(503, "unavailable", "starting");
    }
    world.calls.push(format!("POST {body} {}", headers.contains_key("idempotency-key")));
    match body["template"].as_str() {
        Some("no-such-template") => return refusal(404, "not_found", "there is no template no-such-template"),
        Some("broken") => world.sandboxes.insert(ID.to_owned(), "error"),
        _ => world.sandboxes.insert(ID.to_owned(), "starting"),
    };
    let status = world.sandboxes[ID];
    (StatusCode::ACCEPTED, Json(sandbox(ID, status))).into_response()
}

/// As the server: a part of the list, and where the next one is.
async fn list(State(world): State<Shared>, Query(query): Query<BTreeMap<String, String>>) -> Response {
    let mut world = world.lock().unwrap();
    world.calls.push(format!("LIST {query:?}"));
    if world.too_many > 0 {
        world.too_many -= 1;
        let refusal = refusal(429, "rate_limited", "too many requests");
        return ([("retry-after", "1")], refusal).into_response();
    }
    let limit: usize = query["limit"].parse().unwrap();
    let from = query.get("cursor").map_or(0, |cursor| cursor.parse().unwrap());
    let all: Vec<_> = world.sandboxes.iter().map(|(id, status)| sandbox(id, status)).collect();
    let page: Vec<_> = all.iter().skip(from).take(limit).cloned().collect();
    let next = from + page.len();
    match next < all.len() {
        true => ([("link", format!("<?limit={limit}&cursor={next}>; rel=\"next\""))], Json(page)).into_response(),
        false => Json(page).into_response(),
    }
}

/// Two events, and the stream is cut; whoever comes back after the second is told of a third.
async fn events(
    State(world): State<Shared>,
    headers: HeaderMap,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    let last = headers.get("last-event-id").map(|id| id.to_str().unwrap().to_owned());
    world.lock().unwrap().calls.push(format!("EVENTS {last:?} {query:?}"));
    let event = |id: u32, kind: &str| {
        let data = json!({"id": id.to_string(), "event": kind, "resource": {"id": ID, "type": "capsule"}, "sandbox": null,
                          "metadata": {"reason": "a\u{1b}[2J"}, "timestamp": "2026-01-01T00:00:00Z"});
        format!("event: {kind}\ndata: {data}\nid: {id}\n\n")
    };
    let text = match last.as_deref() {
        None => {
            format!(": word\n\n{}{}{}", event(4, "connected"), event(5, "capsule.create"), event(6, "capsule.pause"))
        }
        Some("6") => format!("{}{}", event(6, "connected"), event(7, "capsule.resume")),
        // Nothing happens any more.
        Some(_) => std::future::pending().await,
    };
    ([("content-type", "text/event-stream")], text).into_response()
}

/// The output of a process: eight bytes, of which the last four come over another connection.
async fn said(
    State(world): State<Shared>,
    Query(query): Query<BTreeMap<String, String>>,
    upgrade: WebSocketUpgrade,
) -> Response {
    world.lock().unwrap().calls.push(format!("SAID {query:?}"));
    assert_eq!(query["encoding"], "base64");
    let from: usize = query.get("from").map_or(0, |from| from.parse().unwrap());
    upgrade.on_upgrade(move |mut socket| async move {
        let frame = |value: Value| Message::text(value.to_string());
        let _ = socket.send(frame(json!({"type": "start", "pid": 7, "output_from": from}))).await;
        let _ =
            socket.send(frame(json!({"type": "stdout", "data": STANDARD.encode(&b"onetwo!\n"[from..from + 4])}))).await;
        if from > 0 {
            let _ = socket.send(frame(json!({"type": "exit", "exit_code": 4}))).await;
        }
    })
}

async fn one(State(world): State<Shared>, Path(id): Path<String>) -> Response {
    let mut world = world.lock().unwrap();
    let Some(status) = world.sandboxes.get_mut(&id) else { return refusal(404, "not_found", "no such sandbox") };
    if *status == "starting" {
        *status = "running";
    }
    Json(sandbox(&id, status)).into_response()
}

async fn kill(State(world): State<Shared>, Path(id): Path<String>) -> Response {
    let mut world = world.lock().unwrap();
    world.calls.push(format!("DELETE {id}"));
    match world.sandboxes.insert(id.clone(), "stopped") {
        // First under way, then done: both answers of the contract.
        Some("running") => (StatusCode::ACCEPTED, Json(sandbox(&id, "stopping"))).into_response(),
        Some(_) => StatusCode::NO_CONTENT.into_response(),
        None => refusal(404, "not_found", "no such sandbox"),
    }
}

async fn ping(State(world): State<Shared>, Path(id): Path<String>) -> Response {
    let mut world = world.lock().unwrap();
    world.calls.push(format!("PING {id}"));
    match world.sandboxes.get(&id) {
        Some(&"running") => StatusCode::NO_CONTENT.into_response(),
        Some(_) => refusal(409, "invalid_state", "the sandbox does not run"),
        None => refusal(404, "not_found", "no such sandbox"),
    }
}

/// The time that a sandbox is given, as it was asked for.
async fn timeout(State(world): State<Shared>, Path(id): Path<String>, Json(body): Json<Value>) -> Response {
    world.lock().unwrap().calls.push(format!("TIMEOUT {body}"));
    let mut answer = sandbox(&id, "running");
    answer.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
    answer["idle_since"] = json!("2026-01-01T00:00:00Z");
    Json(answer).into_response()
}

async fn exec(State(world): State<Shared>, Path(id): Path<String>, upgrade: WebSocketUpgrade) -> Response {
    match world.lock().unwrap().sandboxes.get(&id) {
        Some(&"running") => upgrade.on_upgrade(converse),
        Some(_) => refusal(409, "invalid_state", "the sandbox does not run"),
        None => refusal(404, "not_found", "no such sandbox"),
    }
}

/// The command says what is to happen.
async fn converse(mut socket: WebSocket) {
    let Some(Ok(Message::Text(text))) = socket.recv().await else { return };
    let start: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(start["encoding"], "base64");
    let frame = |value: Value| Message::text(value.to_string());
    let _ = socket.send(frame(json!({"type": "start", "pid": 7}))).await;
    match start["cmd"].as_str().unwrap() {
        "bytes" => {
            let all: Vec<u8> = (0..=255).collect();
            for chunk in all.chunks(100) {
                let _ = socket.send(frame(json!({"type": "stdout", "data": STANDARD.encode(chunk)}))).await;
            }
            let _ =
                socket.send(frame(json!({"type": "stderr", "data": STANDARD.encode(start["args"].to_string())}))).await;
            let _ = socket.send(frame(json!({"type": "exit", "exit_code": 3}))).await;
        }
        "signalled" => drop(socket.send(frame(json!({"type": "exit", "exit_code": -1}))).await),
        "refused" => {
            let error = json!({"type": "error", "code": "not_found", "data": "no such program", "fatal": true});
            let _ = socket.send(frame(error)).await;
        }
        "hang" => {
            let _ = socket.send(frame(json!({"type": "stdout", "data": STANDARD.encode("begun\n")}))).await;
            while let Some(Ok(_)) = socket.recv().await {}
        }
        // The connection is dropped without a word.
        _ => {}
    }
}

async fn write(State(world): State<Shared>, mut form: Multipart) -> Response {
    let mut path = String::new();
    while let Ok(Some(part)) = form.next_field().await {
        match part.name() {
            Some("path") => path = part.text().await.unwrap(),
            Some("file") => {
                assert!(!path.is_empty(), "the path comes first");
                let bytes = part.bytes().await.unwrap();
                world.lock().unwrap().files.insert(path.clone(), bytes.to_vec());
            }
            other => panic!("{other:?}"),
        }
    }
    StatusCode::NO_CONTENT.into_response()
}

async fn read(State(world): State<Shared>, Json(wanted): Json<Value>) -> Response {
    match world.lock().unwrap().files.get(wanted["path"].as_str().unwrap()) {
        Some(bytes) => bytes.clone().into_response(),
        None => refusal(404, "not_found", "no such file"),
    }
}

fn host(kind: &str, of: &Value) -> Value {
    json!({"id": "host-1", "type": kind, "team_id": of, "team_name": "Cellar", "status": "pending", "created_by": "usr-1",
           "created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:00:00Z"})
}

async fn add_host(State(world): State<Shared>, headers: HeaderMap, Json(body): Json<Value>) -> Response {
    let who = headers["authorization"].to_str().unwrap().to_owned();
    world.lock().unwrap().calls.push(format!("{who}: {body}"));
    let host = host(body["type"].as_str().unwrap(), &body["team_id"]);
    (StatusCode::CREATED, Json(json!({ "host": host, "registration_token": "once" }))).into_response()
}

async fn hosts() -> Response {
    Json(json!([host("byoc", &json!("team-1"))])).into_response()
}

async fn byoc(State(world): State<Shared>, Path(team): Path<String>, Json(body): Json<Value>) -> StatusCode {
    world.lock().unwrap().calls.push(format!("{team}: {body}"));
    StatusCode::NO_CONTENT
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn run_gives_output_and_exit_code_and_kills() {
    let server = Server::start();
    let output = server.wrenn(&["run", "--memory", "256", "--env", "A=b", "--", "bytes", "x y", "-z"]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert_eq!(output.stdout, (0..=255).collect::<Vec<u8>>());
    assert_eq!(text(&output.stderr), "[\"x y\",\"-z\"]");
    assert!(server.is_killed());
    assert_eq!(server.world.lock().unwrap().calls[0], "POST {\"memory_mb\":256} true");
    assert_eq!(server.wrenn(&["run", "--", "signalled"]).status.code(), Some(137));
}

#[test]
fn failures_of_our_own_are_125_and_kill_too() {
    for (arguments, says) in [
        (
            vec!["run", "--template", "no-such-template", "--", "bytes"],
            "there is no template no-such-template (not_found, request req_7)",
        ),
        (vec!["run", "--template", "broken", "--", "bytes"], "did not start"),
        (vec!["run", "--", "refused"], "no such program"),
        (vec!["run", "--", "dropped"], "before the command's end was told"),
    ] {
        let server = Server::start();
        let output = server.wrenn(&arguments);
        assert_eq!(output.status.code(), Some(125), "{arguments:?}");
        assert!(text(&output.stderr).contains(says), "{arguments:?}: {}", text(&output.stderr));
        assert_eq!(server.is_killed(), server.world.lock().unwrap().sandboxes.contains_key(ID), "{arguments:?}");
    }
    let server = Server::start();
    assert_eq!(server.wrenn(&["sandbox", "exec", ID, "--", "true"]).status.code(), Some(125));
    assert_eq!(server.wrenn(&["sandbox", "get", ID]).status.code(), Some(1));
    assert_eq!(server.wrenn(&["run", "--env", "no-sign", "--", "true"]).status.code(), Some(2));
    assert_eq!(server.wrenn(&["run"]).status.code(), Some(2));
}

#[test]
fn signals_kill_the_sandbox() {
    for (signal, code) in [(libc_signal::INT, 130), (libc_signal::TERM, 143)] {
        let server = Server::start();
        let mut child = server.command(&["run", "--", "hang"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "begun\n");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        let began = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            assert!(began.elapsed() < Duration::from_secs(20), "still running after the signal");
            std::thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(status.code(), Some(code));
        assert!(server.is_killed());
    }
}

mod libc_signal {
    pub const INT: nix::sys::signal::Signal = nix::sys::signal::Signal::SIGINT;
    pub const TERM: nix::sys::signal::Signal = nix::sys::signal::Signal::SIGTERM;
}

#[test]
fn files_go_there_and_back() {
    let server = Server::with_sandbox();
    let scratch = tempfile::tempdir().unwrap();
    let (there, back) = (scratch.path().join("there.bin"), scratch.path().join("back"));
    let content: Vec<u8> = (0..=255u8).cycle().take(3_000_001).collect();
    std::fs::write(&there, &content).unwrap();
    // Into a directory of the sandbox: under its own name.
    let output = server.wrenn(&["sandbox", "cp", there.to_str().unwrap(), &format!("{ID}:/tmp/")]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(server.world.lock().unwrap().files["/tmp/there.bin"] == content);
    let output = server.wrenn(&["sandbox", "cp", &format!("{ID}:/tmp/there.bin"), back.to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(std::fs::read(&back).unwrap() == content);
    assert_eq!(server.wrenn(&["sandbox", "cp", &format!("{ID}:/tmp/there.bin"), "-"]).stdout, content);

    let mut child =
        server.command(&["sandbox", "cp", "-", &format!("{ID}:/in")]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"piped").unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(server.world.lock().unwrap().files["/in"], b"piped");

    // What fails leaves no half file.
    let output = server.wrenn(&["sandbox", "cp", &format!("{ID}:/none"), scratch.path().join("new").to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("no such file (not_found"), "{}", text(&output.stderr));
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 2);
    let output = server.wrenn(&["sandbox", "cp", scratch.path().to_str().unwrap(), &format!("{ID}:/x")]);
    assert!(text(&output.stderr).contains("tar"), "a directory: {}", text(&output.stderr));
    let output = server.wrenn(&["sandbox", "cp", "/nonexistent-file", &format!("{ID}:/x")]);
    assert!(text(&output.stderr).contains("/nonexistent-file"));
}

#[test]
fn people_and_scripts_get_what_they_can_read() {
    let server = Server::with_sandbox();
    let output = server.wrenn(&["sandbox", "list"]);
    assert!(text(&output.stdout).starts_with("ID ") && text(&output.stdout).contains(ID), "{}", text(&output.stdout));
    let output = server.wrenn(&["sandbox", "list", "--json"]);
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()[0]["id"], ID);
    assert_eq!(text(&server.wrenn(&["sandbox", "logs", ID]).stdout), "boot\n[2Jdone\n");
    let output = server.wrenn(&["sandbox", "get", "sb999", "--json"]);
    let error: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(
        (error["error"]["code"].as_str(), error["error"]["request_id"].as_str()),
        (Some("not_found"), Some("req_7"))
    );
    let output = server.wrenn(&["sandbox", "kill", "sb999", ID]);
    assert_eq!(
        (output.status.code(), text(&output.stdout)),
        (Some(1), format!("{ID}\n")),
        "the other one is killed all the same"
    );
}

/// By the session of somebody who decides in a team, without an administrator.
#[test]
fn a_teams_hosts_are_looked_after_by_its_own_people() {
    let server = Server::start();
    let home = tempfile::tempdir().unwrap();
    let session = json!({"api_url": server.api, "token": "x.y.z", "email": "a@example.org", "team_id": "team-1",
        "expires_at": "2100-01-01T00:00:00Z"});
    std::fs::create_dir(home.path().join("wrenn")).unwrap();
    std::fs::write(home.path().join("wrenn/session.json"), session.to_string()).unwrap();
    let wrenn = |arguments: &[&str]| {
        let mut command = server.command(arguments);
        command.env("XDG_CONFIG_HOME", home.path()).env_remove("WRENN_ADMIN_TOKEN").output().unwrap()
    };
    let added = wrenn(&["host", "add", "--team", "team-1", "--provider", "own"]);
    assert!(added.status.success() && text(&added.stdout).contains("once"), "{}", text(&added.stderr));
    assert!(wrenn(&["host", "add"]).status.success());
    let listed = wrenn(&["host", "list"]);
    let lines = text(&listed.stdout);
    assert!(listed.status.success() && lines.contains("byoc") && lines.contains("Cellar"), "{lines}");
    assert_eq!(text(&listed.stderr), "", "what only administrators are told is not missed");
    let careless = wrenn(&["team", "byoc", "team-1"]);
    assert_eq!(careless.status.code(), Some(2), "{}", text(&careless.stderr));
    assert!(text(&careless.stderr).contains("--yes"));
    assert!(wrenn(&["team", "byoc", "team-1", "--yes"]).status.success());
    let calls = server.world.lock().unwrap().calls.clone();
    assert_eq!(
        calls,
        [
            r#"Bearer x.y.z: {"provider":"own","team_id":"team-1","type":"byoc"}"#,
            r#"Bearer x.y.z: {"type":"regular"}"#,
            r#"team-1: {"enabled":true}"#
        ]
    );
}

#[test]
fn idle_time_is_asked_for_shown_and_begun_anew() {
    let server = Server::with_sandbox();
    let output = server.wrenn(&["sandbox", "create", "--idle-timeout", "90", "--on-timeout", "pause", "--no-wait"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let call = server.world.lock().unwrap().calls[0].clone();
    assert_eq!(call, "POST {\"idle_timeout_sec\":90,\"on_timeout\":\"pause\"} true");
    server.world.lock().unwrap().sandboxes.insert(ID.to_owned(), "running");
    let output = server.wrenn(&["sandbox", "timeout", ID, "--idle-timeout", "90", "--on-timeout", "pause"]);
    assert_eq!(text(&output.stdout), "never\npause after 90 s of being idle\n", "{}", text(&output.stderr));
    // A server that knows nothing of it.
    let shown = text(&server.wrenn(&["sandbox", "get", ID]).stdout);
    assert!(shown.contains("idle timeout  never") && !shown.contains("idle since"), "{shown}");
    let output = server.wrenn(&["sandbox", "ping", "sb999", ID]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), format!("{ID}\n")));
    assert!(text(&output.stderr).contains("no such sandbox (not_found"), "{}", text(&output.stderr));
}

#[test]
fn a_platform_that_is_starting_is_waited_for_and_one_that_is_not_there_is_told() {
    let server = Server::start();
    server.world.lock().unwrap().unavailable = 2;
    let output = server.wrenn(&["sandbox", "create"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let output = server.command(&["sandbox", "create"]).env("WRENN_API_KEY", "wrong").output().unwrap();
    assert!(text(&output.stderr).contains("unauthorized"), "{}", text(&output.stderr));
    let output = server.command(&["sandbox", "list"]).env("WRENN_API_URL", "http://127.0.0.1:1").output().unwrap();
    assert!(text(&output.stderr).contains("nothing answers at http://127.0.0.1:1"), "{}", text(&output.stderr));
    let scratch = tempfile::tempdir().unwrap();
    let mut command = server.command(&["sandbox", "list", "--dir"]);
    let output = command.arg(scratch.path()).env_remove("WRENN_API_URL").output().unwrap();
    assert!(text(&output.stderr).contains("wrenn up"), "{}", text(&output.stderr));
}

#[test]
fn long_lists_come_in_parts_and_who_asks_too_much_waits() {
    let server = Server::start();
    for number in 0..2500 {
        server.world.lock().unwrap().sandboxes.insert(format!("sb{number:022}"), "running");
    }
    server.world.lock().unwrap().too_many = 1;
    let listed = server.wrenn(&["sandbox", "list", "--quiet"]);
    assert_eq!(text(&listed.stdout).lines().count(), 2500, "{}", text(&listed.stderr));
    let calls = std::mem::take(&mut server.world.lock().unwrap().calls);
    assert_eq!(calls.len(), 4, "{calls:?}");
    let filtered = server.wrenn(&[
        "sandbox",
        "list",
        "--limit",
        "3",
        "--status",
        "running,paused",
        "--metadata",
        "app=a b",
        "--template",
        "x",
        "--json",
    ]);
    let found: Value = serde_json::from_slice(&filtered.stdout).unwrap();
    assert_eq!(found.as_array().unwrap().len(), 3);
    let calls = std::mem::take(&mut server.world.lock().unwrap().calls);
    let wanted = r#"LIST {"limit": "3", "metadata.app": "a b", "status": "running,paused", "template": "x"}"#;
    assert_eq!(calls, [wanted]);
    // Patience has an end.
    server.world.lock().unwrap().too_many = 100;
    let refused = server.wrenn(&["sandbox", "list"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("rate_limited"));
}

#[test]
fn what_is_followed_goes_on_after_what_was_heard_last() {
    let server = Server::with_sandbox();
    let mut following = server
        .command(&["events", "-f", "--kind", "capsule.create,capsule.pause"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(following.stdout.take().unwrap()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    let (first, second, third) = (next(), next(), next());
    following.kill().unwrap();
    following.wait().unwrap();
    assert!(first.starts_with("    5 ") && first.contains("capsule.create"), "{first}");
    assert!(second.starts_with("    6 ") && third.starts_with("    7 "), "{second} {third}");
    assert!(third.contains("reason=a\\u{1b}[2J") && !third.contains('\u{1b}'), "{third}");
    let calls = server.world.lock().unwrap().calls.clone();
    assert_eq!(calls[0], r#"EVENTS None {"kinds": "capsule.create,capsule.pause"}"#);
    assert!(calls[1].starts_with(r#"EVENTS Some("6")"#), "{calls:?}");

    // The output of a process likewise.
    let logs = server.wrenn(&["logs", "-f", ID, "7"]);
    assert_eq!((text(&logs.stdout), logs.status.code()), ("onetwo!\n".to_owned(), Some(4)), "{}", text(&logs.stderr));
    let calls = server.world.lock().unwrap().calls.clone();
    assert_eq!(calls.last().unwrap(), r#"SAID {"encoding": "base64", "from": "4"}"#);
    // A console is shown without what would steer the terminal.
    assert_eq!(text(&server.wrenn(&["logs", ID]).stdout), "boot\n[2Jdone\n");
}
