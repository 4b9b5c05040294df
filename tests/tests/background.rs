//! Processes that go on by themselves, whoever hears them, and terminals: by the public API, in a real guest.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::{SinkExt as _, StreamExt as _};
use reqwest::Method;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};
use whole_machine::platform::Platform;
use whole_machine::wait;

/// An emulated guest on a busy machine.
const SOON: Duration = Duration::from_secs(60);
/// Of the control plane's memory, for a client that takes nothing of 60 MB.
const SLOW_CLIENT_KIB_MAX: u64 = 32 * 1024;

struct Socket(tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>);

#[derive(Debug, PartialEq)]
enum Got {
    Frame(Value),
    Bytes(Vec<u8>),
    Closed(Option<u16>),
}

impl Socket {
    async fn open(platform: &Platform, path: &str, user_agent: Option<&str>) -> Self {
        Self::try_open(platform, path, user_agent).await.unwrap_or_else(|status| panic!("{path}: {status}"))
    }

    /// The status of the answer when it is refused.
    async fn try_open(platform: &Platform, path: &str, user_agent: Option<&str>) -> Result<Self, u16> {
        let url = format!("{}{path}", platform.api.replace("http", "ws"));
        let mut request = url.into_client_request().unwrap();
        request.headers_mut().insert("X-API-Key", platform.api_key.parse().unwrap());
        if let Some(agent) = user_agent {
            request.headers_mut().insert("User-Agent", agent.parse().unwrap());
        }
        match tokio_tungstenite::connect_async(request).await {
            Ok((socket, _)) => Ok(Self(socket)),
            Err(tokio_tungstenite::tungstenite::Error::Http(answer)) => Err(answer.status().as_u16()),
            Err(error) => panic!("{path}: {error}"),
        }
    }

    async fn say(&mut self, frame: Value) {
        self.0.send(Message::Text(frame.to_string().into())).await.unwrap();
    }

    async fn type_in(&mut self, text: &str) {
        self.0.send(Message::Binary(text.as_bytes().to_vec().into())).await.unwrap();
    }

    async fn got(&mut self) -> Got {
        loop {
            match tokio::time::timeout(SOON, self.0.next()).await.expect("a frame in time") {
                Some(Ok(Message::Text(text))) => return Got::Frame(serde_json::from_str(&text).unwrap()),
                Some(Ok(Message::Binary(bytes))) => return Got::Bytes(bytes.to_vec()),
                Some(Ok(Message::Close(frame))) => return Got::Closed(frame.map(|frame| frame.code.into())),
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Got::Closed(None),
            }
        }
    }

    /// What is shown meanwhile is left out.
    async fn frame(&mut self) -> Value {
        loop {
            match self.got().await {
                Got::Frame(frame) => return frame,
                Got::Bytes(_) => {}
                closed => panic!("not a frame: {closed:?}"),
            }
        }
    }

    /// What is shown, up to and with `wanted`, and in which form it came.
    async fn until(&mut self, wanted: &str) -> (String, &'static str) {
        let (mut shown, mut form) = (String::new(), "");
        while !shown.contains(wanted) {
            match self.got().await {
                Got::Bytes(bytes) => {
                    shown.push_str(&String::from_utf8_lossy(&bytes));
                    form = "binary";
                }
                Got::Frame(frame) if frame["type"] == "output" => {
                    let bytes = STANDARD.decode(frame["data"].as_str().unwrap()).unwrap();
                    shown.push_str(&String::from_utf8_lossy(&bytes));
                    form = "json";
                }
                Got::Frame(frame) if frame["type"] == "ping" => {}
                other => panic!("{wanted} is not shown: {other:?} after {shown:?}"),
            }
        }
        (shown, form)
    }

    /// Output, standard error, the `exit` frame or the error, and the code of the close.
    async fn rest(&mut self) -> (String, String, Value, Option<u16>) {
        let (mut out, mut err, mut last) = (String::new(), String::new(), Value::Null);
        loop {
            match self.got().await {
                Got::Frame(frame) if frame["type"] == "stdout" => out.push_str(frame["data"].as_str().unwrap()),
                Got::Frame(frame) if frame["type"] == "stderr" => err.push_str(frame["data"].as_str().unwrap()),
                Got::Frame(frame) if frame["type"] == "exit" || frame["fatal"] == true => last = frame,
                Got::Bytes(bytes) => out.push_str(&String::from_utf8_lossy(&bytes)),
                Got::Frame(_) => {}
                Got::Closed(code) => return (out, err, last, code),
            }
        }
    }

