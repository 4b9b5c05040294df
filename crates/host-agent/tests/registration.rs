//! Registration, renewal and heartbeat against a control plane that answers well, badly, late or not at all.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::v1::hosts::{self, Heartbeat, HostFacts, ReportedSandbox};
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use chrono::{TimeDelta, Utc};
use host_agent::credentials::{Credentials, Files};
use host_agent::heartbeat::{self, Beat, Link};
use host_agent::registration::{RegisterError, Registration, keep_fresh, register};
use host_agent::ticket::Ticket;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

/// How the control plane answers, call by call; the last one stays.
#[derive(Clone, Debug)]
enum Say {
    Yes,
    /// To a heartbeat: what the host says is what is known.
    Agreed,
    /// The work is done, the answer never arrives.
    Lost,
    Error(u16, &'static str),
    Html(u16),
    Redirect,
    Endless,
}

/// Path, body, credential.
type Call = (String, serde_json::Value, Option<String>);

#[derive(Clone)]
struct Fake {
    script: Arc<Mutex<VecDeque<Say>>>,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Fake {
    async fn start(script: &[Say]) -> (Self, url::Url) {
        let fake = Self { script: Arc::new(Mutex::new(script.iter().cloned().collect())), calls: Arc::default() };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let app = Router::new().fallback(answer).with_state(fake.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        (fake, format!("http://{address}").parse().unwrap())
    }

    fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }
}

async fn answer(State(fake): State<Fake>, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    let token = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).map(ToOwned::to_owned);
    fake.calls.lock().unwrap().push((uri.path().to_owned(), serde_json::from_slice(&body).unwrap(), token));
    let say = {
        let mut script = fake.script.lock().unwrap();
        if script.len() > 1 { script.pop_front().unwrap() } else { script[0].clone() }
    };
    match say {
        Say::Yes | Say::Agreed if uri.path().ends_with("/heartbeat") => {
            // The number of the heartbeat.
            let count = fake.calls().iter().filter(|(path, ..)| path.ends_with("/heartbeat")).count();
            let mut answer = serde_json::json!({ "epoch": 4, "ticket": count.to_string() });
            if matches!(say, Say::Agreed) {
                answer["digest_suffices"] = true.into();
                answer["idle_timeouts"] = serde_json::json!([{ "id": "b", "timeout_sec": 60, "active_sec_ago": 5 }]);
            }
            axum::Json(answer).into_response()
        }
        Say::Yes | Say::Agreed => axum::Json(credentials()).into_response(),
        // A body that breaks off says to a client what a cut connection says.
        Say::Lost => {
            let broken =
                futures::stream::iter([Ok(Bytes::from_static(b"{\"host\":")), Err(std::io::Error::other("cut"))]);
            axum::body::Body::from_stream(broken).into_response()
        }
        Say::Error(status, code) => {
            let error = serde_json::json!({ "error": { "code": code, "message": "no\u{1b}[31m", "request_id": "r" } });
            (StatusCode::from_u16(status).unwrap(), axum::Json(error)).into_response()
        }
        Say::Html(status) => (StatusCode::from_u16(status).unwrap(), "<html>welcome</html>").into_response(),
        Say::Redirect => (StatusCode::FOUND, [(header::LOCATION, "http://127.0.0.1:9/steal")], "{}").into_response(),
        Say::Endless => {
            let zeros = futures::stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::from_static(&[b'0'; 65536])));
            axum::body::Body::from_stream(zeros).into_response()
        }
    }
}

fn credentials() -> serde_json::Value {
    let key = rcgen::KeyPair::generate().unwrap();
    let pem = rcgen::CertificateParams::new(vec!["10.0.0.5".to_owned()]).unwrap().self_signed(&key).unwrap().pem();
    serde_json::json!({
        "host": {
            "id": "host-1", "type": "regular", "status": "online", "created_by": "x",
            "created_at": Utc::now(), "updated_at": Utc::now(),
        },
        "token": "jwt-1",
        "token_expires_at": Utc::now() + TimeDelta::days(30),
        "cert_pem": pem,
        "ca_cert_pem": pem,
        "epoch": 3,
    })
}

fn provider() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

