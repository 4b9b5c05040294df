//! envd where it works: in a microVM, as PID 1's child, with control groups, users, a kernel and a disk of its own.
//!
//! What it does outside a sandbox as well is tested there, and thousandfold (`crates/envd/tests`). This is the rest, and that both are
//! one: the program that ships, on the guest's kernel.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use testkit::envd::{Client, JSON, START, basic, until};
use whole_machine::platform::Platform;

/// Under emulation a guest that fights for its memory is slow, but it answers.
const ANSWER_MAX: Duration = Duration::from_secs(15);

async fn sh_as(client: &Client, user: &str, script: &str) -> (i64, String) {
    let asked = json!({"process": {"cmd": "/bin/sh", "args": ["-c", script]}, "stdin": false});
    let ran = client.stream(START, &[("authorization", &basic(user))], asked).await.outcome().await;
    assert_eq!(ran.error, None, "{script}");
    (ran.exit_code(), String::from_utf8([ran.stdout.clone(), ran.stderr.clone()].concat()).unwrap())
}

async fn list(client: &Client, method: &str, message: Value) -> Value {
    client.call(method, message).await.unwrap_or_else(|code| panic!("{method}: {code}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_does_all_that_its_clients_ask_for() {
    let platform = Platform::start();
    let id = platform.create().await;
    let guest = platform.guest(&id);
    let client = &guest.client;

    // Users are who they say, with sudo for those who have it; an unknown one is nobody's.
    for (user, uid) in [("root", "0"), ("user", "1000"), ("wrenn-user", "1001"), ("nobody", "65534")] {
        let (code, said) = sh_as(client, user, "id -u; echo $HOME; cd ~ 2>/dev/null; pwd").await;
        assert!(code == 0 && said.starts_with(&format!("{uid}\n")), "{user}: {said}");
    }
    assert_eq!(sh_as(client, "user", "sudo id -u").await, (0, "0\n".to_owned()));
    // What changes in the database of users counts from then on.
    for (change, uid) in [("useradd -u 1234 late", "1234\n"), ("usermod -u 1235 late", "1235\n")] {
        assert_eq!(sh_as(client, "root", change).await.0, 0, "{change}");
        assert_eq!(sh_as(client, "late", "id -u").await, (0, uid.to_owned()), "{change}");
    }
    let unknown = json!({"process": {"cmd": "id"}});
    let ran = client.stream(START, &[("authorization", &basic("nosuchuser"))], unknown).await.outcome().await;
    assert_eq!((ran.error.as_deref(), ran.stdout.len()), (Some("unauthenticated"), 0));

    // Fast commands, all with all their output and their own code.
    for batch in 0..10 {
        let runs = (0..10).map(|n| async move { (n, client.sh(&format!("echo {batch}-{n}; exit {n}")).await) });
        for (n, ran) in futures::future::join_all(runs).await {
            assert_eq!((ran.text(), ran.exit_code()), (format!("{batch}-{n}\n").as_str(), n));
        }
    }
    assert_eq!(list(client, "/process.Process/List", json!({})).await, json!({}));

    // Output of every byte, in order.
    let script = "import sys\nfor n in range(200): sys.stdout.buffer.write(bytes((n*7+i)%256 for i in range(256))*160)";
    let ran = client.start_process("python3", &["-c", script]).await.outcome().await;
    let expected =
        (0..200).flat_map(|n| (0..256).map(move |i| ((n * 7 + i) % 256) as u8).collect::<Vec<_>>().repeat(160));
    assert!(ran.stdout.iter().copied().eq(expected), "{} bytes", ran.stdout.len());

    // A terminal, its size and its input.
    let asked = json!({"process": {"cmd": "/bin/bash", "args": ["-c", "stty size; read x; echo got $x $TERM"]},
        "pty": {"size": {"cols": 100, "rows": 30}}});
    let mut stream = client.stream(START, &[("authorization", &basic("user"))], asked).await;
    let pid = stream.pid().await;
    let input = json!({"process": {"pid": pid}, "input": {"pty": STANDARD.encode("hej\n")}});
    list(client, "/process.Process/SendInput", input).await;
    let said = String::from_utf8(stream.outcome().await.pty).unwrap();
    assert!(said.contains("30 100\r\n") && said.ends_with("got hej xterm-256color\r\n"), "{said:?}");

    // The whole tree ends with its process, also what has left its group and its session.
    let mut stream = client.start_process("/bin/sh", &["-c", "setsid setsid sleep 4321 & echo begun; wait"]).await;
    let pid = stream.pid().await;
    stream.event().await;
    let kill = json!({"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"});
    list(client, "/process.Process/SendSignal", kill).await;
    assert_eq!(stream.outcome().await.end["status"], "signal: killed");
    until("the tree has ended", async || client.sh("pgrep -f 'sleep 432[1]'").await.exit_code() == 1).await;

    // Files: written, watched, read in part; a listing shows what is whole.
    list(client, "/filesystem.Filesystem/MakeDir", json!({"path": "/root/watched"})).await;
    let made = list(client, "/filesystem.Filesystem/CreateWatcher", json!({"path": "/root/watched"})).await;
    let content: Vec<u8> = (0..2_000_000u32).flat_map(u32::to_le_bytes).collect();
    let octets = [("content-type", "application/octet-stream")];
    let (status, ..) = client.exchange("POST", "/files?path=/root/watched/f", &octets, content.clone()).await;
    assert_eq!(status, 200);
    let watched = json!({"watcherId": made["watcherId"]});
    let got = list(client, "/filesystem.Filesystem/GetWatcherEvents", watched).await;
    let kinds: Vec<_> = got["events"].as_array().unwrap().iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["EVENT_TYPE_CREATE", "EVENT_TYPE_CHMOD", "EVENT_TYPE_WRITE"]);
    let part = [("range", "bytes=4000000-4000999")];
    let (status, _, body) = client.exchange("GET", "/files?path=/root/watched/f", &part, "").await;
    assert!(status == 206 && body == content[4_000_000..4_001_000], "{status}, {} bytes", body.len());
    let listed = list(client, "/filesystem.Filesystem/ListDir", json!({"path": "/root/watched"})).await;
    assert_eq!((listed["entries"].as_array().unwrap().len(), &listed["entries"][0]["size"]), (1, &json!("8000000")));
    // As the user, who may not.
    let user = basic("user");
    let headers = [("content-type", "application/octet-stream"), ("authorization", user.as_str())];
    let (status, ..) = client.exchange("POST", "/files?path=/root/watched/g", &headers, "x").await;
    assert_eq!(status, 403);

    // A server on loopback is reachable at the guest's own address.
    let mut server =
        client.start_process("python3", &["-m", "http.server", "8123", "--bind", "127.0.0.1", "-d", "/etc"]).await;
    server.pid().await;
    let reachable = async || client.sh("curl -s http://169.254.0.21:8123/hostname >/dev/null").await.exit_code() == 0;
    until("the server is reachable", reachable).await;
    let (_, _, ports) = client.exchange("GET", "/ports", &[], "").await;
    let ports: Vec<Value> = serde_json::from_slice(&ports).unwrap();
    // The kernel ends connections when it is asked to: those to peers that a restore has made strangers.
    let asks = "import socket,subprocess as s\nl=socket.create_server(('',8124)); c=socket.create_connection(('169.254.0.21',8124))\ns.run(['ss','-K','dport','=','8124'])\ntry: print(c.recv(1))\nexcept ConnectionAbortedError: print('ended')";
    let ran = client.start_process("python3", &["-c", asks]).await.outcome().await;
    assert!(ran.text().ends_with("ended\n"), "{ran:?}");
    let listed = ports.iter().find(|it| it["port"] == 8123).unwrap_or_else(|| panic!("{ports:?}"));
    assert_eq!((listed["process"].as_str(), &listed["isForwarded"]), (Some("python3"), &json!(true)));
    platform.kill(&id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prepare_stops_users_processes_and_init_lets_them_go_on() {
    let platform = Platform::start();
    let id = platform.create().await;
    let guest = platform.guest(&id);
    let client = &guest.client;
    // Counts on while it runs.
    let script = "n=0; while :; do n=$((n+1)); echo $n >/root/count.new; mv /root/count.new /root/count; done";
    let mut counting = client.start_process("/bin/sh", &["-c", script]).await;
    let pid = counting.pid().await;
    let count = async || -> u64 {
        // envd itself reads it: no process of a user's has to run for that.
        let (status, _, body) = client.exchange("GET", "/files?path=/root/count", &[], "").await;
        if status == 200 { String::from_utf8_lossy(&body).trim().parse().unwrap_or(0) } else { 0 }
    };
    until("it counts", async || count().await > 5).await;
    let control = [("x-control-token", guest.control_token.as_str())];
    let (status, headers, _) = client.exchange("POST", "/snapshot/prepare", &control, "").await;
    assert_eq!((status.as_u16(), headers["x-disk-flushed"].to_str().unwrap()), (204, "yes"));
    let stopped = count().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(count().await, stopped, "a frozen process has counted");
    // The same incarnation: nothing was restored, and everything goes on.
    let init = json!({"incarnation": guest.incarnation, "accessToken": guest.access_token}).to_string();
    let (status, ..) = client.exchange("POST", "/init", &[control[0], JSON[0]], init).await;
    assert_eq!(status, 204);
    until("it counts on", async || count().await > stopped + 5).await;
    let kill = json!({"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"});
    list(client, "/process.Process/SendSignal", kill).await;
    // The API's way to the guest is as it was.
    assert_eq!(platform.shell(&id, "echo on").await, (0, "on\n".to_owned()));

    // A guest that cannot take on its new identity keeps the old one, and its users' processes stand still until it can.
    let mut counting = client.start_process("/bin/sh", &["-c", script]).await;
    counting.pid().await;
    assert_eq!(client.sh("mount --bind /dev/full /etc/machine-id").await.exit_code(), 0);
    assert_eq!(client.exchange("POST", "/snapshot/prepare", &control, "").await.0, 204);
    let stopped = count().await;
    let other = json!({"incarnation": "another", "accessToken": guest.access_token}).to_string();
    let (status, _, body) = client.exchange("POST", "/init", &[control[0], JSON[0]], other).await;
    assert_eq!(status, 500, "{}", String::from_utf8_lossy(&body));
    assert!(String::from_utf8_lossy(&body).contains("machine id"), "{}", String::from_utf8_lossy(&body));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(count().await, stopped, "a frozen process has counted");
    let init = json!({"incarnation": guest.incarnation, "accessToken": guest.access_token}).to_string();
    assert_eq!(client.exchange("POST", "/init", &[control[0], JSON[0]], init).await.0, 204);
    until("it counts on", async || count().await > stopped + 5).await;
    platform.kill(&id).await;
}

/// Users may ruin their guest for themselves, but not for whoever comes to look: envd answers, and is the same envd.
#[tokio::test(flavor = "multi_thread")]
async fn envd_outlives_what_users_do_to_their_guest() {
    let platform = Platform::start();
    let id = platform.create_with(json!({"template": "minimal", "memory_mb": 256, "disk_size_mb": 1024})).await;
    let client = &platform.guest(&id).client;
    let pid_of_envd = async || client.sh("pgrep -xo envd").await.text().trim().to_owned();
    let before = pid_of_envd().await;
    let answers = async |what: &str| {
        let began = Instant::now();
        let (status, ..) = client.exchange("GET", "/health", &[], "").await;
        assert!(status == 204 && began.elapsed() < ANSWER_MAX, "{what}: {status} after {:?}", began.elapsed());
    };
    let end = async |pid: u64| {
        let kill = json!({"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"});
        list(client, "/process.Process/SendSignal", kill).await;
    };

    // As many processes as there can be.
    let bomb = "f() { f | f & }; f; sleep 1000";
    let mut stream = client.start_process("/bin/bash", &["-c", bomb]).await;
    let pid = stream.pid().await;
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(400)).await;
        answers("a fork bomb").await;
    }
    end(pid).await;
    until("the bomb is over", async || client.sh("true").await.exit_code() == 0).await;

    // More memory than there is: the one who takes it is killed.
    let ran = client.sh("python3 -c 'b=[]\nwhile 1: b.append(bytearray(8<<20))'; echo $?").await;
    assert!(ran.text().trim() == "137" || ran.stderr.ends_with(b"MemoryError\n"), "{ran:?}");
    answers("no memory").await;

    // The disk full: an upload says so, and leaves nothing.
    let octets = [("content-type", "application/octet-stream")];
    let fill = "fallocate -l $(($(df --output=avail -B1 / | tail -1) - 65536)) /root/big";
    assert_eq!(client.sh(fill).await.exit_code(), 0);
    let (status, _, body) = client.exchange("POST", "/files?path=/root/more", &octets, vec![7; 4 << 20]).await;
    assert_eq!(status, 507, "{}", String::from_utf8_lossy(&body));
    let ran = client.sh("rm /root/big; ls -A /root | grep -c more").await;
    assert_eq!(ran.text(), "0\n");
    let (status, ..) = client.exchange("POST", "/files?path=/root/more", &octets, vec![7; 4 << 20]).await;
    assert_eq!(status, 200);

    assert_eq!(pid_of_envd().await, before, "it is still the same");
    platform.kill(&id).await;
}
