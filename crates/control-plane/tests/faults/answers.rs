//! Somebody else answers in the place of a host, or of the control plane: a captive portal, a proxy, a host with another name. Nothing is
//! concluded from what they say.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use host_agent::credentials::Credentials;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use testkit::cut_proxy::Target;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::cluster::Cluster;
use super::host::Host;
use super::truth;

#[derive(Debug, Clone, Copy)]
pub enum Say {
    Html(u16),
    /// As the agent's own answers look, with nothing in it.
    Empty,
    Json(u16, &'static str),
    Redirect,
}

const SAID: [Say; 12] = [
    Say::Html(200),
    Say::Html(404),
    Say::Html(410),
    Say::Html(401),
    Say::Html(403),
    Say::Html(500),
    Say::Html(503),
    Say::Empty,
    Say::Json(404, r#"{"error":"not found"}"#),
    Say::Json(404, r#"{"code":"unimplemented"}"#),
    Say::Json(403, r#"{"code":"permission_denied","message":"log in to the hotel's network"}"#),
    Say::Redirect,
];

fn answer(say: Say) -> Response {
    match say {
        Say::Html(status) => {
            (StatusCode::from_u16(status).unwrap(), [(header::CONTENT_TYPE, "text/html")], "<html>welcome</html>")
                .into_response()
        }
        Say::Empty => (StatusCode::OK, [(header::CONTENT_TYPE, "application/proto")], "").into_response(),
        Say::Json(status, text) => {
            let json = [(header::CONTENT_TYPE, "application/json")];
            (StatusCode::from_u16(status).unwrap(), json, text).into_response()
        }
        Say::Redirect => (StatusCode::FOUND, [(header::LOCATION, "https://127.0.0.1:9/steal")], "").into_response(),
    }
}

/// Answers every call so, and counts it; with TLS when there is a certificate.
pub async fn impostor(say: Say, tls: Option<Arc<rustls::ServerConfig>>, asked: Arc<AtomicUsize>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = axum::Router::new().fallback(move || async move {
        asked.fetch_add(1, Ordering::Relaxed);
        answer(say)
    });
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (router, tls) = (router.clone(), tls.clone());
            tokio::spawn(async move {
                let service = TowerToHyperService::new(router);
                let http = auto::Builder::new(TokioExecutor::new());
                match tls {
                    None => drop(http.serve_connection(TokioIo::new(stream), service).await),
                    Some(tls) => {
                        if let Ok(stream) = TlsAcceptor::from(tls).accept(stream).await {
                            let _ = http.serve_connection(TokioIo::new(stream), service).await;
                        }
                    }
                }
            });
        }
    });
    address
}

/// What a thief of the host's key could serve with.
fn own_certificate(credentials: &Credentials) -> Arc<rustls::ServerConfig> {
    let chain = CertificateDer::pem_slice_iter(credentials.cert_pem.as_bytes()).collect::<Result<Vec<_>, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_slice(credentials.key_pem.0.as_bytes()).unwrap();
    let mut config = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// Of an authority of its own, for this name.
fn foreign_certificate(name: &str) -> Arc<rustls::ServerConfig> {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap().self_signed(&key).unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let mut config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// What is nearest to an answer of an agent, and what is farthest from it.
#[tokio::test(flavor = "multi_thread")]
async fn what_answers_in_the_place_of_a_host_concludes_nothing() {
    in_the_place_of_a_host(&[SAID[0], SAID[1], SAID[7], SAID[10]]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "each takes ten seconds: make check-long"]
async fn whatever_answers_in_the_place_of_a_host_concludes_nothing() {
    in_the_place_of_a_host(&SAID).await;
}

async fn in_the_place_of_a_host(said: &[Say]) {
    let cluster = Cluster::start(2).await;
    let host = Host::join(&cluster).await;
    let team = &cluster.team;
    let (runs, saved) = (team.running("runs").await, team.running("saved").await);
    team.verb(&saved, "pause").await;
    truth::judge(&cluster, &[&host]).await;
    let own = own_certificate(&host.credentials.borrow());
    let there = host.port;
    let mut impostors = Vec::new();
    for &say in said {
        impostors.push((
            format!("{say:?} with the host's own certificate"),
            impostor(say, Some(own.clone()), Arc::default()).await,
        ));
    }
    for (what, tls) in [
        ("a certificate of another authority", Some(foreign_certificate("127.0.0.1"))),
        ("a certificate of another name", Some(foreign_certificate("hotel.example.org"))),
        ("no TLS at all", None),
    ] {
        impostors.push((what.to_owned(), impostor(Say::Html(200), tls, Arc::default()).await));
    }
    for (what, address) in &impostors {
        let (alive, doomed) = (host.alive(), team.running(&format!("killed while {what}")).await);
        host.inbound.lead_to(&[Target::Tcp(*address)]);
        host.inbound.cut();
        let (killed, paused, resumed) = tokio::join!(
            team.verb_once(&doomed, "kill", 1),
            team.verb_once(&runs, "pause", 1),
            team.verb_once(&saved, "resume", 1)
        );
        let (killed, paused, resumed) = (killed.unwrap(), paused.unwrap(), resumed.unwrap());
        assert_eq!((killed.status, killed.body["status"].as_str()), (202, Some("stopping")), "{what}: {}", killed.body);
        for (verb, answer) in [("pause", &paused), ("resume", &resumed)] {
            let is_told = answer.status == 202 || matches!(answer.code(), "agent_error" | "host_unavailable");
            assert!(is_told, "{what}, {verb}: {} {}", answer.status, answer.body);
        }
        // It is asked about what it does not name, too.
        cluster.database.sql("update sandboxes set absent_since = now() where observed in ('running', 'paused')").await;
        tokio::time::sleep(Duration::from_millis(2600)).await;
        let concluded =
            cluster.rows("select id, observed, reason from sandboxes where observed in ('failed', 'lost')").await;
        assert!(concluded.is_empty(), "{what}: {concluded:?}");
        assert_eq!(team.status(&doomed).await, "stopping", "{what}");
        assert!(alive.iter().all(|(id, pids)| host.alive().get(id) == Some(pids)), "{what}");
        host.inbound.lead_to(&[Target::Tcp(there)]);
        host.inbound.cut();
        cluster.hurry_to(&doomed, "stopped", Duration::from_secs(30)).await;
        // Whatever became of the two wishes, they can be what they were again.
        for (id, verb, wanted) in [(&runs, "resume", "running"), (&saved, "pause", "paused")] {
            team.verb_once(id, verb, 0).await.unwrap();
            cluster.hurry_to(id, wanted, Duration::from_secs(30)).await;
        }
        truth::rest(&cluster).await;
    }
    truth::judge(&cluster, &[&host]).await;
}

/// The agent's side: whoever answers in the place of the control plane, sandboxes and credential stay, and it comes back by itself.
#[tokio::test(flavor = "multi_thread")]
async fn what_answers_in_the_place_of_the_control_plane_ends_nothing() {
    let cluster = Cluster::start(1).await;
    let host = Host::join(&cluster).await;
    let id = cluster.team.running("runs").await;
    truth::judge(&cluster, &[&host]).await;
    let (alive, token) = (host.alive(), host.credentials.borrow().host.token.clone());
    for say in SAID {
        let address = impostor(say, None, Arc::default()).await;
        host.outbound.lead_to(&[Target::Tcp(address)]);
        host.outbound.cut();
        let before = host.told.lock().unwrap().len();
        // So that it speaks now.
        host.speak();
        let told = || async { host.told.lock().unwrap().len() > before };
        super::cluster::wait("a heartbeat", Duration::from_secs(15), told).await;
        let mut link = host.link.clone();
        let detached = link.wait_for(|link| matches!(link, host_agent::heartbeat::Link::Detached(_)));
        tokio::time::timeout(Duration::from_secs(15), detached).await.unwrap_or_else(|_| panic!("{say:?}")).unwrap();
        assert_eq!(host.alive(), alive, "{say:?}");
        assert_eq!(host.credentials.borrow().host.token, token, "{say:?}");
        host.outbound.lead_to(&[Target::Tcp(cluster.balancer.address())]);
        host.outbound.cut();
        host.wait_attached(Duration::from_secs(10)).await;
    }
    assert_eq!(cluster.team.status(&id).await, "running");
    truth::judge(&cluster, &[&host]).await;
}
