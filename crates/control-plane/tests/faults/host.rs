//! A host: the real agent's library with registration, port and heartbeat, on a stage without kernel objects. Between it and the control
//! plane stand two proxies, one for each direction of calls.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::v1::hosts::{Heartbeat, HostFacts};
use host_agent::agent::Agent;
use host_agent::credentials::{Credentials, Files};
use host_agent::heartbeat::{self, Beat, Link};
use host_agent::identity::{self, Tag};
use host_agent::idleness::Idleness;
use host_agent::registration::{Registration, keep_fresh, register};
use host_agent::rpc::{Service, serve};
use host_agent::sandbox::Sandboxes;
use host_agent::ticket::Ticket;
use model::ids::HostId;
use reqwest::Method;
use serde_json::{Value, json};
use testkit::cut_proxy::{CutProxy, Target};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::cluster::{Cluster, wait};
use super::stage::{self, Stage};

/// Which sandbox a user of the host was last given for.
type Launches = Arc<Mutex<Vec<(u32, String)>>>;

pub struct Host {
    pub id: HostId,
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
    pub port: std::net::SocketAddr,
    launches: Launches,
    tag: Tag,
    stage: Stage,
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
        let made = cluster.admin.call(Method::POST, "/v1/hosts", Some(new)).await.unwrap();
        let token = made.body["registration_token"].as_str().unwrap_or_else(|| panic!("{}", made.body));
        let host = Self::start(cluster, From::Token(token)).await;
        host.wait_attached(Duration::from_secs(30)).await;
        host
    }

    /// A machine with this disk, at another address.
    pub async fn copy(cluster: &Cluster, disk: &Disk) -> Self {
        Self::start(cluster, From::Disk(disk)).await
    }

    /// Its disk, as it is now.
    pub fn disk(&self) -> Disk {
        Disk(IDENTITY.iter().map(|name| (*name, std::fs::read(self.stage.dir.join(name)).unwrap())).collect())
    }

    /// Its agent ends; what it runs goes on.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    async fn start(cluster: &Cluster, from: From<'_>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let stage = Stage::new(dir.path());
        let tag = identity::load_or_make(dir.path(), "machine").unwrap();
        let launches = Launches::default();
        let noted = launches.clone();
        let fake = microvm::fake::Fake::with_body(move |launch| {
            // pool/sandboxes/<id>/run/<incarnation>
            let id = launch.dir.ancestors().nth(2).unwrap().file_name().unwrap().to_string_lossy().into_owned();
            noted.lock().unwrap().push((launch.jail.uid, id));
            stage::body(launch)
        });
        let (sandboxes, driver) = stage.agent_with(fake).await;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap();
        let inbound = CutProxy::start(&[Target::Tcp(port)]).await.unwrap();
        let outbound = CutProxy::start(&[Target::Tcp(cluster.balancer.address())]).await.unwrap();
        let stop = CancellationToken::new();
        let facts = HostFacts {
            arch: "x86_64".to_owned(),
            cpu_cores: 64,
            memory_mb: 1 << 17,
            disk_gb: 1000,
            isolation: "fake".to_owned(),
            agent_version: "0".to_owned(),
            templates: vec!["minimal".to_owned()],
        };
        let files = Files::new(dir.path());
        let (cp_url, address) = (format!("http://{}", outbound.address()), inbound.address().to_string());
        let credentials = match from {
            From::Disk(Disk(disk)) => {
                for (name, bytes) in disk {
                    std::fs::write(dir.path().join(name), bytes).unwrap();
                }
                let mut credentials = files.load().unwrap().unwrap();
                credentials.host.cp_url = cp_url.parse().unwrap();
                credentials
            }
            From::Token(token) => {
                let registration = Registration {
                    files: &files,
                    cp_url: &cp_url.parse().unwrap(),
                    address: &address,
                    token,
                    facts: facts.clone(),
                };
                register(registration, &stop).await.unwrap()
            }
        };
        sandboxes.see_epoch(credentials.host.epoch);
        let tls = watch::channel(serve::server_config(&credentials).unwrap()).1;
        let id = credentials.host.host_id.parse().unwrap();
        let ticket = Ticket::load(dir.path(), &credentials.host.host_id);
        let fresh = Arc::new(watch::channel(credentials).0);
        let credentials = fresh.subscribe();
        tokio::spawn(keep_fresh(files, address, fresh, ticket.clone(), stop.clone()));
        let (link_sender, link) = watch::channel(Link::Unknown);
        let idleness = Idleness::new(sandboxes.context().changed.clone());
        let agent = Arc::new(Agent {
            idleness: idleness.clone(),
            sandboxes: sandboxes.clone(),
            credentials: credentials.clone(),
            link: link.clone(),
            driver,
            vmm_notes: Arc::default(),
            cgroup_driver: "none".to_owned(),
            ground_notes: Vec::new(),
            count: Box::new(|| Box::pin(async { BTreeMap::new() })),
            hardware: Box::new(move || {
                let facts = facts.clone();
                Box::pin(async move { facts })
            }),
            seen: Arc::default(),
            looking: Arc::default(),
        });
        tokio::spawn(serve::serve(listener, Service::new(agent.clone()), tls, stop.clone()));
        let told = Arc::<Mutex<Vec<Heartbeat>>>::default();
        let (epochs, kept) = (sandboxes.clone(), told.clone());
        let beat = Beat {
            report: Box::new(move || {
                let (agent, kept) = (agent.clone(), kept.clone());
                Box::pin(async move {
                    let report = agent.report().await;
                    kept.lock().unwrap().push(report.clone());
                    report
                })
            }),
            changed: sandboxes.context().changed.clone(),
            credentials: credentials.clone(),
            ticket,
            epoch_seen: Box::new(move |epoch| epochs.see_epoch(epoch)),
            idle_timeouts: Box::new(move |timeouts| idleness.tell(timeouts)),
            link: link_sender,
        };
        tokio::spawn(heartbeat::run(beat, stop.clone()));
        Self { id, inbound, outbound, sandboxes, credentials, link, told, port, launches, tag, stage, stop, _dir: dir }
    }

    /// Its next heartbeat comes now, when it is attached.
    pub fn speak(&self) {
        self.sandboxes.context().changed.notify_one();
    }

    pub async fn wait_attached(&self, time_max: Duration) -> Duration {
        wait("the host to be attached", time_max, || async { *self.link.borrow() == Link::Attached }).await
    }

    /// Sandboxes with a living process, by what the kernel says, and the processes.
    pub fn alive(&self) -> BTreeMap<String, BTreeSet<i32>> {
        let launches = self.launches.lock().unwrap();
        let mut alive: BTreeMap<String, BTreeSet<i32>> = BTreeMap::new();
        for pid in stage::processes_of(&self.tag) {
            let uid = std::fs::metadata(format!("/proc/{pid}")).map(|data| std::os::unix::fs::MetadataExt::uid(&data));
            let Ok(uid) = uid else { continue };
            let of = launches.iter().rev().find(|(user, _)| *user == uid).map(|(_, id)| id.clone());
            alive.entry(of.unwrap_or_else(|| format!("nobody's, of user {uid}"))).or_default().insert(pid);
        }
        alive
    }

    /// How often a microVM of the sandbox was begun.
    pub fn launches_of(&self, id: &str) -> usize {
        self.launches.lock().unwrap().iter().filter(|(_, of)| of == id).count()
    }

    /// What lies in the sandbox's directory.
    pub fn files_of(&self, id: &str) -> BTreeSet<String> {
        let dir = self.stage.dir.join("pool/sandboxes").join(id);
        let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
        names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    /// Whether saved memory of it lies there.
    pub fn has_saved(&self, id: &str) -> bool {
        self.files_of(id).iter().any(|name| name.starts_with("gen-") && !name.ends_with(".tmp"))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop.cancel();
        for pid in stage::processes_of(&self.tag) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}
