//! Mutual TLS between control plane and host: who shows a certificate that is not this host's, or no longer good, is asked for nothing; and
//! certificates change while calls are under way.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use api::host::ListSandboxesRequest;
use chrono::{DateTime, TimeDelta, Utc};
use control_plane::agents::Agents;
use control_plane::authority::{Authority, HostRequest};
use control_plane::networks::Networks;
use control_plane::secrets::Secret;
use host_agent::credentials::certificate_request;
use model::ids::HostId;
use rustls::SupportedProtocolVersion;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use testkit::cut_proxy::Target;

use super::answers::{Say, impostor};
use super::cluster::Cluster;
use super::host::Host;
use super::truth;

const TOLD_MAX: Duration = Duration::from_secs(30);

async fn authority(cluster: &Cluster) -> Authority {
    let store = store::Store::new(&cluster.database.url).unwrap();
    let secret = Secret::load(cluster.dir.path()).unwrap().unwrap();
    Authority::load_or_make(&store, &secret).await.unwrap()
}

/// A server with a certificate of the platform's authority, made for this host at that time.
fn certified(
    authority: &Authority,
    host: HostId,
    at: DateTime<Utc>,
    version: &'static SupportedProtocolVersion,
) -> Arc<rustls::ServerConfig> {
    let key = rcgen::KeyPair::generate().unwrap();
    let request = HostRequest::parse(&certificate_request(&key, "127.0.0.1:1").unwrap()).unwrap();
    let pem = authority.sign_host(request, host, "127.0.0.1", at).unwrap();
    let chain = vec![CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()];
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let mut config = rustls::ServerConfig::builder_with_protocol_versions(&[version])
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// The worst of them is a host that is well: it would answer that it has no such sandbox.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_this_host_is_asked_for_nothing() {
    let cluster = Cluster::start(1).await;
    let host = Host::join(&cluster).await;
    let team = &cluster.team;
    let mut doomed = Vec::new();
    for number in 0..4 {
        doomed.push(team.running(&format!("number {number}")).await);
    }
    let other = Host::join(&cluster).await;
    truth::judge(&cluster, &[&host, &other]).await;
    let authority = authority(&cluster).await;
    let (tls13, tls12) = (&rustls::version::TLS13, &rustls::version::TLS12);
    let asked = Arc::<AtomicUsize>::default();
    let stand_in = async |tls| impostor(Say::Empty, Some(tls), asked.clone()).await;
    let month_ago = Utc::now() - TimeDelta::days(31);
    let others: [(&str, SocketAddr); 4] = [
        ("another host of the platform", other.port),
        ("the certificate of another host", stand_in(certified(&authority, other.id, Utc::now(), tls13)).await),
        ("the host's certificate, expired", stand_in(certified(&authority, host.id, month_ago, tls13)).await),
        ("the host's certificate by TLS 1.2", stand_in(certified(&authority, host.id, Utc::now(), tls12)).await),
    ];
    for ((what, address), id) in others.iter().zip(&doomed) {
        let alive = host.alive();
        host.inbound.lead_to(&[Target::Tcp(*address)]);
        host.inbound.cut();
        let killed = team.verb_once(id, "kill", 1).await.unwrap();
        assert_eq!((killed.status, killed.body["status"].as_str()), (202, Some("stopping")), "{what}: {}", killed.body);
        // It is asked about what it does not name, too.
        cluster.database.sql("update sandboxes set absent_since = now() where observed in ('running', 'paused')").await;
        tokio::time::sleep(Duration::from_millis(2600)).await;
        assert_eq!(cluster.count("sandboxes where observed in ('failed', 'lost')").await, 0, "{what}");
        assert_eq!((host.alive(), asked.load(Ordering::Relaxed)), (alive, 0), "{what}");
        host.inbound.lead_to(&[Target::Tcp(host.port)]);
        host.inbound.cut();
        team.wait_status(id, "stopped", TOLD_MAX).await;
    }
    // The stand-ins are such that one with the right certificate is asked.
    let right = stand_in(certified(&authority, host.id, Utc::now(), tls13)).await;
    let id = team.running("asked").await;
    host.inbound.lead_to(&[Target::Tcp(right)]);
    host.inbound.cut();
    team.verb_once(&id, "kill", 1).await.unwrap();
    assert!(asked.load(Ordering::Relaxed) > 0);
    host.inbound.lead_to(&[Target::Tcp(host.port)]);
    host.inbound.cut();
    team.wait_status(&id, "stopped", TOLD_MAX).await;
    truth::judge(&cluster, &[&host, &other]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_planes_certificate_changes_without_a_gap() {
    let cluster = Cluster::start(1).await;
    let host = Host::join(&cluster).await;
    let authority = authority(&cluster).await;
    let mut networks = Networks::default();
    networks.allow([127, 0, 0, 1].into());
    let agents = Arc::new(Agents::new(&authority.client_config(Utc::now()).unwrap(), networks));
    let address = host.inbound.address().to_string();
    let (caller, id, calls) = (agents.clone(), host.id, 200);
    let calling = tokio::spawn(async move {
        for _ in 0..calls {
            let agent = caller.at(id, &address, None).unwrap();
            agent.list_sandboxes(ListSandboxesRequest::default()).await.unwrap();
        }
    });
    while !calling.is_finished() {
        agents.renew(&authority.client_config(Utc::now()).unwrap());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    calling.await.unwrap();
    // One that is no longer good opens nothing.
    agents.renew(&authority.client_config(Utc::now() - TimeDelta::days(8)).unwrap());
    let agent = agents.at(id, &host.inbound.address().to_string(), None).unwrap();
    assert!(agent.list_sandboxes(ListSandboxesRequest::default()).await.is_err());
}
