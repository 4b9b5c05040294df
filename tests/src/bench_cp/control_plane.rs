//! The control plane that is measured, on a PostgreSQL of its own, and what all measurements need of it.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use reqwest::{Client, RequestBuilder};
use serde_json::{Value, json};
use testkit::postgres::Server;
use whole_machine::wait;

const DATABASE: &str = "bench";
const READY_MAX: Duration = Duration::from_secs(30);

pub struct ControlPlane {
    pub base: String,
    pub admin: String,
    pub key: String,
    pub http: Client,
    server: Server,
    child: Child,
    _dir: tempfile::TempDir,
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl ControlPlane {
    /// `quota`: how many sandboxes a team may have; empty: no limit.
    pub async fn start(quota: &str) -> Result<Self> {
        let server = Server::start().context("start PostgreSQL")?;
        let database = server.create_database(DATABASE)?;
        let dir = tempfile::tempdir().context("make a directory")?;
        let (child, base, admin) = start(&database, dir.path(), quota).await?;
        let http = Client::builder().timeout(Duration::from_secs(30)).build().context("make a client")?;
        let mut control_plane = Self { base, admin, key: String::new(), http, server, child, _dir: dir };
        let made = control_plane.as_admin("/v1/api-keys", &json!({})).await?;
        control_plane.key = made["key"].as_str().context("the answer has a key")?.to_owned();
        Ok(control_plane)
    }

    pub async fn as_admin(&self, path: &str, body: &Value) -> Result<Value> {
        let request = self.http.post(format!("{}{path}", self.base)).bearer_auth(&self.admin).json(body);
        let answer = request.send().await?;
        let status = answer.status();
        let body: Value = answer.json().await.context("read the answer")?;
        ensure!(status.is_success(), "{path}: {status}: {body}");
        Ok(body)
    }

    pub fn sql(&self, statements: &str) -> Result<String> {
        self.server.query(DATABASE, statements)
    }

    /// Rows of hosts at this address, with room for as much as is asked for.
    pub fn hosts(&self, count: usize, address: &str) -> Result<()> {
        self.sql(&format!(
            "insert into hosts (id, kind, state, address, arch, cpu_cores, memory_mb, disk_gb, disk_free_mb, isolation, agent_version,
                 templates, created_by, last_heartbeat_at)
             select gen_random_uuid(), 'regular', 'active', '{address}', 'x86_64', 64, 262144, 4000, 4000000, 'none', '0',
                 '{{minimal}}', 'bench', now() + interval '1 hour'
             from generate_series(1, {count})"
        ))
        .map(drop)
    }

    pub fn create_request(&self) -> RequestBuilder {
        let request = self.http.post(format!("{}/v1/sandboxes?wait_sec=0", self.base)).header("X-API-Key", &self.key);
        request.json(&json!({"memory_mb": 128, "disk_size_mb": 1024}))
    }

    pub async fn create(&self) -> Result<()> {
        let answer = self.create_request().send().await?;
        ensure!(answer.status() == 202, "a create was answered with {}", answer.status());
        Ok(())
    }

    /// Seconds of processor time that it has taken.
    pub fn processor_sec(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).context("read its times")?;
        // After the name, which may have spaces: user and system time are the 12th and 13th.
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
        let ticks: u64 = [11, 12].iter().filter_map(|field| fields.get(*field)?.parse::<u64>().ok()).sum();
        // SAFETY: a plain question.
        let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
        Ok(ticks as f64 / per_second as f64)
    }

    pub fn resident_mib(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).context("read its size")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("its size is told")?;
        let kib: f64 = line.trim().trim_end_matches("kB").trim().parse().context("its size is a number")?;
        Ok(kib / 1024.0)
    }
}

/// An address that takes connections and says nothing, for as long as the task is there.
pub async fn silent() -> Result<(String, tokio::task::JoinHandle<()>)> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.context("listen")?;
    let address = listener.local_addr().context("ask for the port")?.to_string();
    let held = tokio::spawn(async move {
        let mut connections = Vec::new();
        while let Ok((connection, _)) = listener.accept().await {
            connections.push(connection);
        }
    });
    Ok((address, held))
}

/// The program, where it serves, and an administrator's token.
async fn start(database: &str, dir: &Path, quota: &str) -> Result<(Child, String, String)> {
    let me = std::env::current_exe().context("find this program")?;
    let program = me.with_file_name("wrenn-cp");
    let ready = dir.join("ready.json");
    let command = || {
        let mut command = Command::new(&program);
        command.env("DATABASE_URL", database).env("WRENN_DIR", dir).env("WRENN_CP_LISTEN_ADDR", "127.0.0.1:0");
        if !quota.is_empty() {
            command.env("WRENN_QUOTA_SANDBOXES", quota);
        }
        // Several of these run on one machine, beside the services of it.
        command.env("WRENN_METRICS_LISTEN_ADDR", "off");
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
    let told: Value = wait::until("the control plane serves", READY_MAX, || async {
        std::fs::read(&ready).ok().and_then(|text| serde_json::from_slice(&text).ok())
    })
    .await;
    let address = told["addr"].as_str().context("the ready file has an address")?;
    let token = command().arg("admin-token").output().context("ask for a token")?;
    ensure!(token.status.success(), "wrenn-cp admin-token: {}", String::from_utf8_lossy(&token.stderr));
    let token = String::from_utf8(token.stdout).context("read the token")?.trim().to_owned();
    Ok((child, format!("http://{address}"), token))
}
