//! Replicas as programs: `wrenn-cp` with its own settings and signals, on the database of a test.

#![allow(dead_code)] // Each test program uses its part.

use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

/// A start on a machine that does much else.
const START_TIME_MAX: Duration = Duration::from_secs(60);

pub struct Process {
    child: Child,
    pub url: String,
    pub address: SocketAddr,
    pub metrics: Option<SocketAddr>,
}

/// The program with what every test wants of it. Replicas of one platform have the same directory, for their secret lies there.
pub fn command(database: &str, dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn-cp"));
    command
        .current_dir(dir)
        .env("DATABASE_URL", database)
        .env("WRENN_DIR", dir)
        .env("WRENN_CP_LISTEN_ADDR", "127.0.0.1:0")
        .env("WRENN_METRICS_LISTEN_ADDR", "127.0.0.1:0")
        .env("WRENN_HOST_NETWORKS", "127.0.0.0/8")
        .env_remove("WRENN_CRASHPOINTS")
        .stdin(Stdio::null());
    command
}

impl Process {
    /// Resolves when it serves.
    pub async fn start(database: &str, dir: &Path, envs: &[(&str, &str)]) -> Self {
        let name = format!("ready-{:08x}", rand::random::<u32>());
        let ready_file = dir.join(name);
        let mut command = command(database, dir);
        command.envs(envs.iter().copied()).arg("--ready-file").arg(&ready_file);
        let mut child = command.spawn().unwrap();
        let end = Instant::now() + START_TIME_MAX;
        let ready: Value = loop {
            let text = std::fs::read_to_string(&ready_file).unwrap_or_default();
            if let Ok(ready) = serde_json::from_str(&text) {
                break ready;
            }
            if let Some(status) = child.try_wait().unwrap() {
                panic!("it ended with {status} while it started");
            }
            assert!(Instant::now() < end, "it does not serve in time");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let address: SocketAddr = ready["addr"].as_str().unwrap().parse().unwrap();
        let metrics = ready["metrics"].as_str().map(|address| address.parse().unwrap());
        Self { child, url: format!("http://{address}"), address, metrics }
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// Resolves when it has ended.
    pub async fn ended(&mut self, time_max: Duration) -> ExitStatus {
        ended(&mut self.child, time_max).await
    }

    pub async fn kill(&mut self) {
        self.signal("KILL");
        let status = self.ended(Duration::from_secs(10)).await;
        assert_eq!(status.signal(), Some(9));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn signal(pid: i32, name: &str) {
    let status = Command::new("kill").args([format!("-{name}"), pid.to_string()]).status().unwrap();
    assert!(status.success(), "signal {name} to {pid}");
}

pub async fn ended(child: &mut Child, time_max: Duration) -> ExitStatus {
    let end = Instant::now() + time_max;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < end, "it does not end within {time_max:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Who may do everything, and what is asked in that name.
pub struct Administrator {
    pub token: String,
    pub http: reqwest::Client,
}

impl Administrator {
    /// Of a platform that was started once.
    pub async fn of(database: &str, dir: &Path) -> Self {
        let output = command(database, dir).arg("admin-token").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let token = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        Self { token, http: reqwest::Client::builder().timeout(Duration::from_secs(60)).build().unwrap() }
    }

    pub async fn call(&self, url: &str, method: Method, path: &str, body: Option<Value>) -> (StatusCode, Value) {
        let mut request = self.http.request(method, format!("{url}{path}")).bearer_auth(&self.token);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await.unwrap();
        let status = answer.status();
        let text = answer.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// A registered host at this address, with room for much; its id.
    pub async fn host(&self, url: &str, database: &testkit::postgres::Database, address: &str) -> String {
        let (status, made) = self.call(url, Method::POST, "/v1/hosts", Some(json!({"type": "regular"}))).await;
        assert_eq!(status, 201, "{made}");
        let id = made["host"]["id"].as_str().unwrap().to_owned();
        let uuid: model::ids::HostId = id.parse().unwrap();
        database
            .sql(&format!(
                "update hosts set state = 'active', address = '{address}', arch = 'x86_64', cpu_cores = 64, memory_mb = 1048576,
                 disk_gb = 1000, isolation = 'fake', agent_version = '0', templates = '{{minimal}}', disk_free_mb = 1000000,
                 last_heartbeat_at = now() where id = '{}'",
                uuid.0
            ))
            .await;
        id
    }
}
