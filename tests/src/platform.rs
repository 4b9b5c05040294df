//! One platform under test: `wrenn up` in a directory of its own, a client for its API, its CLI, and its end.
//!
//! Dropping a platform takes it down (`wrenn down --purge`), also when a test panicked.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::objects::{self, Objects};
use crate::{guest, wait};

/// Longest start of a platform: initdb, migrations, a pool and the probe of KVM, on a busy machine.
const UP_LIMIT: Duration = Duration::from_secs(90);
/// Longest create: a cold boot under emulation on a busy machine (15 s was measured).
pub const CREATE_LIMIT: Duration = Duration::from_secs(90);

pub struct Platform {
    pub dir: PathBuf,
    pub api: String,
    pub api_key: String,
    pub host_id: String,
    pub http: reqwest::Client,
    up: Option<Child>,
    _home: Option<TempDir>,
}

/// What to change about a start.
#[derive(Default, Clone)]
pub struct Options {
    pub env: BTreeMap<String, String>,
    pub args: Vec<String>,
    pub pool_mib: Option<u32>,
    /// `127.0.0.1:0` when absent.
    pub listen: Option<String>,
}

/// Where the programs under test are: beside this test's own `deps` directory.
pub fn program(name: &str) -> PathBuf {
    let me = std::env::current_exe().expect("a running program has a path");
    let folder = me.ancestors().find(|path| path.join("wrenn-agent").exists());
    let folder = folder.unwrap_or_else(|| panic!("{name} is not built: run `cargo build --workspace` first"));
    folder.join(name)
}

impl Platform {
    pub fn start() -> Self {
        Self::start_with(&Options::default())
    }

    pub fn start_with(options: &Options) -> Self {
        let home = tempfile::Builder::new().prefix("wrenn-test-").tempdir_in("/var/tmp").expect("a scratch directory");
        let mut platform = Self::at(home.path().join("wrenn"), options);
        platform._home = Some(home);
        platform
    }

