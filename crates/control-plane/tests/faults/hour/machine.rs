//! A host whose agent is a process, in a network namespace of its own: it can be killed, and its next one finds what lives.

use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use host_agent::credentials::Files;
use host_agent::identity::{self, Lock};
use host_agent::measures;
use serde::{Deserialize, Serialize};
use testkit::cut_proxy::{CutProxy, Target};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::super::agent::{self, Plan};
use super::super::cluster::{ARMED, Cluster, arm, show_log, wait};
use super::super::host::token;
use super::super::place::{self, Place, end_microvms};
use super::super::stage;
use super::cables::Cables;

/// Tells a copy of this program that it is an agent: [`Asked`].
const ASKED: &str = "WRENN_TEST_AGENT";
const PORT: u16 = 50051;
const METRICS_PORT: u16 = 9471;
const JOIN_MAX: Duration = Duration::from_secs(60);

#[derive(Serialize, Deserialize)]
struct Asked {
    dir: PathBuf,
    address: String,
    cp_url: String,
    token: Option<String>,
}

/// Serves until it is killed, or until the test that asked has ended, which ends its microVMs too; does nothing when nobody asked.
pub fn serve_if_asked() {
    let Ok(asked) = std::env::var(ASKED) else { return };
    let asked: Asked = serde_json::from_str(&asked).unwrap();
    tracing_subscriber::fmt().with_env_filter("info").with_ansi(false).with_writer(std::io::stderr).init();
    rustls::crypto::aws_lc_rs::default_provider().install_default().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let _lock = Lock::take(&asked.dir).await.unwrap();
        end_with_the_test(&asked.dir);
        let telemetry = telemetry::install(measures::TABLE, "0").unwrap();
        let listen = async |port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await.unwrap();
        let stop = CancellationToken::new();
        let plan = Plan {
            dir: &asked.dir,
            listener: listen(PORT).await,
            address: &asked.address,
            cp_url: &asked.cp_url,
            token: asked.token.as_deref(),
            body: place::body,
        };
        let running = agent::start(plan, &stop).await;
        let look: telemetry::Look = Box::new(move || Box::pin(measures::look(running.agent.clone())));
        telemetry::serve(listen(METRICS_PORT).await, telemetry, look, stop).await;
    });
}

/// Its standard input ends with the test, however that ends.
fn end_with_the_test(dir: &Path) {
    let tag = identity::load_or_make(dir, "machine").unwrap();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        end_microvms(&tag);
        #[expect(clippy::disallowed_methods, reason = "whoever would wait for an end in order is gone")]
        std::process::exit(1)
    });
}

pub struct Machine {
    pub number: usize,
    /// From the control plane to the agent's port.
    pub inbound: CutProxy,
    /// From the agent to the control plane.
    pub outbound: CutProxy,
    pub place: Arc<Place>,
    agent: Option<Child>,
    namespace: String,
    address: IpAddr,
    dir: tempfile::TempDir,
}

impl Machine {
    pub async fn join(cluster: &Cluster, cables: &Cables, number: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = cables.of_host(number);
        let inbound = CutProxy::start(&[Target::Tcp((address, PORT).into())]).await.unwrap();
        let outbound = CutProxy::start_at(cables.own(), &[Target::Tcp(cluster.balancer.address())]).await.unwrap();
        stage::Stage::new(dir.path());
        // Creates are restored from what the first of their kind leaves.
        std::fs::write(dir.path().join(stage::EDITION), "one").unwrap();
        let token = token(cluster, serde_json::json!({"type": "regular"})).await;
        let namespace = cables.namespace(number);
        let agent = spawn(&namespace, &asked(dir.path(), &inbound, &outbound, Some(token)));
        let files = Files::new(dir.path());
        // Held by what ends it, should it not join.
        let mut agent = Unjoined(Some(agent));
        wait("the host to join", JOIN_MAX, || async { files.load().is_ok_and(|known| known.is_some()) }).await;
        let id = files.load().unwrap().unwrap().host.host_id.parse().unwrap();
        let tag = identity::load_or_make(dir.path(), "machine").unwrap();
        let place = Arc::new(Place { id, tag, dir: dir.path().to_owned() });
        Self { number, inbound, outbound, place, agent: agent.0.take(), namespace, address, dir }
    }

    pub fn start(&mut self) {
        if self.agent.is_none() {
            let asked = asked(self.dir.path(), &self.inbound, &self.outbound, None);
            self.agent = Some(spawn(&self.namespace, &asked));
        }
    }

    /// As by kill -9.
    pub fn kill(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
    }

    pub fn has_ended(&mut self) -> bool {
        self.agent.as_mut().is_none_or(|agent| agent.try_wait().unwrap().is_some())
    }

    /// The agent dies where it next passes one of these.
    pub fn arm_any(&self, points: &[&str]) {
        arm(self.dir.path(), points);
    }

    pub fn disarm(&self) {
        let _ = std::fs::remove_file(self.dir.path().join(ARMED));
    }

    pub fn pid(&self) -> u32 {
        self.agent.as_ref().expect("it runs").id()
    }

    pub fn metrics(&self) -> SocketAddr {
        (self.address, METRICS_PORT).into()
    }

    pub fn log_path(&self) -> PathBuf {
        log_path(self.dir.path())
    }
}

struct Unjoined(Option<Child>);

impl Drop for Unjoined {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.0 {
            let _ = agent.kill();
            let _ = agent.wait();
        }
    }
}

fn log_path(dir: &Path) -> PathBuf {
    dir.join("agent.log")
}

fn asked(dir: &Path, inbound: &CutProxy, outbound: &CutProxy, token: Option<String>) -> Asked {
    let (address, cp_url) = (inbound.address().to_string(), format!("http://{}", outbound.address()));
    Asked { dir: dir.to_owned(), address, cp_url, token }
}

fn spawn(namespace: &str, asked: &Asked) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(log_path(&asked.dir)).unwrap();
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net=/run/netns/{namespace}"))
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "agent_process", "--nocapture"])
        .env(ASKED, serde_json::to_string(asked).unwrap())
        .env("WRENN_CRASHPOINTS_FILE", asked.dir.join(ARMED))
        // Ctrl-C reaches the test, and the agent by its end.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(log);
    command.spawn().unwrap()
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            show_log(&format!("agent-{}", self.number), &self.log_path());
        }
        self.kill();
    }
}
