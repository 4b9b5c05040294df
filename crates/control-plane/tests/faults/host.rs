//! A host whose agent is a part of the test. Between it and the control plane stand two proxies, one for each direction of calls.

use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::v1::hosts::Heartbeat;
use host_agent::credentials::Credentials;
use host_agent::heartbeat::Link;
use host_agent::identity;
use host_agent::sandbox::Sandboxes;
use reqwest::Method;
use serde_json::{Value, json};
use testkit::cut_proxy::{CutProxy, Target};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::agent::{self, Body, Plan};
use super::cluster::{Cluster, wait};
use super::place::{self, Place};

pub struct Host {
    /// From the control plane to the agent's port.
    pub inbound: CutProxy,
    /// From the agent to the control plane.
    pub outbound: CutProxy,
    pub sandboxes: Arc<Sandboxes>,
    pub credentials: watch::Receiver<Credentials>,
    pub link: watch::Receiver<Link>,
    /// What the heartbeats said, the last last.
    pub told: Arc<Mutex<Vec<Heartbeat>>>,
    /// Of its port, behind the proxy.
    pub port: SocketAddr,
    place: Place,
    stop: CancellationToken,
    _dir: tempfile::TempDir,
}

/// Where the agent keeps who it is.
const IDENTITY: [&str; 5] = ["host-token", "host-key.pem", "host-cert.pem", "ca.pem", "host-ticket"];

/// What a disk says of who its machine is, as it was at some time.
pub struct Disk(Vec<(&'static str, Vec<u8>)>);

/// By what an agent is a host.
enum From<'a> {
    Token(&'a str),
    Disk(&'a Disk),
}

impl Host {
    pub async fn join(cluster: &Cluster) -> Self {
        Self::join_as(cluster, json!({"type": "regular"})).await
    }

    /// By what `POST /v1/hosts` is told.
    pub async fn join_as(cluster: &Cluster, new: Value) -> Self {
        Self::joined(cluster, new, place::body).await
    }

    /// Whose microVMs are these.
    #[allow(dead_code)] // The bench of the API has others than these tests.
    pub async fn join_with(cluster: &Cluster, body: Body) -> Self {
        Self::joined(cluster, json!({"type": "regular"}), body).await
    }

    async fn joined(cluster: &Cluster, new: Value, body: Body) -> Self {
        let host = Self::start(cluster, From::Token(&token(cluster, new).await), body).await;
        host.wait_attached(Duration::from_secs(30)).await;
        host
    }

    /// A machine with this disk, at another address.
    pub async fn copy(cluster: &Cluster, disk: &Disk) -> Self {
        Self::start(cluster, From::Disk(disk), place::body).await
    }

    /// Its disk, as it is now.
    pub fn disk(&self) -> Disk {
        Disk(IDENTITY.iter().map(|name| (*name, std::fs::read(self.place.dir.join(name)).unwrap())).collect())
    }

    /// Its agent ends; what it runs goes on.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    async fn start(cluster: &Cluster, from: From<'_>, body: Body) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap();
        let inbound = CutProxy::start(&[Target::Tcp(port)]).await.unwrap();
        let outbound = CutProxy::start(&[Target::Tcp(cluster.balancer.address())]).await.unwrap();
        let stop = CancellationToken::new();
        let token = match from {
            From::Token(token) => Some(token),
            From::Disk(Disk(disk)) => {
                for (name, bytes) in disk {
                    std::fs::write(dir.path().join(name), bytes).unwrap();
                }
                None
            }
        };
        let plan = Plan {
            dir: dir.path(),
            listener,
            address: &inbound.address().to_string(),
            cp_url: &format!("http://{}", outbound.address()),
            token,
            body,
        };
        let running = agent::start(plan, &stop).await;
        let id = running.credentials.borrow().host.host_id.parse().unwrap();
        let tag = identity::load_or_make(dir.path(), "machine").unwrap();
        Self {
            inbound,
            outbound,
            sandboxes: running.sandboxes,
            credentials: running.credentials,
            link: running.link,
            told: running.told,
            port,
            place: Place { id, tag, dir: dir.path().to_owned() },
            stop,
            _dir: dir,
        }
    }

    /// Its next heartbeat comes now, when it is attached.
    pub fn speak(&self) {
        self.sandboxes.context().changed.notify_one();
    }

    pub async fn wait_attached(&self, time_max: Duration) -> Duration {
        wait("the host to be attached", time_max, || async { *self.link.borrow() == Link::Attached }).await
    }
}

/// For a host that is to join, by what `POST /v1/hosts` is told.
pub async fn token(cluster: &Cluster, new: Value) -> String {
    let made = cluster.admin.call(Method::POST, "/v1/hosts", Some(new)).await.unwrap();
    made.body["registration_token"].as_str().unwrap_or_else(|| panic!("{}", made.body)).to_owned()
}

impl Deref for Host {
    type Target = Place;

    fn deref(&self) -> &Place {
        &self.place
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