    /// Starts in a directory that may hold a platform already.
    pub fn at(dir: PathBuf, options: &Options) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let (up, line) = Self::up(&dir, options);
        let text = |field: &str| line[field].as_str().unwrap_or_else(|| panic!("no {field} in {line}")).to_owned();
        Self {
            api: text("api"),
            api_key: text("api_key"),
            // None with `--no-agent`.
            host_id: line["host_id"].as_str().unwrap_or_default().to_owned(),
            http: reqwest::Client::builder().timeout(Duration::from_secs(180)).build().expect("a client"),
            dir,
            up: Some(up),
            _home: None,
        }
    }

    /// One that somebody else has started and ends. Its directory is for what this end keeps, which is nothing.
    pub fn elsewhere(api: String, api_key: String) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let http = reqwest::Client::builder().timeout(Duration::from_secs(180)).build().expect("a client");
        Self { dir: PathBuf::from("/nonexistent"), api, api_key, host_id: String::new(), http, up: None, _home: None }
    }

    fn up(dir: &Path, options: &Options) -> (Child, Value) {
        let mut child = Command::new(program("wrenn"))
            .args(["up", "--dir"])
            .arg(dir)
            .args(["--listen", options.listen.as_deref().unwrap_or("127.0.0.1:0"), "--json"])
            .args(&options.args)
            .env("WRENN_POOL_MIB", options.pool_mib.unwrap_or(3072).to_string())
            // They come and go by themselves, and most tests count what there is. Those that are about them ask for them.
            .env("WRENN_STANDBYS", "0")
            .envs(&options.env)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("wrenn can be started");
        let (lines, first) = mpsc::channel();
        let stdout = child.stdout.take().expect("stdout is a pipe");
        std::thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| lines.send(line))
        });
        match first.recv_timeout(UP_LIMIT) {
            Ok(line) => {
                (child, serde_json::from_str(&line).unwrap_or_else(|e| panic!("`wrenn up` printed {line:?}: {e}")))
            }
            Err(e) => {
                // SAFETY: the pid is that of our own child, which has not been waited for.
                unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
                panic!("`wrenn up` in {} was not ready after {UP_LIMIT:?}: {e}", dir.display())
            }
        }
    }

    /// SIGTERM to `wrenn up`: control plane and agent end, sandboxes go on.
    pub fn stop_programs(&mut self) {
        let Some(mut up) = self.up.take() else { return };
        // SAFETY: the pid is that of our own child, which has not been waited for.
        unsafe { libc::kill(up.id() as i32, libc::SIGTERM) };
        let began = Instant::now();
        while up.try_wait().expect("our own child").is_none() {
            assert!(began.elapsed() < Duration::from_secs(60), "`wrenn up` did not end within 60 s of SIGTERM");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// SIGKILL to `wrenn up`, as the kernel does it when memory is short.
    pub fn kill_up(&mut self) {
        let mut up = self.up.take().expect("the platform is up");
        up.kill().expect("our own child");
        up.wait().expect("our own child");
    }

    pub fn restart(&mut self, options: &Options) {
        self.stop_programs();
        let (up, line) = Self::up(&self.dir, options);
        self.up = Some(up);
        self.api = line["api"].as_str().expect("api").to_owned();
        self.api_key = line["api_key"].as_str().expect("api_key").to_owned();
    }

    pub fn up_pid(&self) -> i32 {
        self.up.as_ref().expect("the platform is up").id() as i32
    }

    /// The process of a program of this platform, found by its name and its parent or its environment's directory.
    pub fn pid_of(&self, name: &str) -> Option<i32> {
        let dir = format!("WRENN_DIR={}", self.dir.display());
        std::fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            let environ = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
            let alive = !std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?.contains(") Z ");
            let ours = environ.split(|b| *b == 0).any(|entry| entry == dir.as_bytes());
            (comm.trim() == name && ours && alive).then_some(pid)
        })
    }

    pub fn kill_9(&self, name: &str) -> i32 {
        let pid = self.pid_of(name).unwrap_or_else(|| panic!("{name} does not run"));
        // SAFETY: a plain system call; the pid was just found to be a program of this very platform.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
        pid
    }

    pub fn tag(&self) -> String {
        std::fs::read_to_string(self.dir.join("agent-id")).expect("agent-id").chars().take(8).collect()
    }

    /// How its host runs sandboxes, as the host itself says: `firecracker/kvm`, `qemu/kvm` or `qemu/emulated`.
    pub fn isolation(&self) -> String {
        let output = self.wrenn(&["host", "list", "--json"]);
        let hosts: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
        let mut hosts = hosts.as_array().into_iter().flatten();
        let host = hosts.find(|host| host["id"] == self.host_id.as_str());
        let isolation = host.and_then(|host| host["isolation"].as_str());
        isolation.unwrap_or_else(|| panic!("no isolation of the host {}: {output:?}", self.host_id)).to_owned()
    }

    pub fn objects(&self) -> Objects {
        objects::count(&self.dir, &self.tag())
    }

    /// Waits until the machine holds exactly what it held before: clean-up may lag behind an answer by a moment.
    pub async fn expect_objects(&self, before: &Objects) {
        let began = Instant::now();
        loop {
            let now = self.objects();
            // Pools of pre-made things refill in the background, so the count of slots may be lower for a moment but never higher.
            let grown: Objects =
                now.iter().filter(|(kind, n)| **n > *before.get(*kind).unwrap_or(&0)).map(|(k, n)| (*k, *n)).collect();
            if grown.is_empty() {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "more than before: {grown:?}, before: {before:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    pub async fn call(&self, method: Method, path: &str, body: Option<Value>) -> (StatusCode, Value) {
        let mut request = self.http.request(method, format!("{}{path}", self.api)).header("X-API-Key", &self.api_key);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await.unwrap_or_else(|e| panic!("{path}: {e}"));
        let status = answer.status();
        let text = answer.text().await.unwrap_or_default();
        let value =
            if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap_or(Value::String(text)) };
        (status, value)
    }

    /// The sandbox's id, once it runs.
    pub async fn create(&self) -> String {
        self.create_with(json!({"template": "minimal", "memory_mb": 256})).await
    }

    pub async fn create_with(&self, body: Value) -> String {
        let (status, sandbox) = self.call(Method::POST, "/v1/sandboxes?wait_sec=60", Some(body)).await;
        assert!(matches!(status.as_u16(), 201 | 202), "{status}: {sandbox}");
        let id = sandbox["id"].as_str().expect("an id").to_owned();
        self.wait_status(&id, "running", CREATE_LIMIT).await;
        id
    }

    pub async fn get(&self, id: &str) -> Value {
        let (status, sandbox) = self.call(Method::GET, &format!("/v1/sandboxes/{id}"), None).await;
        assert_eq!(status, 200, "{sandbox}");
        sandbox
    }

    pub async fn wait_status(&self, id: &str, wanted: &str, limit: Duration) -> Value {
        let mut last = Value::Null;
        let began = Instant::now();
        loop {
            // While a program of the platform restarts, its calls may fail: only the outcome counts.
            if let Ok(answer) =
                self.http.get(format!("{}/v1/sandboxes/{id}", self.api)).header("X-API-Key", &self.api_key).send().await
                && let Ok(sandbox) = answer.json::<Value>().await
            {
                if sandbox["status"] == wanted {
                    return sandbox;
                }
                last = sandbox;
            }
            assert!(began.elapsed() < limit, "sandbox {id} is not {wanted} after {limit:?}: {last}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub async fn kill(&self, id: &str) {
        let (status, answer) = self.call(Method::DELETE, &format!("/v1/sandboxes/{id}"), None).await;
        assert!(matches!(status.as_u16(), 204 | 202), "{status}: {answer}");
        self.wait_status(id, "stopped", Duration::from_secs(60)).await;
    }

    /// Runs a shell command in a sandbox and gives its exit code and output.
    pub async fn shell(&self, id: &str, script: &str) -> (i64, String) {
        let (status, outcome) = self.exec(id, script).await;
        assert_eq!(status, 200, "{outcome}");
        said(&outcome)
    }

    /// As `shell`, once the host is reached again: after its agent was killed. The command may run more than once.
    pub async fn shell_soon(&self, id: &str, script: &str) -> (i64, String) {
        wait::until("the host to be reached", Duration::from_secs(60), || async {
            let (status, outcome) = self.exec(id, script).await;
            (status == 200).then(|| said(&outcome))
        })
        .await
    }

    async fn exec(&self, id: &str, script: &str) -> (StatusCode, Value) {
        let body = json!({"cmd": "/bin/sh", "args": ["-c", script], "timeout_sec": 60});
        self.call(Method::POST, &format!("/v1/sandboxes/{id}/exec"), Some(body)).await
    }

    /// The sandbox's envd, to be asked directly.
    pub fn guest(&self, id: &str) -> guest::Guest {
        guest::of(&self.dir, &self.tag(), id).unwrap_or_else(|e| panic!("{id}: {e:#}"))
    }

    /// Waits until the API answers and the host is online: after a program was killed.
    pub async fn wait_ready(&self) {
        wait::until("the platform to be ready again", Duration::from_secs(60), || async {
            let url = format!("{}/v1/sandboxes", self.api);
            let answer = self.http.get(url).header("X-API-Key", &self.api_key).send().await.ok()?;
            (answer.status() == 200 && self.pid_of("wrenn-agent").is_some()).then_some(())
        })
        .await;
    }

    /// The CLI, with this platform's credentials.
    pub fn wrenn(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("wrenn can be started")
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program("wrenn"));
        command
            .args(args)
            .env("WRENN_DIR", &self.dir)
            .env("WRENN_API_URL", &self.api)
            .env("WRENN_API_KEY", &self.api_key)
            .stdin(Stdio::null());
        command
    }

    /// Takes everything down and says what is left.
    pub fn finish(mut self) -> Objects {
        let tag = self.tag();
        self.down();
        objects::count(&self.dir, &tag)
    }

    fn down(&mut self) {
        let down = Command::new(program("wrenn"))
            .args(["down", "--purge", "--dir"])
            .arg(&self.dir)
            .stdin(Stdio::null())
            .output();
        match down {
            Ok(output) if output.status.success() => {}
            Ok(output) => eprintln!("wrenn down: {} {}", output.status, String::from_utf8_lossy(&output.stderr)),
            Err(e) => eprintln!("wrenn down: {e}"),
        }
        if let Some(mut up) = self.up.take() {
            // `down` has ended it; this only collects it.
            let _ = up.kill();
            let _ = up.wait();
        }
    }
}

/// Of a command: its exit code, and what it wrote.
fn said(outcome: &Value) -> (i64, String) {
    let output = format!("{}{}", outcome["stdout"].as_str().unwrap_or(""), outcome["stderr"].as_str().unwrap_or(""));
    (outcome["exit_code"].as_i64().expect("an exit code"), output)
}

impl Drop for Platform {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in ["control-plane.log", "agent.log", "wrenn-cp.log", "wrenn-agent.log"] {
                if let Ok(text) = std::fs::read_to_string(self.dir.join("logs").join(name)) {
                    let tail: Vec<_> = text.lines().rev().take(30).collect();
                    eprintln!("--- the end of {name}");
                    tail.iter().rev().for_each(|line| eprintln!("{line}"));
                }
            }
        }
        if self.dir.exists() {
            self.down();
        }
    }
}
