//! `make bench-api`: what the way through the API costs, into builds/bench-api.json, each figure beside its floor and judged.
//!
//! One `wrenn-cp`, a PostgreSQL of its own, and a host whose microVMs are processes: in each a real envd, so that the way is the real one,
//! by mutual TLS from the control plane to the agent and by HTTP from there, and what is at its end is as fast as this machine. The floor
//! is the same program, asked without anything between.

mod events;
mod relays;
mod terminals;

#[allow(dead_code)]
#[path = "../../tests/faults/agent.rs"]
mod agent;
#[allow(dead_code)]
#[path = "../../tests/faults/client.rs"]
mod client;
#[allow(dead_code)]
#[path = "../../tests/faults/cluster.rs"]
mod cluster;
#[allow(dead_code, unused_imports)]
#[path = "../../../../tests/src/figures.rs"]
mod figures;
#[allow(dead_code)]
#[path = "../../tests/faults/host.rs"]
mod host;
#[allow(dead_code)]
#[path = "../../tests/faults/place.rs"]
mod place;
#[path = "../../../host-agent/tests/stage/mod.rs"]
mod stage;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use reqwest::header::{HeaderMap, HeaderValue};

use cluster::Cluster;
use figures::Judged;
use host::Host;

/// What all figures are measured on.
pub struct Bench {
    pub cluster: Cluster,
    _host: Host,
    /// Of the replica, without the balancer of the fault tests.
    pub url: String,
    pub key: String,
    /// With connections that are kept.
    pub http: reqwest::Client,
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    match runtime.block_on(run()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench-api: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<bool> {
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../builds/bench-api.json");
    figures::forget(&place)?;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).context("ask for the limit of descriptors")?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("raise the limit of descriptors")?;
    envd()?;
    let bench = Bench::start().await?;
    let mut all: Vec<Judged> = Vec::new();
    all.extend(relays::commands(&bench).await?);
    all.extend(relays::files(&bench).await?);
    all.extend(relays::streams(&bench).await?);
    all.push(terminals::idle(&bench).await?);
    all.push(events::fan_out(&bench).await?);
    figures::write(&place, &all, "microVMs that are processes, PostgreSQL without fsync")?;
    println!("\nfigures: {}", place.display());
    Ok(all.iter().all(Judged::is_fine))
}

impl Bench {
    async fn start() -> Result<Self> {
        let cluster = Cluster::alone(1).await;
        let host = Host::join_with(&cluster, real_envd).await;
        let url = format!("http://{}", cluster.replicas[0].address);
        let key = cluster.team.key_text().to_owned();
        let mut headers = HeaderMap::new();
        headers.insert("X-API-Key", HeaderValue::from_str(&key).context("a key is ASCII")?);
        let http = reqwest::Client::builder().default_headers(headers).build().context("make a client")?;
        Ok(Self { cluster, _host: host, url, key, http })
    }

    /// A sandbox that runs.
    pub async fn sandbox(&self) -> Result<String> {
        Ok(self.cluster.team.running(&format!("bench-{}", rand::random::<u64>())).await)
    }

    pub fn path(&self, sandbox: &str, rest: &str) -> String {
        format!("{}/v1/sandboxes/{sandbox}/{rest}", self.url)
    }

    /// Of the replica, in MiB.
    pub fn memory(&self, field: &str) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.cluster.replicas[0].pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)).context("its size is told")?;
        let kib: f64 = line.trim_start_matches(':').trim().trim_end_matches("kB").trim().parse()?;
        Ok(kib / 1024.0)
    }

    /// From now on `VmHWM` is the most since now.
    pub fn forget_peak(&self) -> Result<()> {
        let file = format!("/proc/{}/clear_refs", self.cluster.replicas[0].pid());
        std::fs::write(file, "5").context("reset the peak")
    }
}

/// Beside this program's own directory.
pub fn envd() -> Result<PathBuf> {
    let me = std::env::current_exe().context("find this program")?;
    let found = me.ancestors().skip(1).map(|dir| dir.join("envd")).find(|path| path.is_file());
    found.context("envd is not built: run `cargo build --workspace` first")
}

/// What runs in a microVM's place: as root, whose commands then run as they do in a sandbox, and no longer than this program.
fn real_envd(_: &Path, launch: &microvm::Launch) -> Command {
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let port = port.expect("there is a free port").port().to_string();
    std::fs::write(stage::port_file(launch), &port).expect("the stage can be written to");
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(envd().expect("it was looked for before"));
    command.args(["--standalone", "--port", &port]);
    command
}
