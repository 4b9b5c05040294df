//! `make bench-cp`: figures of the control plane alone into builds/bench-cp.json, each beside the floor of the same run, and judged.
//!
//! It runs `wrenn-cp` on a PostgreSQL of its own (without fsync, as in the tests, so that what is measured is work and not a disk), with
//! hosts that are rows: their address takes connections and answers nothing. So a create ends where placement ends, with the sandbox, its
//! reservation and its operation written down (202), and no host does anything. The floor is the same number of clients asking `/health`,
//! which is one way through the server and one query.

use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use reqwest::Client;
use serde_json::{Value, json};
use testkit::postgres::Server;
use whole_machine::figures::{self, Figure, Judged, Limit};
use whole_machine::wait;

const DATABASE: &str = "bench";
/// A fleet of one rack, the same for a team with a quota, whose creates go one after the other, and a fleet of a large site.
const FLEETS: [Fleet; 3] = [
    Fleet { hosts: 10, quota: "", name: "creates_per_s_10_hosts", latency: "create_10_hosts" },
    Fleet { hosts: 10, quota: "1000000", name: "creates_per_s_quota", latency: "create_quota" },
    Fleet { hosts: 1000, quota: "", name: "creates_per_s_1000_hosts", latency: "create_1000_hosts" },
];
const CLIENTS: usize = 16;
/// Of each client, in each round.
const CREATES: usize = 25;
const ROUNDS: usize = 5;
/// On a machine of two slow cores that does other things, too: enough to fill a host with a thousand sandboxes in ten seconds.
const CREATES_PER_S_MIN: f64 = 100.0;
const READY_MAX: Duration = Duration::from_secs(30);

struct Fleet {
    hosts: usize,
    /// How many sandboxes a team may have; empty: no limit.
    quota: &'static str,
    name: &'static str,
    latency: &'static str,
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench-cp: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool> {
    let place = figures::place("bench-cp.json");
    figures::forget(&place)?;
    let runtime = tokio::runtime::Runtime::new().context("make a runtime")?;
    let mut all = Vec::new();
    for fleet in &FLEETS {
        all.extend(runtime.block_on(measure(fleet))?);
    }
    figures::write(&place, &all, &format!("{CLIENTS} clients, PostgreSQL without fsync"))?;
    println!("\nfigures: {}", place.display());
    Ok(all.iter().all(Judged::is_fine))
}

/// A control plane that ends with this.
struct ControlPlane(Child);

impl Drop for ControlPlane {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn measure(fleet: &Fleet) -> Result<Vec<Judged>> {
    let server = Server::start().context("start PostgreSQL")?;
    let database = server.create_database(DATABASE)?;
    let dir = tempfile::tempdir().context("make a directory")?;
    // What connects to it waits for an answer, which costs nobody anything.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.context("listen")?;
    let address = silent.local_addr().context("ask for the port")?;
    let held = tokio::spawn(async move {
        let mut connections = Vec::new();
        while let Ok((connection, _)) = silent.accept().await {
            connections.push(connection);
        }
    });
    let (_control_plane, base, admin) = start(&database, dir.path(), fleet.quota).await?;
    let http = Client::builder().timeout(Duration::from_secs(30)).build().context("make a client")?;
    let answer: Value = http
        .post(format!("{base}/v1/api-keys"))
        .bearer_auth(&admin)
        .json(&json!({}))
        .send()
        .await?
        .json()
        .await
        .context("make a key")?;
    let key = answer["key"].as_str().context("the answer has a key")?.to_owned();
    server.query(
        DATABASE,
        &format!(
            "insert into hosts (id, kind, state, address, arch, cpu_cores, memory_mb, disk_gb, disk_free_mb, isolation, agent_version,
                 templates, created_by, last_heartbeat_at)
             select gen_random_uuid(), 'regular', 'active', '{address}', 'x86_64', 64, 262144, 4000, 4000000, 'none', '0',
                 '{{minimal}}', 'bench', now() + interval '1 hour'
             from generate_series(1, {})",
            fleet.hosts
        ),
    )?;
    let (mut rates, mut floor, mut latencies) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let began = Instant::now();
        let took = side_by_side(|| async {
            let request = http.post(format!("{base}/v1/sandboxes?wait_sec=0")).header("X-API-Key", &key);
            let answer = request.json(&json!({"memory_mb": 128, "disk_size_mb": 1024})).send().await?;
            ensure!(answer.status() == 202, "a create was answered with {}", answer.status());
            Ok(())
        })
        .await?;
        let rate = (CLIENTS * CREATES) as f64 / began.elapsed().as_secs_f64();
        let began = Instant::now();
        side_by_side(|| async {
            let answer = http.get(format!("{base}/health")).send().await?;
            ensure!(answer.status() == 200, "health is {}", answer.status());
            Ok(())
        })
        .await?;
        // The first round connects, plans and fills caches.
        if round > 0 {
            rates.push(rate);
            floor.push((CLIENTS * CREATES) as f64 / began.elapsed().as_secs_f64());
            latencies.extend(took);
        }
    }
    held.abort();
    Ok(vec![
        Figure::of(fleet.name, "1/s", rates).beside(floor).judged(Limit::P50AtLeast(CREATES_PER_S_MIN)),
        Figure::of(fleet.latency, "ms", latencies).judged(Limit::None),
    ])
}

/// Milliseconds of each call of all clients.
async fn side_by_side<F: Future<Output = Result<()>>>(call: impl Fn() -> F) -> Result<Vec<f64>> {
    let client = || async {
        let mut took = Vec::with_capacity(CREATES);
        for _ in 0..CREATES {
            let began = Instant::now();
            call().await?;
            took.push(began.elapsed().as_secs_f64() * 1000.0);
        }
        Ok(took)
    };
    let all: Vec<Result<Vec<f64>>> = futures::future::join_all((0..CLIENTS).map(|_| client())).await;
    all.into_iter().collect::<Result<Vec<_>>>().map(|all| all.concat())
}

/// The program, where it serves, and an administrator's token.
async fn start(database: &str, dir: &Path, quota: &str) -> Result<(ControlPlane, String, String)> {
    let me = std::env::current_exe().context("find this program")?;
    let program = me.with_file_name("wrenn-cp");
    let ready = dir.join("ready.json");
    let command = || {
        let mut command = Command::new(&program);
        command.env("DATABASE_URL", database).env("WRENN_DIR", dir).env("WRENN_CP_LISTEN_ADDR", "127.0.0.1:0");
        if !quota.is_empty() {
            command.env("WRENN_QUOTA_SANDBOXES", quota);
        }
        command.env("WRENN_HOST_NETWORKS", "127.0.0.0/8").env("WRENN_LOG", "error").stdin(Stdio::null());
        command
    };
    let child = command()
        .arg("--ready-file")
        .arg(&ready)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("start {}", program.display()))?;
    let control_plane = ControlPlane(child);
    let told: Value = wait::until("the control plane serves", READY_MAX, || async {
        std::fs::read(&ready).ok().and_then(|text| serde_json::from_slice(&text).ok())
    })
    .await;
    let address = told["addr"].as_str().context("the ready file has an address")?;
    let token = command().arg("admin-token").output().context("ask for a token")?;
    ensure!(token.status.success(), "wrenn-cp admin-token: {}", String::from_utf8_lossy(&token.stderr));
    let token = String::from_utf8(token.stdout).context("read the token")?.trim().to_owned();
    Ok((control_plane, format!("http://{address}"), token))
}
