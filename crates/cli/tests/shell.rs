//! `wrenn shell` in a real terminal against a server that speaks the API and has no sandboxes: keys, sizes, what happens when the connection
//! breaks, and that the terminal is always left as it was. Real shells are under test in `tests/` of the repository.

#[allow(dead_code)] // These tests use a part of it.
#[path = "../../../tests/src/terminal.rs"]
mod terminal;

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use terminal::Terminal;

const ID: &str = "sb0123456789abcdefghij12";
const SOON: Duration = Duration::from_secs(20);

/// A shell that shows what is typed, in capitals, and does what some words say.
#[derive(Default)]
struct World {
    /// What clients said, in order.
    calls: Vec<String>,
    /// All that the shell has shown.
    shown: Vec<u8>,
    /// So many connections are refused.
    away: usize,
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
        let routes = Router::new().route("/v1/sandboxes/{id}/pty", get(pty)).with_state(world.clone());
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let api = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(async move { axum::serve(listener, routes).await });
        Self { api, world, _runtime: runtime }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn"));
        command
            .args(["shell", ID])
            .args(arguments)
            .env("WRENN_API_URL", &self.api)
            .env("WRENN_API_KEY", "wrn_test")
            .env("TERM", "xterm-test")
            .current_dir("/");
        command
    }

    fn said(&self, wanted: &str) -> bool {
        self.world.lock().unwrap().calls.iter().any(|call| call == wanted)
    }

    fn wait_said(&self, wanted: &str) {
        let began = std::time::Instant::now();
        while !self.said(wanted) {
            assert!(began.elapsed() < SOON, "{wanted} was not said, but {:?}", self.world.lock().unwrap().calls);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

async fn pty(State(world): State<Shared>, headers: HeaderMap, upgrade: WebSocketUpgrade) -> Response {
    if headers.get("x-api-key").is_none() {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let is_away = {
        let mut world = world.lock().unwrap();
        let is_away = world.away > 0;
        world.away = world.away.saturating_sub(1);
        is_away
    };
    if is_away {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    upgrade.on_upgrade(move |socket| converse(world, socket))
}

async fn converse(world: Shared, mut socket: WebSocket) {
    let say = |value: Value| Message::text(value.to_string());
    while let Some(Ok(message)) = socket.recv().await {
        let typed = match message {
            Message::Text(text) => {
                let frame: Value = serde_json::from_str(&text).unwrap();
                world.lock().unwrap().calls.push(frame.to_string());
                match frame["type"].as_str().unwrap() {
                    "start" => {
                        let _ = socket.send(say(json!({"type": "started", "tag": "pty-0badcafe", "pid": 7}))).await;
                        let _ = socket.send(say(json!({"type": "ping"}))).await;
                    }
                    "connect" => {
                        let from = usize::try_from(frame["from"].as_u64().unwrap_or(0)).unwrap();
                        let missed = world.lock().unwrap().shown[from..].to_vec();
                        let connected = json!({"type": "connected", "pid": 7, "output_from": from});
                        let _ = socket.send(say(connected)).await;
                        let _ = socket.send(Message::Binary(missed.into())).await;
                    }
                    "kill" => {
                        let _ = socket.send(say(json!({"type": "exit", "exit_code": -1}))).await;
                    }
                    _ => {}
                }
                continue;
            }
            Message::Binary(bytes) => bytes,
            _ => continue,
        };
        let text = String::from_utf8_lossy(&typed).into_owned();
        world.lock().unwrap().calls.push(format!("typed {text:?}"));
        world.lock().unwrap().shown.extend(text.to_uppercase().bytes());
        match text.as_str() {
            // What is shown meanwhile is heard by the next connection.
            "break" => return,
            "pause" => {
                let close = CloseFrame { code: 4409, reason: "invalid_state".into() };
                let _ = socket.send(Message::Close(Some(close))).await;
                return;
            }
            "exit\r" | "\u{4}" => {
                let _ = socket.send(Message::Binary(b"bye".to_vec().into())).await;
                let _ = socket.send(say(json!({"type": "exit", "exit_code": 5}))).await;
                return;
            }
            _ => {
                let _ = socket.send(Message::Binary(text.to_uppercase().into_bytes().into())).await;
            }
        }
    }
}

#[test]
fn keys_and_sizes_go_there_and_the_exit_code_comes_back() {
    let server = Server::start();
    let mut terminal =
        Terminal::run(server.command(&["--cmd", "/bin/sh", "--env", "A=b", "--cwd", "/tmp", "--", "-l"]), 100, 30);
    let before = terminal.settings();
    terminal.wait_raw(SOON);
    terminal.type_in("echo");
    terminal.wait_for("ECHO", SOON);
    // Keys of the terminal's own are the shell's.
    terminal.type_in("\u{3}");
    server.wait_said("typed \"\\u{3}\"");
    terminal.type_in("\u{1d}\u{1d}");
    server.wait_said("typed \"\\u{1d}\"");
    terminal.resize(120, 40);
    server.wait_said(r#"{"cols":120,"rows":40,"type":"resize"}"#);
    server.wait_said(r#"{"type":"pong"}"#);
    terminal.type_in("exit\r");
    assert_eq!(terminal.exit_code(SOON), Some(5), "{}", terminal.shown());
    terminal.wait_for("bye", SOON);
    let after = terminal.settings();
    assert_eq!(after.local_flags, before.local_flags);
    assert_eq!((after.input_flags, after.output_flags), (before.input_flags, before.output_flags));
    let start: Value = serde_json::from_str(&server.world.lock().unwrap().calls[0]).unwrap();
    assert_eq!((&start["cmd"], &start["args"], &start["cwd"]), (&json!("/bin/sh"), &json!(["-l"]), &json!("/tmp")));
    assert_eq!((&start["cols"], &start["rows"]), (&json!(100), &json!(30)));
    assert_eq!((&start["envs"]["TERM"], &start["envs"]["A"]), (&json!("xterm-test"), &json!("b")));
}

#[test]
fn a_detached_shell_is_come_back_to() {
    let server = Server::start();
    let mut terminal = Terminal::run(server.command(&[]), 80, 24);
    terminal.wait_raw(SOON);
    terminal.type_in("one");
    terminal.wait_for("ONE", SOON);
    terminal.type_in("\u{1d}?");
    terminal.wait_for("Ctrl-] and then", SOON);
    terminal.type_in("\u{1d}d");
    assert_eq!(terminal.exit_code(SOON), Some(0));
    terminal.wait_for(&format!("wrenn shell {ID} --attach pty-0badcafe"), SOON);
    assert!(!terminal.is_raw());

    let mut terminal = Terminal::run(server.command(&["--attach", "pty-0badcafe"]), 80, 24);
    terminal.wait_for("ONE", SOON);
    terminal.type_in("\u{1d}k");
    // By a signal, of which the number is not told.
    assert_eq!(terminal.exit_code(SOON), Some(137));
}

#[test]
fn a_connection_that_breaks_is_opened_again_where_it_stopped() {
    let server = Server::start();
    let mut terminal = Terminal::run(server.command(&[]), 80, 24);
    terminal.wait_raw(SOON);
    terminal.type_in("one");
    terminal.wait_for("ONE", SOON);
    server.world.lock().unwrap().away = 2;
    terminal.type_in("break");
    terminal.wait_for("connection is lost", SOON);
    // Typed into nothing, and sent when there is somebody again.
    terminal.type_in("later");
    terminal.wait_for("connected again", SOON);
    terminal.wait_for("LATER", SOON);
    let shown = terminal.shown();
    assert_eq!((shown.matches("ONE").count(), shown.matches("BREAK").count()), (1, 1), "{shown:?}");
    assert!(server.said(r#"{"from":3,"position":true,"tag":"pty-0badcafe","type":"connect"}"#));
    // What cannot come back is not tried again.
    terminal.type_in("pause");
    assert_eq!(terminal.exit_code(SOON), Some(125));
    terminal.wait_for("does not run any more", SOON);
    assert!(!terminal.is_raw());
}

#[test]
fn signals_and_refusals_leave_the_terminal_as_it_was() {
    let server = Server::start();
    let mut terminal = Terminal::run(server.command(&[]), 80, 24);
    terminal.wait_raw(SOON);
    server.wait_said(r#"{"type":"pong"}"#);
    kill(Pid::from_raw(terminal.pid()), Signal::SIGTERM).unwrap();
    assert_eq!(terminal.exit_code(SOON), Some(143));
    assert!(!terminal.is_raw());

    let mut command = server.command(&[]);
    command.env("WRENN_API_URL", "http://127.0.0.1:1");
    let mut terminal = Terminal::run(command, 80, 24);
    assert_eq!(terminal.exit_code(SOON), Some(125));
    assert!(!terminal.is_raw());
}

#[test]
fn without_a_terminal_what_comes_is_typed_and_its_end_too() {
    let server = Server::start();
    let mut shell =
        server.command(&[]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    shell.stdin.take().unwrap().write_all(b"from a pipe \x1dd").unwrap();
    let output = shell.wait_with_output().unwrap();
    // The keys of a person mean nothing there.
    assert_eq!(String::from_utf8_lossy(&output.stdout), "FROM A PIPE \u{1d}Dbye");
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    let refused = server.command(&["--json"]).stdin(Stdio::null()).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
}