    async fn closed(&mut self) -> Option<u16> {
        loop {
            if let Got::Closed(code) = self.got().await {
                return code;
            }
        }
    }

    /// A terminal with a shell: its tag.
    async fn shell(&mut self) -> String {
        self.say(json!({"type": "start", "cmd": "/bin/sh", "envs": {"PS1": "$ "}})).await;
        let started = self.frame().await;
        assert!(started["type"] == "started" && started["pid"].as_u64().unwrap() > 0, "{started}");
        started["tag"].as_str().unwrap().to_owned()
    }
}

async fn background(platform: &Platform, id: &str, body: Value) -> (u16, Value) {
    let (status, answer) = platform.call(Method::POST, &format!("/v1/sandboxes/{id}/exec"), Some(body)).await;
    (status.as_u16(), answer)
}

fn script(text: &str, tag: Option<&str>) -> Value {
    json!({"cmd": "/bin/sh", "args": ["-c", text], "background": true, "tag": tag})
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_go_on_by_themselves_and_are_heard_by_whoever_comes() {
    let platform = Platform::start();
    let id = platform.create().await;
    let path = |rest: &str| format!("/v1/sandboxes/{id}{rest}");
    let hear =
        async |selector: &str| Socket::open(&platform, &path(&format!("/processes/{selector}/stream")), None).await;

    // In the background, with all that a command has; its tag is its own.
    let with = json!({"cmd": "sh", "args": ["-c", "echo $A in $PWD as $(id -un); sleep 0.5; echo err >&2; sleep 4; echo late; exit 7"],
        "background": true, "tag": "a job", "envs": {"A": "b c"}, "cwd": "/tmp", "user": "user"});
    let (status, started) = background(&platform, &id, with.clone()).await;
    assert_eq!((status, &started["tag"], &started["sandbox_id"]), (202, &json!("a job"), &json!(id)), "{started}");
    let pid = started["pid"].as_u64().unwrap();
    let (status, refused) = background(&platform, &id, with).await;
    assert_eq!((status, refused["error"]["code"].as_str()), (409, Some("conflict")), "{refused}");
    let (status, listed) = platform.call(Method::GET, &path("/processes"), None).await;
    let listed_one = listed["processes"].as_array().unwrap().iter().find(|it| it["pid"] == pid).unwrap();
    assert!(status == 200 && listed_one["tag"] == "a job" && listed_one["cmd"] == "sh", "{listed}");

    // Two hear it late, one of them not from the beginning on; both hear all that is left, and its end.
    wait::until("that it has said something", SOON, || async {
        let mut socket = hear("a%20job").await;
        let _ = socket.frame().await;
        (socket.frame().await["type"] == "stdout").then_some(())
    })
    .await;
    let mut first = hear("a%20job").await;
    assert_eq!(first.frame().await, json!({"type": "start", "pid": pid, "output_from": 0}));
    let mut second = hear(&format!("{pid}")).await;
    let mut third =
        Socket::open(&platform, &path(&format!("/processes/{pid}/stream?from=4&encoding=base64")), None).await;
    assert_eq!(third.frame().await["output_from"], 4);
    let exit = json!({"type": "exit", "exit_code": 7});
    let whole = ("b c in /tmp as user\nlate\n".to_owned(), "err\n".to_owned(), exit.clone(), Some(1000));
    assert_eq!(first.rest().await, whole);
    assert_eq!(second.rest().await, whole);
    let (out, _, last, _) = third.rest().await;
    assert!(last == exit && out.starts_with(&STANDARD.encode("in /tmp as user\n")[..12]), "{out}");
    // And after it.
    assert_eq!(hear("a%20job").await.rest().await, whole);
    assert_eq!(hear(&format!("{pid}")).await.rest().await, whole);
    // Its tag is free again.
    assert_eq!(background(&platform, &id, script("true", Some("a job"))).await.0, 202);

    // Nobody's tag, and none that could be; a process that is unknown is told of after the upgrade.
    let (status, unnamed) = background(&platform, &id, script("sleep 600", None)).await;
    let tag = unnamed["tag"].as_str().unwrap().to_owned();
    assert!(status == 202 && tag.len() == 13 && tag.starts_with("proc-"), "{unnamed}");
    for wrong in ["", "12", "a/b", "a\nb", &"x".repeat(65)] {
        let (status, answer) = background(&platform, &id, script("true", Some(wrong))).await;
        assert_eq!((status, answer["error"]["code"].as_str()), (400, Some("invalid_request")), "{wrong}");
    }
    for body in [
        json!({"cmd": "/no/such/program", "background": true}),
        json!({"cmd": "true", "background": true, "timeout_sec": -1}),
        json!({"cmd": "true", "background": true, "cwd": "/no/such"}),
    ] {
        let (status, answer) = background(&platform, &id, body.clone()).await;
        assert!([400, 404, 409].contains(&status), "{body}: {status} {answer}");
    }
    for selector in ["999999", "no-such-tag"] {
        let (_, _, error, code) = hear(selector).await.rest().await;
        assert_eq!((&error["code"], code), (&json!("not_found"), Some(1000)), "{error}");
        let (status, _) = platform.call(Method::DELETE, &path(&format!("/processes/{selector}")), None).await;
        assert_eq!(status, 404);
    }
    for (rest, status) in [("/processes/1/stream?from=-1", 400), ("/processes/1/stream?encoding=x", 400)] {
        assert_eq!(Socket::try_open(&platform, &path(rest), None).await.err(), Some(status), "{rest}");
    }
    let nobodys = "/v1/sandboxes/sb0000000000000000000000/processes/1/stream";
    assert_eq!(Socket::try_open(&platform, nobodys, None).await.err(), Some(404));
    let mut killed = hear(&tag).await;
    assert_eq!(killed.frame().await["type"], "start");
    let (status, _) = platform.call(Method::DELETE, &path(&format!("/processes/{tag}?signal=SIGTERM")), None).await;
    assert_eq!(status, 204);
    assert_eq!(killed.rest().await.2["exit_code"], -1);
    // A time of its own ends it, whether or not anybody listens.
    let mut timed = script("sleep 600", Some("timed"));
    timed["timeout_sec"] = json!(1);
    assert_eq!(background(&platform, &id, timed).await.0, 202);
    wait::until("the end of its time", SOON, || async {
        let (_, listed) = platform.call(Method::GET, &path("/processes"), None).await;
        listed["processes"].as_array().unwrap().iter().all(|it| it["tag"] != "timed").then_some(())
    })
    .await;

    // A client that takes nothing holds its process back and nobody's memory; others are not kept from it for long.
    let before = resident_kib(platform.pid_of("wrenn-cp").unwrap());
    let much = "sleep 2; head -c 60000000 /dev/zero | tr '\\0' y; echo; echo done";
    let (_, started) = background(&platform, &id, script(much, Some("much"))).await;
    let pid = started["pid"].as_u64().unwrap();
    let slow = hear("much").await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    let grown = resident_kib(platform.pid_of("wrenn-cp").unwrap()).saturating_sub(before);
    assert!(grown < SLOW_CLIENT_KIB_MAX, "{grown} KiB more");
    let (code, _) = platform.shell(&id, &format!("kill -0 {pid}")).await;
    assert_eq!(code, 0, "it waits for its client");
    drop(slow);
    let (out, _, last, _) = hear("much").await.rest().await;
    assert!(last["exit_code"] == 0 && out.ends_with("done\n"), "{last}");

    // The sandbox sleeps: they are told, and none of them wakes it. They go on with it.
    let (_, _) = background(&platform, &id, script("while :; do echo still; sleep 1; done", Some("talker"))).await;
    let (mut listener, mut terminal) = (hear("talker").await, Socket::open(&platform, &path("/pty"), None).await);
    let tag = terminal.shell().await;
    terminal.type_in("echo be$((1))fore\n").await;
    terminal.until("be1fore").await;
    let (status, paused) = platform.call(Method::POST, &path("/pause?wait_sec=120"), None).await;
    assert_eq!(status, 200, "{paused}");
    let (listener, terminal) = (listener.rest().await, terminal.rest().await);
    assert_eq!((&listener.2["code"], listener.3), (&json!("invalid_state"), Some(4409)), "{listener:?}");
    assert_eq!((&terminal.2["code"], terminal.3), (&json!("invalid_state"), Some(4409)), "{terminal:?}");
    for rest in ["/processes/talker/stream", "/pty"] {
        assert_eq!(Socket::try_open(&platform, &path(rest), None).await.err(), Some(409), "{rest}");
    }
    let (status, resumed) = platform.call(Method::POST, &path("/resume?wait_sec=120"), None).await;
    assert_eq!(status, 200, "{resumed}");
    let mut again = Socket::open(&platform, &path("/pty"), None).await;
    again.say(json!({"type": "connect", "tag": tag})).await;
    again.until("be1fore").await;
    again.type_in("echo af$((2))ter\n").await;
    again.until("af2ter").await;
    let mut listener = hear("talker").await;
    assert_eq!(listener.frame().await["type"], "start");
    platform.kill(&id).await;
    let (listener, again) = (listener.rest().await, again.rest().await);
    assert_eq!((&listener.2["code"], listener.3), (&json!("not_found"), Some(4404)), "{listener:?}");
    assert_eq!((&again.2["code"], again.3), (&json!("not_found"), Some(4404)), "{again:?}");
    assert_eq!(platform.finish(), Default::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn terminals_are_typed_in_resized_cut_off_found_again_and_killed() {
    let platform = Platform::start();
    let id = platform.create().await;
    let open = async |query: &str, agent: Option<&str>| {
        Socket::open(&platform, &format!("/v1/sandboxes/{id}/pty{query}"), agent).await
    };

    // Typed in, with its size, in order.
    let mut terminal = open("", None).await;
    let tag = terminal.shell().await;
    assert!(tag.len() == 12 && tag.starts_with("pty-"), "{tag}");
    terminal.type_in("tty && echo $TERM && stty size\n").await;
    let (shown, form) = terminal.until("24 80").await;
    assert!(shown.contains("/dev/pts/") && shown.contains("xterm") && form == "binary", "{shown}");
    terminal.say(json!({"type": "resize", "cols": 132, "rows": 41})).await;
    terminal.type_in("stty size\n").await;
    terminal.until("41 132").await;
    for n in 0..200 {
        terminal.type_in(&format!("echo -n {n}.\n")).await;
    }
    terminal.type_in("echo; echo last$((1))\n").await;
    let (shown, _) = terminal.until("last1").await;
    let echoed: Vec<usize> = (0..200).map(|n| shown.find(&format!("echo -n {n}.")).expect("each is there")).collect();
    assert!(echoed.is_sorted(), "in order");
    // ^C.
    terminal.type_in("sleep 600\n").await;
    terminal.until("sleep 600").await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    terminal.type_in("\x03").await;
    terminal.type_in("echo co$((1))de\n").await;
    terminal.until("co1de").await;

    // What is wrong is answered, and it goes on.
    for (frame, code) in [
        (json!({"type": "resize", "cols": 0, "rows": 24}), "invalid_request"),
        (json!({"type": "resize", "cols": 80, "rows": 1001}), "invalid_request"),
        (json!({"type": "resize", "cols": -1, "rows": 65_536}), "invalid_request"),
        (json!({"type": "resize", "cols": 4_294_967_376_u64, "rows": 24}), "invalid_request"),
        (json!({"type": "resize"}), "invalid_request"),
        (json!({"type": "input", "data": "%"}), "invalid_request"),
        (json!({"type": "dance"}), "invalid_request"),
        (json!([]), "invalid_request"),
        (json!({"type": "start"}), "invalid_state"),
        (json!({"type": "connect", "tag": tag}), "invalid_state"),
    ] {
        terminal.say(frame.clone()).await;
        let answer = terminal.frame().await;
        assert_eq!((&answer["code"], &answer["fatal"]), (&json!(code), &json!(false)), "{frame}: {answer}");
    }
    terminal.say(json!({"type": "pong"})).await;
    terminal.type_in("stty size\n").await;
    terminal.until("41 132").await;

    // Cut off without a word, and found again: what was shown, then what is new; from a position on, when that is asked for.
    terminal.type_in("(sleep 1; echo mean$((1))while) &\n").await;
    drop(terminal);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut again = open("", None).await;
    again.say(json!({"type": "connect", "tag": tag, "position": true})).await;
    let connected = again.frame().await;
    assert_eq!((&connected["type"], &connected["output_from"]), (&json!("connected"), &json!(0)), "{connected}");
    let (shown, _) = again.until("mean1while").await;
    assert!(shown.contains("24 80"), "{shown}");
    let mut from = open("", None).await;
    from.say(json!({"type": "connect", "tag": tag, "from": shown.find("41 132").unwrap(), "position": true})).await;
    assert!(from.frame().await["output_from"].as_u64().unwrap() > 0);
    assert!(from.until("mean1while").await.0.starts_with("41 132"));
    // Two at one terminal.
    from.type_in("echo bo$((1))th\n").await;
    from.until("bo1th").await;
    again.until("bo1th").await;
    drop(from);

    // Base64, by the query; and by what the client sends.
    let mut json = open("?frames=json", None).await;
    json.say(json!({"type": "connect", "tag": tag})).await;
    assert_eq!(json.until("bo1th").await.1, "json");
    let mut old = open("", None).await;
    old.say(json!({"type": "connect", "tag": tag})).await;
    old.say(json!({"type": "input", "data": STANDARD.encode("echo o$((1))ld\n")})).await;
    old.until("o1ld").await;
    old.say(json!({"type": "input", "data": STANDARD.encode("echo o$((2))ld\n")})).await;
    assert_eq!(old.until("o2ld").await.1, "json");
    let mut asked = open("?frames=binary", None).await;
    asked.say(json!({"type": "connect", "tag": tag})).await;
    asked.say(json!({"type": "input", "data": STANDARD.encode("echo bi$((1))n\n")})).await;
    assert_eq!(asked.until("bi1n").await.1, "binary");
    let refused = Socket::try_open(&platform, &format!("/v1/sandboxes/{id}/pty?frames=x"), None).await;
    assert_eq!(refused.err(), Some(400));
    drop((json, old, asked));

    // Either generation of the published SDK: asked, and known by its answer, or by none.
    let agent = Some("python-httpx/0.28.1");
    for (answers, form) in [(true, "binary"), (false, "json")] {
        let mut either = open("", agent).await;
        let began = Instant::now();
        either.say(json!({"type": "connect", "tag": tag})).await;
        assert_eq!(either.frame().await, json!({"type": "ping"}));
        if answers {
            either.say(json!({"type": "pong"})).await;
        }
        assert_eq!(either.until("bi1n").await.1, form);
        assert!(answers || began.elapsed() >= Duration::from_secs(2));
    }

    // Killed beside what it does not read; its end reaches all who are there.
    again.type_in("sleep 600\n").await;
    again.type_in(&"x".repeat(300_000)).await;
    again.say(json!({"type": "kill"})).await;
    let (_, _, last, code) = again.rest().await;
    assert_eq!((last, code), (json!({"type": "exit", "exit_code": -1}), Some(1000)));
    let mut gone = open("", None).await;
    gone.say(json!({"type": "connect", "tag": "pty-00000000"})).await;
    let (_, _, error, _) = gone.rest().await;
    assert_eq!(error["code"], "not_found", "{error}");

    // Before there is a terminal, and what cannot be one.
    let mut early = open("", None).await;
    for frame in
        [json!({"type": "kill"}), json!({"type": "input", "data": ""}), json!({"type": "resize", "cols": 1, "rows": 1})]
    {
        early.say(frame).await;
        assert_eq!(early.frame().await["code"], "invalid_state");
    }
    early.type_in("x").await;
    assert_eq!(early.frame().await["code"], "invalid_state");
    early.say(json!({"type": "start", "cmd": "/bin/sh", "args": ["-c", "exit 3"], "cols": 1000, "rows": 1})).await;
    assert_eq!(early.frame().await["type"], "started");
    assert_eq!(early.rest().await.2["exit_code"], 3);
    for start in [
        json!({"type": "start", "cmd": "/no/such/program"}),
        json!({"type": "start", "cols": 1001}),
        json!({"type": "start", "rows": -1}),
        json!({"type": "start", "cmd": "sh", "cwd": "/no/such"}),
        json!({"type": "start", "cmd": "sh", "user": "no-such-user"}),
        json!({"type": "start", "cmd": "sh", "envs": {"a=b": ""}}),
        json!({"type": "connect", "tag": ""}),
    ] {
        let mut wrong = open("", None).await;
        wrong.say(start.clone()).await;
        let (_, _, error, code) = wrong.rest().await;
        assert!(error["fatal"] == true && code == Some(1000), "{start}: {error} {code:?}");
    }

    // What is no conversation at all.
    let mut nonsense = open("", None).await;
    for _ in 0..11 {
        nonsense.say(json!({"type": "dance"})).await;
    }
    assert_eq!(nonsense.closed().await, Some(1008));
    let mut large = open("", None).await;
    let _ = large.0.send(Message::Text("x".repeat((1 << 20) + 1).into())).await;
    assert_eq!(large.closed().await, Some(1009));
    let mut binary = open("", None).await;
    let frame = Frame::message(vec![b'"', 0xff, b'"'], OpCode::Data(Data::Text), true);
    binary.0.send(Message::Frame(frame)).await.unwrap();
    assert_eq!(binary.closed().await, Some(1007));

    platform.kill(&id).await;
    assert_eq!(platform.finish(), Default::default());
}

fn resident_kib(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
