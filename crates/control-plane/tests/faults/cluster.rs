//! A platform of real processes: replicas of `wrenn-cp` behind a balancer, a PostgreSQL of their own behind another proxy.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use control_plane::secrets::Secret;
use control_plane::tokens::Tokens;
use model::access::Scope;
use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::{Value, json};
use testkit::cut_proxy::{CutProxy, Target};
use testkit::keeper;
use testkit::postgres::Database;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::client::Client;

const START_MAX: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(20);

pub struct Cluster {
    pub database: Database,
    /// Between the replicas and PostgreSQL.
    pub to_database: CutProxy,
    /// Between clients or agents and the replicas.
    pub balancer: CutProxy,
    pub replicas: Vec<Replica>,
    pub admin: Client,
    /// With a key of the administrator's team.
    pub team: Client,
    pub dir: tempfile::TempDir,
    database_url: String,
    _room: SemaphorePermit<'static>,
}

pub struct Replica {
    child: Child,
    pub address: SocketAddr,
    pub metrics: SocketAddr,
    dir: PathBuf,
}

/// For as often a supervisor starts a replica again that ends before it serves: what it needs may break meanwhile.
const STARTS_MAX: u32 = 5;

/// Platforms side by side: they wait more than they work. A machine has few cores, and what measures time is alone.
const SIDE_BY_SIDE: u32 = 3;
static ROOM: Semaphore = Semaphore::const_new(SIDE_BY_SIDE as usize);

impl Cluster {
    /// With so many replicas.
    pub async fn start(replicas: usize) -> Self {
        Self::in_room(replicas, 1).await
    }

    /// For a test that measures time.
    pub async fn alone(replicas: usize) -> Self {
        Self::in_room(replicas, SIDE_BY_SIDE).await
    }

    async fn in_room(replicas: usize, parts: u32) -> Self {
        let room = ROOM.acquire_many(parts).await.expect("it is never closed");
        let database = Database::on_own_server().await;
        // What is acknowledged outlives the server's processes.
        database.sql(&format!("alter database {} set synchronous_commit = on", database.name())).await;
        Self::on(database, replicas, room).await
    }

    async fn on(database: Database, replicas: usize, room: SemaphorePermit<'static>) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let to_database = CutProxy::start(&[Target::Unix(database.server().socket())]).await.unwrap();
        let database_url = database.url_by(&[to_database.address().port()]);
        let balancer = CutProxy::start(&[]).await.unwrap();
        let url = format!("http://{}", balancer.address());
        let mut cluster = Self {
            database,
            to_database,
            balancer,
            replicas: Vec::new(),
            admin: Client::bearer(&url, ""),
            team: Client::key(&url, ""),
            dir,
            database_url,
            _room: room,
        };
        // The first makes the secret.
        for number in 0..replicas {
            let replica = cluster.spawn(number).await;
            cluster.replicas.push(replica);
        }
        cluster.balance();
        let token = cluster.command().arg("admin-token").output().unwrap();
        assert!(token.status.success(), "{}", String::from_utf8_lossy(&token.stderr));
        cluster.admin = Client::bearer(&url, String::from_utf8(token.stdout).unwrap().trim());
        let scopes: Vec<&str> = Scope::ALL.iter().map(|scope| scope.as_str()).collect();
        let made = cluster.admin.call(Method::POST, "/v1/api-keys", Some(json!({ "scopes": scopes }))).await.unwrap();
        cluster.team = Client::key(&url, made.body["key"].as_str().unwrap_or_else(|| panic!("{}", made.body)));
        cluster
    }

    /// The replicas connect to these servers from their next start on.
    pub fn use_databases(&mut self, ports: &[u16]) {
        self.database_url = self.database.url_by(ports);
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn-cp"));
        command
            .env("DATABASE_URL", &self.database_url)
            .env("WRENN_DIR", self.dir.path())
            .env("WRENN_CP_LISTEN_ADDR", "127.0.0.1:0")
            .env("WRENN_METRICS_LISTEN_ADDR", "127.0.0.1:0")
            .env("WRENN_HOST_NETWORKS", "127.0.0.0/8")
            .env("WRENN_LOG", "info")
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command
    }

    async fn spawn(&self, number: usize) -> Replica {
        for _ in 1..STARTS_MAX {
            if let Ok(replica) = self.spawn_once(number).await {
                return replica;
            }
        }
        self.spawn_once(number).await.unwrap_or_else(|log| panic!("{log}"))
    }

