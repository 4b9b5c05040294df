//! How a replica ends, with real processes: nobody is sent to it any more, nobody is cut off without a word, and what it worked on goes on
//! elsewhere at once. And how a service manager hears that it does its work no more.

mod process;

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::{Duration, Instant};

use futures::{SinkExt as _, StreamExt as _};
use process::{Administrator, Process, command, ended, signal};
use reqwest::Method;
use serde_json::json;
use testkit::metrics::until;
use testkit::postgres::Database;
use tokio::net::TcpListener;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

/// Takes connections and says nothing: a host that hangs.
async fn silent_host() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    });
    address
}

async fn status(url: &str, path: &str) -> u16 {
    reqwest::get(format!("{url}{path}")).await.map_or(0, |answer| answer.status().as_u16())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_ends_sends_people_away_and_hands_its_work_back() {
    let database = Database::new().await;
    let dir = tempfile::tempdir().unwrap();
    let mut ending = Process::start(&database.url, dir.path(), &[("WRENN_STOP_NOTICE_SEC", "3")]).await;
    let administrator = Administrator::of(&database.url, dir.path()).await;
    let host = administrator.host(&ending.url, &database, &silent_host().await).await;

    // A create that its host does not answer, a stream that was opened, and one whose command the host does not answer.
    let (http, url, token) = (administrator.http.clone(), ending.url.clone(), administrator.token.clone());
    let create = tokio::spawn(async move {
        let request = http.post(format!("{url}/v1/sandboxes?wait_sec=120")).bearer_auth(token);
        request.json(&json!({"memory_mb": 256})).send().await.map(|answer| answer.status().as_u16())
    });
    let metrics = ending.metrics.unwrap();
    let works = |page: &testkit::metrics::Page| page.value("wrenn_operations_running", &[]) == Some(1.0);
    until(metrics, "that it works on the create", works).await;
    let host: model::ids::HostId = host.parse().unwrap();
    database
        .sql(&format!(
            "insert into sandboxes (id, team_id, template, vcpus, memory_mib, disk_mib, desired, observed, host_id, host_epoch)
             select 'sb00000000000000000000ab', team_id, 'minimal', 1, 256, 1024, 'running', 'running', '{}', 1 from sandboxes limit 1",
            host.0
        ))
        .await;
    let open = async || {
        let path = format!("ws://{}/v1/sandboxes/sb00000000000000000000ab/exec/stream", ending.address);
        let mut request = path.into_client_request().unwrap();
        let bearer = format!("Bearer {}", administrator.token).parse().unwrap();
        request.headers_mut().insert("authorization", bearer);
        tokio_tungstenite::connect_async(request).await.unwrap().0
    };
    let mut streams = vec![open().await, open().await];
    streams[1].send(Message::text(json!({"type": "start", "cmd": "true"}).to_string())).await.unwrap();
    let both = |page: &testkit::metrics::Page| page.value("wrenn_streams_open", &[("kind", "exec")]) == Some(2.0);
    until(metrics, "that the streams are open", both).await;
    // Only now is there another one that could take the work up.
    let other = Process::start(&database.url, dir.path(), &[]).await;

    let told = Instant::now();
    ending.signal("TERM");

    // It is not ready at once, lives, and still answers those who have not heard of it.
    while status(&ending.url, "/health/ready").await != 503 {
        assert!(told.elapsed() < Duration::from_secs(2), "it stays ready");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(status(&ending.url, "/health").await, 503);
    assert_eq!(status(&ending.url, "/health/live").await, 200);
    assert_eq!(administrator.call(&ending.url, Method::GET, "/v1/sandboxes", None).await.0, 200);
    assert!(told.elapsed() < Duration::from_secs(3), "the notice was over before this test could look");
    for mut stream in streams {
        let close = loop {
            match stream.next().await {
                Some(Ok(Message::Close(Some(close)))) => break close,
                Some(Ok(_)) => {}
                other => panic!("the stream ended with {other:?}"),
            }
        };
        assert_eq!(u16::from(close.code), 1012, "{close:?}");
    }
    // The other one works on it while this one may still answer.
    until(other.metrics.unwrap(), "that the other replica works on the create", works).await;
    assert!(told.elapsed() < Duration::from_secs(15), "the work came late: {:?}", told.elapsed());
    let answered = create.await.unwrap().expect("the create is answered and not cut off");
    assert_eq!(answered, 202);
    let status_code = ending.ended(Duration::from_secs(20)).await;
    assert!(status_code.success(), "{status_code}");
    assert_eq!(status(&other.url, "/health/ready").await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_it_at_once_and_the_first_one_while_it_starts() {
    let database = Database::new().await;
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::start(&database.url, dir.path(), &[("WRENN_STOP_NOTICE_SEC", "10")]).await;
    process.signal("TERM");
    while status(&process.url, "/health/ready").await != 503 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    process.signal("TERM");
    let code = process.ended(Duration::from_secs(3)).await;
    assert_eq!(code.code(), Some(1));

    // It waits for a database that does not come.
    let nowhere = "postgres://wrenn@127.0.0.1:1/wrenn";
    let mut child = command(nowhere, dir.path()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let mut said = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("the database is not there yet") {
        line.clear();
        assert!(std::io::BufRead::read_line(&mut said, &mut line).unwrap() > 0, "it ended");
    }
    signal(i32::try_from(child.id()).unwrap(), "TERM");
    assert!(ended(&mut child, Duration::from_secs(3)).await.success());
}

/// What a service manager hears, with the time.
fn hear(socket: &UnixDatagram, time: Duration) -> Vec<String> {
    let end = Instant::now() + time;
    let mut heard = Vec::new();
    while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        socket.set_read_timeout(Some(left)).unwrap();
        let mut text = [0; 256];
        if let Ok(count) = socket.recv(&mut text) {
            heard.push(String::from_utf8_lossy(&text[..count]).trim().to_owned());
        }
    }
    heard
}

fn bind(dir: &Path) -> UnixDatagram {
    UnixDatagram::bind(dir.join("notify")).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_watchdog_is_fed_only_while_the_work_goes_on() {
    let database = Database::new().await;
    let dir = tempfile::tempdir().unwrap();
    let socket = bind(dir.path());
    let (notify, arm) = (dir.path().join("notify"), dir.path().join("arm"));
    let envs = [
        ("NOTIFY_SOCKET", notify.to_str().unwrap()),
        ("WATCHDOG_USEC", "3000000"),
        ("WRENN_CRASHPOINTS_FILE", arm.to_str().unwrap()),
    ];
    let process = Process::start(&database.url, dir.path(), &envs).await;
    let heard = hear(&socket, Duration::from_secs(4));
    assert_eq!(heard.first().map(String::as_str), Some("READY=1"));
    assert!(heard.iter().filter(|word| *word == "WATCHDOG=1").count() >= 3, "{heard:?}");
    // The loop that takes up operations blocks for two minutes; everything else goes on.
    std::fs::write(&arm, "cp.claim=sleep(120000)").unwrap();
    let began = Instant::now();
    while arm.exists() {
        assert!(began.elapsed() < Duration::from_secs(10), "the point is not reached");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    hear(&socket, Duration::from_secs(24));
    assert_eq!(
        hear(&socket, Duration::from_secs(4)),
        Vec::<String>::new(),
        "it is fed although its work does not go on"
    );
    assert_eq!(status(&process.url, "/health/live").await, 200);
}
