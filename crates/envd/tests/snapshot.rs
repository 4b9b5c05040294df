//! Connections around a snapshot: prepare closes the idle ones, a new incarnation resets who has not shown it, and neither touches the
//! processes.

mod guest;

use std::io::{ErrorKind, Write as _};
use std::process::{Command, Stdio};

use bytes::Bytes;
use guest::{Envd, SOON, request, until};
use http::Response;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

const CONTROL: (&str, &str) = ("x-control-token", "host");

/// Tells the inner run of a test that it has its network.
const INSIDE: &str = "WRENN_TEST_CYCLES";
/// Of each kind, but for the streams.
const PEERS: usize = 4;
const STREAMS: usize = 8;
/// After so many cycles nothing is made for the first time any more.
const WARM: usize = 5;

fn init(incarnation: &str) -> String {
    json!({"incarnation": incarnation, "accessToken": "user", "controlToken": "host"}).to_string()
}

async fn send(
    connection: &mut SendRequest<Full<Bytes>>,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: String,
) -> hyper::Result<Response<Incoming>> {
    connection.ready().await?;
    timeout(SOON, connection.send_request(request(method, path, headers, body))).await.expect("an answer in time")
}

/// A connection as a raw socket, after one answered request that showed `incarnation`.
async fn kept(envd: &Envd, incarnation: Option<&str>) -> TcpStream {
    let mut stream = TcpStream::connect(envd.address()).await.unwrap();
    let shown = incarnation.map(|it| format!("x-incarnation: {it}\r\n")).unwrap_or_default();
    stream.write_all(format!("GET /health HTTP/1.1\r\nhost: x\r\n{shown}\r\n").as_bytes()).await.unwrap();
    let answer = head(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    stream
}

async fn head(stream: &mut TcpStream) -> String {
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\n") {
        read.push(timeout(SOON, stream.read_u8()).await.expect("a head in time").expect("a head"));
    }
    String::from_utf8(read).unwrap()
}

async fn is_reset(stream: &mut TcpStream) -> bool {
    match timeout(SOON, stream.read(&mut [0; 1])).await.expect("the end in time") {
        Err(e) => e.kind() == ErrorKind::ConnectionReset,
        Ok(_) => false,
    }
}

async fn is_closed(stream: &mut TcpStream) -> bool {
    matches!(timeout(SOON, stream.read(&mut [0; 1])).await.expect("the end in time"), Ok(0))
}

#[tokio::test]
async fn prepare_closes_idle_connections_and_keeps_none_alive() {
    let envd = Envd::start();
    let mut host = envd.connection().await;
    assert_eq!(send(&mut host, "POST", "/init", &[], init("one")).await.unwrap().status(), 204);
    let mut idle =
        [kept(&envd, Some("one")).await, kept(&envd, None).await, TcpStream::connect(envd.address()).await.unwrap()];
    let shown = [("x-access-token", "user")];
    let mut busy = envd
        .stream(guest::START, &shown, json!({"process": {"cmd": "/bin/sh", "args": ["-c", "read x; echo $x"]}}))
        .await;
    let pid = busy.pid().await;
    let prepared = send(&mut host, "POST", "/snapshot/prepare", &[CONTROL], String::new()).await.unwrap();
    assert_eq!((prepared.status().as_u16(), prepared.headers()["connection"].to_str().unwrap()), (204, "close"));
    for stream in &mut idle {
        assert!(is_closed(stream).await);
    }
    // Asked again it is the same, and every answer ends its connection.
    let (status, headers, _) = envd.exchange("POST", "/snapshot/prepare", &[CONTROL], "").await;
    assert_eq!((status.as_u16(), headers["connection"].to_str().unwrap()), (204, "close"));
    assert_eq!(envd.exchange("GET", "/health", &[], "").await.1["connection"], "close");
    // The same incarnation again: nothing was restored, nobody is reset, all goes on as before.
    assert_eq!(envd.exchange("POST", "/init", &[CONTROL], init("one")).await.0, 204);
    assert!(!envd.exchange("GET", "/health", &[], "").await.1.contains_key("connection"));
    let input = json!({"process": {"pid": pid}, "input": {"stdin": "aGkK"}}).to_string();
    let headers = [&guest::JSON[..], &shown].concat();
    assert_eq!(envd.exchange("POST", "/process.Process/SendInput", &headers, input).await.0, 200);
    assert_eq!(busy.outcome().await.text(), "hi\n");
}