async fn try_register(dir: &Path, cp_url: &url::Url) -> Result<Credentials, RegisterError> {
    provider();
    let files = Files::new(dir);
    let registration = Registration {
        files: &files,
        cp_url,
        address: "10.0.0.5:50051",
        token: "one-time",
        facts: HostFacts { arch: "x86_64".to_owned(), cpu_cores: 2, ..HostFacts::default() },
    };
    let stop = CancellationToken::new();
    tokio::time::timeout(Duration::from_secs(60), register(registration, &stop)).await.expect("no answer in a minute")
}

#[tokio::test]
async fn registers_and_keeps_what_it_got() {
    let dir = tempfile::tempdir().unwrap();
    let (fake, url) = Fake::start(&[Say::Yes]).await;
    let credentials = try_register(dir.path(), &url).await.unwrap();
    assert_eq!(credentials.host.host_id, "host-1");
    let (path, body, _) = fake.calls().remove(0);
    assert_eq!(path, "/v1/hosts/register");
    assert_eq!(body["token"], "one-time");
    assert_eq!(body["cpu_cores"], 2);
    assert!(body["csr_pem"].as_str().unwrap().contains("CERTIFICATE REQUEST"));
    let kept = Files::new(dir.path()).load().unwrap().unwrap();
    assert_eq!(kept.host.epoch, 3);
    let token = std::fs::read_to_string(dir.path().join("host-token")).unwrap();
    assert!(!token.contains("one-time"), "the one-time token is kept");
}

#[tokio::test]
async fn what_says_nothing_is_repeated_with_the_same_key() {
    for say in [
        Say::Lost,
        Say::Error(503, "unavailable"),
        Say::Html(200),
        Say::Html(404),
        Say::Html(502),
        Say::Redirect,
        Say::Endless,
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (fake, url) = Fake::start(&[say.clone(), Say::Yes]).await;
        try_register(dir.path(), &url).await.unwrap_or_else(|error| panic!("{say:?}: {error}"));
        let calls = fake.calls();
        assert_eq!(calls.len(), 2, "{say:?}");
        let key = |n: usize| {
            let pem = calls[n].1["csr_pem"].as_str().unwrap().to_owned();
            let request = rcgen::CertificateSigningRequestParams::from_pem(&pem).unwrap();
            rcgen::PublicKeyData::der_bytes(&request.public_key).to_vec()
        };
        assert_eq!(key(0), key(1), "{say:?}");
    }
}

#[tokio::test]
async fn a_refusal_is_told_and_not_repeated() {
    for (status, code, words) in [
        (401, "unauthorized", "wrenn host token ID"),
        (400, "invalid_request", "refused the registration"),
        (426, "agent_too_old", "agent_too_old"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (fake, url) = Fake::start(&[Say::Error(status, code)]).await;
        let error = try_register(dir.path(), &url).await.unwrap_err().to_string();
        assert!(error.contains(words) && !error.contains('\u{1b}'), "{error}");
        assert_eq!(fake.calls().len(), 1);
        assert!(Files::new(dir.path()).load().unwrap().is_none());
    }
}

#[tokio::test]
async fn nobody_there_is_repeated() {
    let dir = tempfile::tempdir().unwrap();
    provider();
    // A port that was free a moment ago.
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{address}").parse().unwrap();
    let files = Files::new(dir.path());
    let stop = CancellationToken::new();
    let registration = Registration {
        files: &files,
        cp_url: &url,
        address: "10.0.0.5:50051",
        token: "t",
        facts: HostFacts::default(),
    };
    let stopper = stop.clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(300)).await;
        stopper.cancel();
    });
    assert!(matches!(register(registration, &stop).await, Err(RegisterError::Stopped)));
    assert!(dir.path().join("host-key.pem").exists());
}