    /// The log, when it ends before it serves.
    async fn spawn_once(&self, number: usize) -> Result<Replica, String> {
        let dir = self.dir.path().join(format!("replica-{number}"));
        std::fs::create_dir_all(&dir).unwrap();
        let ready = dir.join("ready.json");
        let _ = std::fs::remove_file(&ready);
        let log = File::options().create(true).append(true).open(dir.join("log")).unwrap();
        let mut command = self.command();
        command
            .arg("--ready-file")
            .arg(&ready)
            .env("WRENN_CRASHPOINTS_FILE", dir.join(ARMED))
            .env("WRENN_CRASHPOINTS_LIST", dir.join("passed"))
            .stdout(Stdio::null())
            .stderr(log);
        let child = keeper::spawn(command, Signal::SIGKILL).unwrap();
        let nowhere = ([127, 0, 0, 1], 0).into();
        let mut replica = Replica { child, address: nowhere, metrics: nowhere, dir };
        let began = Instant::now();
        loop {
            if let Some(told) = std::fs::read(&ready).ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok())
            {
                replica.address = told["addr"].as_str().unwrap().parse().unwrap();
                replica.metrics = told["metrics"].as_str().unwrap().parse().unwrap();
                return Ok(replica);
            }
            if replica.has_ended() {
                return Err(replica.log());
            }
            assert!(began.elapsed() < START_MAX, "{}", replica.log());
            tokio::time::sleep(LOOK).await;
        }
    }

    /// A replica that has ended, or is ended now, starts again.
    pub async fn restart(&mut self, number: usize) {
        self.replicas[number].kill();
        let replica = self.spawn(number).await;
        self.replicas[number] = replica;
        self.balance();
    }

    fn balance(&self) {
        let targets: Vec<Target> = self.replicas.iter().map(|replica| Target::Tcp(replica.address)).collect();
        self.balancer.lead_to(&targets);
    }

    /// As the team's client, of one replica alone.
    pub fn at(&self, number: usize) -> Client {
        self.team.at(&format!("http://{}", self.replicas[number].address))
    }

    /// The lines that a statement answers, in parts.
    pub async fn rows(&self, statement: &str) -> Vec<Vec<String>> {
        let text = self.database.sql(statement).await;
        let parts = |line: &str| line.split('|').map(ToOwned::to_owned).collect();
        text.lines().filter(|line| !line.is_empty()).map(parts).collect()
    }

    pub async fn count(&self, of: &str) -> i64 {
        self.database.sql(&format!("select count(*) from {of}")).await.trim().parse().unwrap()
    }

    /// How long ago the hosts were last heard of grows by so much.
    pub async fn age_heartbeats(&self, seconds: u32) {
        let older = format!("last_heartbeat_at = last_heartbeat_at - interval '{seconds} s'");
        self.database.sql(&format!("update hosts set {older}")).await;
    }

    /// As [`Client::wait_status`], with what is put off due at once: for tests of what happens, and not of when.
    pub async fn hurry_to(&self, id: &str, wanted: &str, time_max: Duration) {
        wait(&format!("{id} to be {wanted}"), time_max, || async {
            self.database
                .sql("update operations set not_before = now() where phase = 'open' and not_before > now()")
                .await;
            self.team.status(id).await == wanted
        })
        .await;
    }

    /// What signs and checks the tokens of this platform.
    pub fn tokens(&self) -> Tokens {
        Tokens::new(&Secret::load(self.dir.path()).unwrap().unwrap())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (number, replica) in self.replicas.iter().enumerate() {
                show_log(&format!("replica-{number}"), &replica.log_path());
            }
        }
    }
}

impl Replica {
    /// It dies where it next passes this point, as by kill -9.
    pub fn arm(&self, point: &str) {
        arm(&self.dir, &[point]);
    }

    /// It dies where it next passes one of these.
    pub fn arm_any(&self, points: &[&str]) {
        arm(&self.dir, points);
    }

    pub fn disarm(&self) {
        let _ = std::fs::remove_file(self.dir.join(ARMED));
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The points that it passed since the last look, each once, in order.
    pub fn passed(&self) -> Vec<String> {
        let file = self.dir.join("passed");
        let mut points: Vec<String> = Vec::new();
        for point in std::fs::read_to_string(&file).unwrap_or_default().lines() {
            if !points.iter().any(|known| known == point) {
                points.push(point.to_owned());
            }
        }
        std::fs::write(&file, "").unwrap();
        points
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Most of its memory that it had in RAM at once.
    pub fn peak_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub fn log_path(&self) -> PathBuf {
        self.dir.join("log")
    }

    fn log(&self) -> String {
        tail(&self.log_path())
    }
}

/// `WRENN_CRASHPOINTS_FILE` of programs that lie in a directory. It is there as a whole or not at all.
pub const ARMED: &str = "armed";

pub fn arm(dir: &Path, points: &[&str]) {
    let plans: Vec<String> = points.iter().map(|point| format!("{point}=abort")).collect();
    std::fs::write(dir.join("arming"), plans.join(";")).unwrap();
    std::fs::rename(dir.join("arming"), dir.join(ARMED)).unwrap();
}

/// The end of what a program of a test that failed has said, and all of it in the directory `WRENN_TEST_LOGS`, when that is set.
pub fn show_log(name: &str, path: &Path) {
    eprintln!("--- the end of what {name} said\n{}", tail(path));
    if let Some(dir) = std::env::var_os("WRENN_TEST_LOGS") {
        let kept = std::fs::create_dir_all(&dir).and_then(|()| std::fs::copy(path, Path::new(&dir).join(name)));
        eprintln!("kept in {}: {kept:?}", dir.display());
    }
}

fn tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Until a condition holds; `what` is said when it does not come in time.
pub async fn wait<F: Future<Output = bool>>(
    what: &str,
    time_max: Duration,
    mut condition: impl FnMut() -> F,
) -> Duration {
    let began = Instant::now();
    while !condition().await {
        assert!(began.elapsed() < time_max, "{what} did not come within {time_max:?}");
        tokio::time::sleep(LOOK).await;
    }
    began.elapsed()
}