#[tokio::test]
async fn a_new_incarnation_resets_everybody_who_has_not_shown_it() {
    let envd = Envd::start();
    let (status, ..) = envd.exchange("POST", "/init", &[], init("0")).await;
    assert_eq!(status, 204);
    for round in 1..=50 {
        let (before, now) = ((round - 1).to_string(), round.to_string());
        let shown = [("x-access-token", "user"), ("x-incarnation", before.as_str())];
        let mut stream =
            envd.stream(guest::START, &shown, json!({"process": {"cmd": "sleep", "args": ["1000"]}})).await;
        let pid = stream.pid().await;
        let mut old = kept(&envd, Some(&before)).await;
        let mut silent = kept(&envd, None).await;
        let mut fresh_unused = TcpStream::connect(envd.address()).await.unwrap();
        let mut half = TcpStream::connect(envd.address()).await.unwrap();
        half.write_all(b"GET /health HT").await.unwrap();
        // Its head is with envd, so that the connection has been accepted and has shown who it is.
        let mut early = kept(&envd, Some(&now)).await;
        if round % 2 == 0 {
            assert_eq!(envd.exchange("POST", "/snapshot/prepare", &[CONTROL], "").await.0, 204);
        }

        let mut host = envd.connection().await;
        let answer = send(&mut host, "POST", "/init", &[CONTROL], init(&now)).await.unwrap();
        assert_eq!(answer.status(), 204, "the request that brings it lives on");
        if round % 2 == 1 {
            for (name, stream) in
                [("old", &mut old), ("silent", &mut silent), ("unused", &mut fresh_unused), ("half", &mut half)]
            {
                assert!(is_reset(stream).await, "round {round}: {name}");
            }
            early.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
            assert!(head(&mut early).await.starts_with("HTTP/1.1 204"));
        } else {
            assert!(is_closed(&mut old).await && is_closed(&mut early).await);
        }
        assert!(stream.next().await.is_none(), "a stream of the old incarnation is cut");
        assert_eq!(send(&mut host, "GET", "/health", &[], String::new()).await.unwrap().status(), 204);
        // The process is still there, for whoever connects again.
        let shown = [("x-access-token", "user"), ("x-incarnation", now.as_str())];
        let again = envd.stream(guest::CONNECT, &shown, json!({"process": {"pid": pid}})).await;
        let kill = json!({"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"}).to_string();
        let headers = [&guest::JSON[..], &shown].concat();
        assert_eq!(envd.exchange("POST", "/process.Process/SendSignal", &headers, kill).await.0, 200);
        assert_eq!(again.outcome().await.end["status"], "signal: killed");
    }
}

#[tokio::test]
async fn nothing_starts_while_a_snapshot_is_made() {
    let envd = Envd::start();
    assert_eq!(envd.exchange("POST", "/init", &[], init("one")).await.0, 204);
    assert_eq!(envd.exchange("POST", "/snapshot/prepare", &[CONTROL], "").await.0, 204);
    let shown = [("x-access-token", "user"), ("x-incarnation", "two")];
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("ran");
    let asked = json!({"process": {"cmd": "touch", "args": [trace.to_str().unwrap()]}});
    let starting = async { envd.stream(guest::START, &shown, asked).await.outcome().await };
    let restoring = async {
        // A whole exchange later the start has been heard.
        for _ in 0..3 {
            assert_eq!(envd.exchange("GET", "/health", &[("x-incarnation", "two")], "").await.0, 204);
        }
        assert!(!trace.exists());
        assert_eq!(envd.exchange("POST", "/init", &[CONTROL], init("two")).await.0, 204);
    };
    let (ran, ()) = tokio::join!(starting, restoring);
    assert_eq!(ran.exit_code(), 0);
    until("it ran", async || trace.exists()).await;
}