#[tokio::test]
async fn another_address_is_renewed_and_no_answer_costs_the_credential() {
    for say in [
        Say::Error(401, "host_revoked"),
        Say::Error(403, "forbidden"),
        Say::Html(200),
        Say::Html(404),
        Say::Error(500, "internal_error"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (fake, url) = Fake::start(&[Say::Yes, say.clone(), Say::Yes]).await;
        let first = try_register(dir.path(), &url).await.unwrap();
        let (current, mut fresh) = watch::channel(first);
        let stop = CancellationToken::new();
        let files = Files::new(dir.path());
        let ticket = Ticket::load(dir.path(), "host-1");
        ticket.keep("7".to_owned()).await;
        let task = tokio::spawn(keep_fresh(
            files.clone(),
            "10.0.0.6:50051".to_owned(),
            Arc::new(current),
            ticket,
            stop.clone(),
        ));
        tokio::time::timeout(Duration::from_secs(20), fresh.changed()).await.expect("no renewal").unwrap();
        assert_eq!(fresh.borrow().host.address, "10.0.0.6:50051");
        assert!(files.load().unwrap().is_some(), "{say:?}");
        let calls = fake.calls();
        assert_eq!(calls.len(), 3, "{say:?}");
        assert_eq!(calls[2].0, "/v1/hosts/host-1/renew");
        assert_eq!(calls[2].2.as_deref(), Some("Bearer jwt-1"));
        assert_eq!(calls[2].1["ticket"], "7");
        stop.cancel();
        task.await.unwrap().unwrap();
    }
}

/// As versions before had it signed: a new one is asked for, and if that has no name either, it is not asked for again.
#[tokio::test]
async fn a_certificate_without_the_hosts_name_is_renewed_once() {
    let dir = tempfile::tempdir().unwrap();
    let (fake, url) = Fake::start(&[Say::Yes, Say::Yes]).await;
    let first = try_register(dir.path(), &url).await.unwrap();
    assert!(!first.bear_the_name());
    let (current, mut fresh) = watch::channel(first);
    let stop = CancellationToken::new();
    let files = Files::new(dir.path());
    let ticket = Ticket::load(dir.path(), "host-1");
    let task = tokio::spawn(keep_fresh(files, "10.0.0.5:50051".to_owned(), Arc::new(current), ticket, stop.clone()));
    tokio::time::timeout(Duration::from_secs(20), fresh.changed()).await.expect("no renewal").unwrap();
    tokio::time::pause();
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(fake.calls().iter().filter(|call| call.0.ends_with("/renew")).count(), 1);
    stop.cancel();
    task.await.unwrap().unwrap();
}

#[tokio::test]
async fn wrong_answers_to_a_heartbeat_only_detach() {
    let dir = tempfile::tempdir().unwrap();
    let (fake, url) = Fake::start(&[Say::Yes, Say::Html(200), Say::Error(401, "host_revoked"), Say::Yes]).await;
    let first = try_register(dir.path(), &url).await.unwrap();
    let (_current, credentials) = watch::channel(first);
    let (link, mut seen) = watch::channel(Link::Unknown);
    let epochs = Arc::new(Mutex::new(Vec::new()));
    let noted = epochs.clone();
    let changed = Arc::new(Notify::new());
    let stop = CancellationToken::new();
    let beat = Beat {
        report: Box::new(|| Box::pin(async { Heartbeat { complete: true, ..Heartbeat::default() } })),
        changed: changed.clone(),
        credentials,
        ticket: Ticket::load(dir.path(), "host-1"),
        epoch_seen: Box::new(move |epoch| noted.lock().unwrap().push(epoch)),
        idle_timeouts: Box::new(drop),
        link,
    };
    let task = tokio::spawn(heartbeat::run(beat, stop.clone()));
    let wait = async {
        seen.wait_for(|link| matches!(link, Link::Unheard(why) if why.contains("not a Wrenn"))).await.unwrap();
        seen.wait_for(|link| matches!(link, Link::Unheard(why) if why.contains("host_revoked"))).await.unwrap();
        seen.wait_for(|link| *link == Link::Attached).await.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(30), wait).await.expect("the link never came back");
    assert_eq!(*epochs.lock().unwrap(), [4]);
    // A change is told at once, not after half a minute.
    let before = fake.calls().len();
    changed.notify_one();
    let end = tokio::time::Instant::now() + Duration::from_secs(5);
    while fake.calls().len() == before {
        assert!(tokio::time::Instant::now() < end, "a change was not told");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let sequences: Vec<_> = fake.calls().iter().filter_map(|(_, body, _)| body["sequence"].as_u64()).collect();
    assert!(sequences.is_sorted() && sequences.len() >= 4, "{sequences:?}");
    stop.cancel();
    task.await.unwrap().unwrap();
}

/// Tells the test `a_heart` where to play, and with whom.
const CHILD: (&str, &str) = ("HEART_DIR", "HEART_URL");

/// A heart that beats fast, with the credentials and the ticket of a directory.
fn heart(
    dir: &Path,
    mut credentials: Credentials,
    url: Option<url::Url>,
) -> (Beat, watch::Receiver<Link>, Arc<Notify>) {
    credentials.host.cp_url = url.unwrap_or(credentials.host.cp_url);
    let (link, seen) = watch::channel(Link::Unknown);
    let changed = Arc::new(Notify::new());
    let beat = Beat {
        report: Box::new(|| Box::pin(async { Heartbeat { complete: true, ..Heartbeat::default() } })),
        changed: changed.clone(),
        ticket: Ticket::load(dir, &credentials.host.host_id),
        credentials: watch::channel(credentials).1,
        epoch_seen: Box::new(|_| {}),
        idle_timeouts: Box::new(drop),
        link,
    };
    (beat, seen, changed)
}

/// Not a test of its own: what the child does, until it dies.
#[test]
fn a_heart() {
    let (Some(dir), Ok(url)) = (std::env::var_os(CHILD.0), std::env::var(CHILD.1)) else { return };
    provider();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let dir = Path::new(&dir);
        let (beat, _, changed) = heart(dir, Files::new(dir).load().unwrap().unwrap(), Some(url.parse().unwrap()));
        tokio::spawn(async move {
            loop {
                changed.notify_one();
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        heartbeat::run(beat, CancellationToken::new()).await.unwrap();
    });
}

/// What it shows next is what is on the disk: the last one that it was given, or the one before.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_dies_between_answer_and_disk_shows_the_ticket_before() {
    for (point, expected) in [("ticket.heard", "2"), ("ticket.written", "3")] {
        let dir = tempfile::tempdir().unwrap();
        let (fake, url) = Fake::start(&[Say::Yes]).await;
        try_register(dir.path(), &url).await.unwrap();
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "a_heart", "--nocapture"]);
        child.env(CHILD.0, dir.path()).env(CHILD.1, url.as_str());
        child.env("WRENN_CRASHPOINTS", format!("{point}=3*abort"));
        let died = tokio::task::spawn_blocking(move || child.output().unwrap()).await.unwrap();
        use std::os::unix::process::ExitStatusExt as _;
        assert_eq!(died.status.signal(), Some(9), "{point}: {}", String::from_utf8_lossy(&died.stdout));
        let shown = |n: usize| fake.calls()[n].1["ticket"].clone();
        assert_eq!([shown(1), shown(2), shown(3)], ["", "1", "2"], "{point}");
        assert_eq!(Ticket::load(dir.path(), "host-1").shown(), expected, "{point}");
    }
}

