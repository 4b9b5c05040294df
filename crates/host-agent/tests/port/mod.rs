//! The agent's port with real certificates, on a stage without kernel objects.

#![allow(dead_code)] // Each test program uses its part.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use api::v1::hosts::HostFacts;
use chrono::{TimeDelta, Utc};
use host_agent::agent::Agent;
use host_agent::credentials::{Credentials, HostToken, KeyPem};
use host_agent::gauges::Gauges;
use host_agent::heartbeat::Link;
use host_agent::idleness::Idleness;
use host_agent::rpc::{Service, serve};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::platform::{Authority, Client};
use crate::stage::{self, Stage};

pub struct Port {
    pub authority: Authority,
    pub url: String,
    pub stop: CancellationToken,
    pub agent: Arc<Agent>,
    /// How the host stands with its control plane; attached at first.
    pub link: watch::Sender<Link>,
    /// What the port shows from the next connection on.
    pub tls: watch::Sender<Arc<rustls::ServerConfig>>,
    pub disk_hangs: Arc<AtomicBool>,
    pub stage: Stage,
    _dir: tempfile::TempDir,
}

impl Port {
    /// With a real envd in each sandbox.
    pub async fn open() -> Self {
        let envd = envd();
        let fake = microvm::fake::Fake::with_body(move |launch| {
            let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            std::fs::write(stage::port_file(launch), port.to_string()).unwrap();
            let mut command = Command::new(&envd);
            command.args(["--standalone", "--port", &port.to_string()]);
            command
        });
        Self::with(fake).await
    }

    /// With what `fake` starts in each sandbox.
    pub async fn with(fake: microvm::fake::Fake) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let stage = Stage::new(dir.path());
        let (sandboxes, driver) = stage.agent_with(fake).await;
        let authority = Authority::new();
        let (certificate, key) = authority.certificate("wrenn-agent");
        let credentials = Credentials {
            host: HostToken {
                format: 1,
                host_id: "host-1".to_owned(),
                token: String::new(),
                token_issued_at: Utc::now(),
                token_expires_at: Utc::now() + TimeDelta::days(30),
                epoch: 1,
                cp_url: "http://127.0.0.1:1".parse().unwrap(),
                address: "127.0.0.1:1".to_owned(),
                registered_with: String::new(),
            },
            cert_pem: certificate.pem(),
            ca_pem: authority.pem.clone(),
            key_pem: KeyPem(key.serialize_pem()),
        };
        let (tls, shown) = watch::channel(serve::server_config(&credentials).unwrap());
        let disk_hangs = Arc::new(AtomicBool::new(false));
        let hangs = disk_hangs.clone();
        let (link, standing) = watch::channel(Link::Attached);
        let agent = Arc::new(Agent {
            idleness: Idleness::new(sandboxes.context().changed.clone()),
            gauges: Gauges::new(dir.path()),
            sandboxes,
            credentials: watch::channel(credentials).1,
            link: standing,
            driver,
            vmm_notes: Arc::default(),
            cgroup_driver: "none".to_owned(),
            ground_notes: Vec::new(),
            count: Box::new(|| Box::pin(async { [("sandboxes".to_owned(), 1)].into() })),
            hardware: Box::new(move || {
                let hangs = hangs.load(Ordering::Relaxed);
                Box::pin(async move {
                    if hangs {
                        std::future::pending::<()>().await;
                    }
                    HostFacts { cpu_cores: 2, ..HostFacts::default() }
                })
            }),
            seen: Arc::default(),
            looking: Arc::default(),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        let stop = CancellationToken::new();
        tokio::spawn(serve::serve(listener, Service::new(agent.clone()), shown, stop.clone()));
        Self { authority, url, stop, agent, link, tls, disk_hangs, stage, _dir: dir }
    }

    pub fn client(&self) -> Client {
        self.authority.control_plane(&self.url)
    }
}

/// The program, built once.
fn envd() -> std::path::PathBuf {
    static BUILT: OnceLock<std::path::PathBuf> = OnceLock::new();
    BUILT
        .get_or_init(|| {
            let status = Command::new(env!("CARGO")).args(["build", "--quiet", "-p", "envd"]).status().unwrap();
            assert!(status.success(), "envd does not build");
            // target/debug/deps/<this test>
            std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("envd")
        })
        .clone()
}
