//! The real agent's library with registration, port and heartbeat, on a stage without kernel objects, on microVMs that are processes.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use api::v1::hosts::{Heartbeat, HostFacts};
use host_agent::agent::Agent;
use host_agent::credentials::{Credentials, Files};
use host_agent::gauges::Gauges;
use host_agent::heartbeat::{self, Beat, Link};
use host_agent::idleness::Idleness;
use host_agent::registration::{Registration, keep_fresh, register};
use host_agent::rpc::{Service, serve};
use host_agent::sandbox::Sandboxes;
use host_agent::ticket::Ticket;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::stage::Stage;

pub struct Plan<'a> {
    pub dir: &'a Path,
    /// Its port.
    pub listener: TcpListener,
    /// By which the control plane reaches it.
    pub address: &'a str,
    pub cp_url: &'a str,
    /// Of a host that is not registered yet.
    pub token: Option<&'a str>,
    pub body: Body,
}

/// The process of a microVM on a host with this directory.
pub type Body = fn(&Path, &microvm::Launch) -> Command;

pub struct Running {
    pub agent: Arc<Agent>,
    pub sandboxes: Arc<Sandboxes>,
    pub credentials: watch::Receiver<Credentials>,
    pub link: watch::Receiver<Link>,
    /// What the heartbeats said, the last last.
    pub told: Arc<Mutex<Vec<Heartbeat>>>,
}

/// How many heartbeats are kept for tests to look at.
const TOLD_MAX: usize = 1000;

/// Takes up what is in the directory, joins where it has not joined yet, and serves until `stop`.
pub async fn start(plan: Plan<'_>, stop: &CancellationToken) -> Running {
    let stage = Stage::new(plan.dir);
    let files = Files::new(plan.dir);
    let dir = plan.dir.to_owned();
    let fake = microvm::fake::Fake::with_body(move |launch| (plan.body)(&dir, launch));
    let (sandboxes, driver) = stage.agent_with(fake).await;
    let credentials = match plan.token {
        Some(token) => {
            let registration = Registration {
                files: &files,
                cp_url: &plan.cp_url.parse().unwrap(),
                address: plan.address,
                token,
                facts: facts(),
            };
            register(registration, stop).await.unwrap()
        }
        None => {
            let mut credentials = files.load().unwrap().expect("it has joined before");
            credentials.host.cp_url = plan.cp_url.parse().unwrap();
            credentials
        }
    };
    sandboxes.see_epoch(credentials.host.epoch);
    let tls = watch::channel(serve::server_config(&credentials).unwrap()).1;
    let ticket = Ticket::load(plan.dir, &credentials.host.host_id);
    let credentials = Arc::new(watch::channel(credentials).0);
    let (address, current) = (plan.address.to_owned(), credentials.clone());
    tokio::spawn(keep_fresh(files.clone(), address, current, ticket.clone(), stop.clone()));
    let (link_sender, link) = watch::channel(Link::Unknown);
    let idleness = Idleness::new(sandboxes.context().changed.clone());
    let gauges = Gauges::new(plan.dir);
    tokio::spawn(gauges.clone().watch(sandboxes.clone(), stop.clone()));
    let agent = Arc::new(Agent {
        idleness: idleness.clone(),
        gauges: gauges.clone(),
        sandboxes: sandboxes.clone(),
        credentials: credentials.subscribe(),
        link: link.clone(),
        driver,
        vmm_notes: Arc::default(),
        cgroup_driver: "none".to_owned(),
        ground_notes: Vec::new(),
        count: Box::new(|| Box::pin(async { BTreeMap::new() })),
        hardware: Box::new(|| Box::pin(async { facts() })),
        seen: Arc::default(),
        looking: Arc::default(),
    });
    tokio::spawn(serve::serve(plan.listener, Service::new(agent.clone()), tls, stop.clone()));
    let told = Arc::<Mutex<Vec<Heartbeat>>>::default();
    let (speaker, kept) = (agent.clone(), told.clone());
    let beat = Beat {
        report: Box::new(move || {
            let (agent, kept) = (speaker.clone(), kept.clone());
            Box::pin(async move {
                let report = agent.report().await;
                let mut kept = kept.lock().unwrap();
                if kept.len() == TOLD_MAX {
                    kept.drain(..TOLD_MAX / 2);
                }
                kept.push(report.clone());
                report
            })
        }),
        changed: sandboxes.context().changed.clone(),
        credentials: credentials.subscribe(),
        ticket,
        epoch_seen: heartbeat::epoch_keeper(sandboxes.clone(), credentials.clone(), files),
        idle_timeouts: Box::new(move |timeouts| idleness.tell(timeouts)),
        link: link_sender,
    };
    tokio::spawn(heartbeat::run(beat, stop.clone()));
    Running { agent, sandboxes, credentials: credentials.subscribe(), link, told }
}

fn facts() -> HostFacts {
    HostFacts {
        arch: "x86_64".to_owned(),
        cpu_cores: 64,
        memory_mb: 1 << 17,
        disk_gb: 1000,
        isolation: "fake".to_owned(),
        agent_version: "0".to_owned(),
        templates: vec!["minimal".to_owned()],
    }
}