#[tokio::test]
async fn a_fenced_agent_keeps_its_ticket_and_what_it_runs() {
    let dir = tempfile::tempdir().unwrap();
    let (fake, url) =
        Fake::start(&[Say::Yes, Say::Yes, Say::Error(409, "host_fenced"), Say::Error(503, "unavailable"), Say::Yes])
            .await;
    let credentials = try_register(dir.path(), &url).await.unwrap();
    let (beat, mut seen, changed) = heart(dir.path(), credentials, None);
    let stop = CancellationToken::new();
    let task = tokio::spawn(heartbeat::run(beat, stop.clone()));
    let wait = async {
        seen.wait_for(|link| *link == Link::Attached).await.unwrap();
        changed.notify_one();
        seen.wait_for(|link| matches!(link, Link::Fenced(why) if why.contains("host_fenced"))).await.unwrap();
        // No answer says nothing: what was fenced stays so.
        let mut links = seen.clone();
        loop {
            let now = links.borrow_and_update().clone();
            if now == Link::Attached {
                break;
            }
            assert!(matches!(now, Link::Fenced(_)), "{now:?}");
            links.changed().await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(30), wait).await.expect("the link never came back");
    let shown: Vec<_> = fake.calls()[1..].iter().map(|(_, body, _)| body["ticket"].clone()).collect();
    assert_eq!(shown, ["", "1", "1", "1"]);
    stop.cancel();
    task.await.unwrap().unwrap();
}

/// One sandbox after the other and nothing that is not needed: a digest for as long as both sides mean the same, and the list at once when
/// they do not.
#[tokio::test]
async fn what_a_host_has_is_told_as_a_digest_once_it_is_agreed_on() {
    let dir = tempfile::tempdir().unwrap();
    let script =
        [Say::Yes, Say::Yes, Say::Agreed, Say::Agreed, Say::Yes, Say::Agreed, Say::Agreed, Say::Agreed, Say::Agreed];
    let (fake, url) = Fake::start(&script).await;
    let credentials = try_register(dir.path(), &url).await.unwrap();
    let (mut beat, mut seen, changed) = heart(dir.path(), credentials, None);
    let sandbox = |id: &str, observed: &str, idle_sec| ReportedSandbox {
        id: id.to_owned(),
        observed: observed.to_owned(),
        revision: 7,
        idle_sec,
        ..ReportedSandbox::default()
    };
    let settled = vec![sandbox("b", "running", Some(5)), sandbox("a", "paused", None), sandbox("c", "failed", None)];
    let held = Arc::new(Mutex::new((settled.clone(), true)));
    let told = held.clone();
    beat.report = Box::new(move || {
        let (sandboxes, complete) = told.lock().unwrap().clone();
        Box::pin(async move { Heartbeat { complete, sandboxes, ..Heartbeat::default() } })
    });
    let counted = Arc::<Mutex<Vec<usize>>>::default();
    let counts = counted.clone();
    beat.idle_timeouts = Box::new(move |named| counts.lock().unwrap().push(named.len()));
    let stop = CancellationToken::new();
    let task = tokio::spawn(heartbeat::run(beat, stop.clone()));
    let heard = || fake.calls().into_iter().skip(1).map(|(_, body, _)| body).collect::<Vec<_>>();
    let beats = async |count: usize| {
        let wait = async {
            while heard().len() < count {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait).await.expect("no heartbeat came");
        heard().remove(count - 1)
    };
    let names = |body: &serde_json::Value| -> Vec<String> {
        body["sandboxes"].as_array().unwrap().iter().map(|s| s["id"].as_str().unwrap().to_owned()).collect()
    };
    let list = |body: &serde_json::Value| {
        assert!(body.get("digest").is_none() && body["complete"] == true, "{body}");
        names(body)
    };
    assert_eq!(list(&beats(1).await), ["b", "a", "c"], "nothing is agreed on yet");
    seen.wait_for(|link| *link == Link::Attached).await.unwrap();
    changed.notify_one();
    assert_eq!(list(&beats(2).await), ["b", "a", "c"], "this is not what is known there");
    changed.notify_one();
    // Whose idle time counts and who has failed is named all the same.
    let short = beats(3).await;
    assert_eq!((names(&short), &short["complete"]), (vec!["b".to_owned(), "c".to_owned()], &false.into()));
    assert_eq!(short["digest"], hosts::digest(&settled));
    changed.notify_one();
    assert_eq!(beats(4).await["digest"], short["digest"]);
    assert_eq!(list(&beats(5).await), ["b", "a", "c"], "it was not the same any more, and the list is wanted at once");
    // What has changed is told as a list, and what is under way by no digest.
    held.lock().unwrap().0.push(sandbox("d", "running", None));
    changed.notify_one();
    assert_eq!(list(&beats(6).await), ["b", "a", "c", "d"]);
    held.lock().unwrap().0.push(sandbox("e", "starting", None));
    changed.notify_one();
    assert_eq!(list(&beats(7).await), ["b", "a", "c", "d", "e"]);
    held.lock().unwrap().0.pop();
    held.lock().unwrap().1 = false;
    changed.notify_one();
    let partial = beats(8).await;
    assert!(partial.get("digest").is_none() && names(&partial).len() == 4, "before the scan is done: {partial}");
    stop.cancel();
    task.await.unwrap().unwrap();
    // Two of the nine answers name none: the first, and the one that wanted a list, which says nothing of idle times.
    assert_eq!(counted.lock().unwrap()[..6], [0, 1, 1, 1, 1, 1]);
}