#[tokio::test]
async fn a_held_identity_lets_nothing_run() {
    let envd = Envd::start();
    let held = async |incarnation: &str| envd.exchange("POST", "/init/held", &[CONTROL], init(incarnation)).await.0;
    assert_eq!(envd.exchange("POST", "/init", &[], init("one")).await.0, 204);
    assert_eq!(held("two").await, 409, "users' processes run");
    assert_eq!(envd.exchange("POST", "/snapshot/prepare", &[CONTROL], "").await.0, 204);
    for incarnation in ["two", "three", "three"] {
        assert_eq!(held(incarnation).await, 204, "{incarnation}");
    }
    assert_eq!(held("one").await, 409, "that one is over");
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("ran");
    let shown = [("x-access-token", "user"), ("x-incarnation", "four")];
    let asked = json!({"process": {"cmd": "touch", "args": [trace.to_str().unwrap()]}});
    let starting = async { envd.stream(guest::START, &shown, asked).await.outcome().await };
    let going_on = async {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        assert!(!trace.exists());
        assert_eq!(envd.exchange("POST", "/init", &[CONTROL], init("four")).await.0, 204);
    };
    let (ran, ()) = tokio::join!(starting, going_on);
    assert_eq!(ran.exit_code(), 0);
    assert!(trace.exists());
}

#[tokio::test]
async fn a_late_init_of_an_earlier_incarnation_changes_and_resets_nothing() {
    let envd = Envd::start();
    for incarnation in ["one", "two"] {
        assert_eq!(envd.exchange("POST", "/init", &[CONTROL], init(incarnation)).await.0, 204);
    }
    let mut present = kept(&envd, Some("two")).await;
    let late = json!({"incarnation": "one", "accessToken": "old", "controlToken": "host"}).to_string();
    assert_eq!(envd.exchange("POST", "/init", &[CONTROL], late).await.0, 409);
    present.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert!(head(&mut present).await.starts_with("HTTP/1.1 204"));
    assert_eq!(envd.exchange("GET", "/envs", &[("x-access-token", "user")], "").await.0, 200);
    let (status, headers, _) = envd.exchange("POST", "/snapshot/prepare", &[CONTROL], "").await;
    assert_eq!((status.as_u16(), headers["x-disk-flushed"].as_bytes()), (204, &b"yes"[..]));
}

#[tokio::test]
async fn fifty_snapshots_with_lost_ends_leave_nothing_behind() {
    if inside("fifty_snapshots_with_lost_ends_leave_nothing_behind") {
        cycles(50).await;
    }
}

#[tokio::test]
#[ignore = "takes minutes: make check-long"]
async fn five_hundred_snapshots_with_lost_ends_leave_nothing_behind() {
    if inside("five_hundred_snapshots_with_lost_ends_leave_nothing_behind") {
        cycles(500).await;
    }
}

/// Runs the test of this name in a network of its own, where no packets but its own are lost. True inside of it.
fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: {test}: not root");
        return false;
    }
    let status = Command::new("unshare")
        .args(["--net", "sh", "-ec", "ip link set lo up; exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--include-ignored", "--test-threads=1"])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
    false
}

/// From now on nobody hears that a connection has ended, as when host and guest do not run at the same time.
fn lose_ends(lost: bool) {
    let rules = if lost {
        "add table inet wrenn_test
add chain inet wrenn_test out { type filter hook output priority 0; }
add rule inet wrenn_test out tcp flags & (fin | rst) != 0 drop\n"
    } else {
        "delete table inet wrenn_test\n"
    };
    let mut child = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

fn descriptors(envd: &Envd) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", envd.pid())).unwrap().count()
}

fn threads(envd: &Envd) -> usize {
    std::fs::read_dir(format!("/proc/{}/task", envd.pid())).unwrap().count()
}

/// Whatever is said on an old connection, its end is the answer.
async fn is_dead(mut stream: TcpStream, say: &[u8]) -> bool {
    // Refused when the end is known already.
    let _ = stream.write_all(say).await;
    let mut read = Vec::new();
    let _ = timeout(SOON, stream.read_to_end(&mut read)).await.expect("the end in time");
    read.is_empty()
}

/// There is no microVM here: a stopped envd and a new incarnation are what a snapshot and its restore are from inside.
async fn cycles(count: usize) {
    let envd = Envd::start();
    let process = Pid::from_raw(i32::try_from(envd.pid()).unwrap());
    assert_eq!(envd.exchange("POST", "/init", &[], init("0")).await.0, 204);
    let mut warm = (0, 0);
    for cycle in 1..=count {
        let (before, now) = ((cycle - 1).to_string(), cycle.to_string());
        let shown = [("x-access-token", "user"), ("x-incarnation", before.as_str())];
        let mut streams = Vec::new();
        for _ in 0..STREAMS {
            let asked = json!({"process": {"cmd": "cat"}, "stdin": true});
            let mut stream = envd.stream(guest::START, &shown, asked).await;
            streams.push((stream.pid().await, stream));
        }
        let mut slow = Vec::new();
        for _ in 0..PEERS {
            let asked = json!({"process": {"cmd": "head", "args": ["-c", "20000000", "/dev/zero"]}});
            let mut stream = envd.stream(guest::START, &shown, asked).await;
            slow.push((stream.pid().await, stream));
        }
        let (mut idle, mut silent, mut half) = (Vec::new(), Vec::new(), Vec::new());
        for n in 0..PEERS {
            idle.push(kept(&envd, (n % 2 == 0).then_some(before.as_str())).await);
            silent.push(TcpStream::connect(envd.address()).await.unwrap());
            let mut stream = if n % 2 == 0 {
                TcpStream::connect(envd.address()).await.unwrap()
            } else {
                kept(&envd, Some(&before)).await
            };
            stream.write_all(b"GET /health HT").await.unwrap();
            half.push(stream);
        }

        // Quiet, and then nobody there: what ends meanwhile ends unheard, on either side.
        lose_ends(true);
        assert_eq!(envd.exchange("POST", "/snapshot/prepare", &[CONTROL], "").await.0, 204, "cycle {cycle}");
        kill(process, Signal::SIGSTOP).unwrap();
        // Half of the peers are gone, and nobody hears of it; envd still has their connections.
        for streams in [&mut idle, &mut silent, &mut half] {
            streams.truncate(PEERS / 2);
        }
        let running: Vec<u64> = streams.iter().chain(&slow).map(|(pid, _)| *pid).collect();
        streams.truncate(STREAMS / 2);
        slow.truncate(PEERS / 2);
        kill(process, Signal::SIGCONT).unwrap();
        lose_ends(false);

        // The first call comes before anybody has said that this is another incarnation, and is answered all the same.
        let shown = [("x-access-token", "user"), ("x-incarnation", now.as_str())];
        let asked = json!({"process": {"cmd": "echo", "args": [now]}});
        let first = async { envd.stream(guest::START, &shown, asked).await.outcome().await };
        let restored = async {
            // A whole exchange later the first call's head is with envd: before that nobody could tell it from an old one.
            for _ in 0..3 {
                assert_eq!(envd.exchange("GET", "/health", &[shown[1]], "").await.0, 204);
            }
            envd.exchange("POST", "/init", &[CONTROL], init(&now)).await
        };
        let (ran, (status, ..)) = tokio::join!(first, restored);
        assert_eq!((status.as_u16(), ran.text(), ran.exit_code()), (204, &*format!("{now}\n"), 0));

        for stream in idle.into_iter().chain(silent) {
            assert!(is_dead(stream, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await, "cycle {cycle}");
        }
        for stream in half {
            assert!(is_dead(stream, b"TP/1.1\r\nhost: x\r\n\r\n").await, "cycle {cycle}");
        }
        for (_, stream) in &mut streams {
            assert!(stream.next().await.is_none(), "cycle {cycle}: an answer to the incarnation before");
        }
        // What had been sent to them before the snapshot may arrive, the end of it may not.
        for (pid, mut stream) in slow {
            while let Some((flags, message)) = stream.next().await {
                assert!(flags & 2 == 0 && message["event"]["end"].is_null(), "cycle {cycle}: {pid}");
            }
        }

        // The processes outlive all of that, but for those whose output nobody holds up any more.
        for pid in running {
            let message = json!({"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"}).to_string();
            let headers = [&guest::JSON[..], &shown].concat();
            let status = envd.exchange("POST", "/process.Process/SendSignal", &headers, message).await.0.as_u16();
            assert!([200, 404].contains(&status), "cycle {cycle}: {status}");
        }
        let headers = [&guest::JSON[..], &shown].concat();
        let list = async || envd.exchange("POST", "/process.Process/List", &headers, "{}").await.2;
        until("all processes end", async || list().await == "{}").await;
        if cycle == WARM {
            warm = (descriptors(&envd), threads(&envd));
        }
    }
    until("no more descriptors than before", async || descriptors(&envd) <= warm.0).await;
    until("no more threads than before", async || threads(&envd) <= warm.1).await;
}
