//! A control plane, and two hosts in networks of their own: put into place by `wrenn control-plane install` and `wrenn host install` as an
//! operator does it, joined by tokens, and started by what was put into place. systemd is no part of it: what the units say is done by hand.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use testkit::postgres::Database;
use whole_machine::platform::{CREATE_LIMIT, Platform, program};
use whole_machine::wait;

const START_LIMIT: Duration = Duration::from_secs(60);
const JOIN_LIMIT: Duration = Duration::from_secs(120);

fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The cables between the control plane's machine and the hosts; all of it bears this process's number.
struct Cables {
    mark: u32,
    /// Namespaces.
    names: Vec<String>,
}

impl Cables {
    fn lay(hosts: usize) -> Self {
        let mut cables = Self { mark: std::process::id(), names: Vec::new() };
        let bridge = cables.bridge();
        sh(&format!(
            "ip link add {bridge} type bridge; ip addr add {}/24 dev {bridge}; ip link set {bridge} up",
            cables.address(1)
        ));
        for host in 0..hosts {
            let (name, link) = (format!("{bridge}-{host}"), format!("{bridge}v{host}"));
            sh(&format!("ip netns add {name}"));
            cables.names.push(name.clone());
            sh(&format!(
                "ip link add {link} type veth peer name eth0 netns {name}; ip link set {link} master {bridge} up
                 ip -n {name} link set lo up; ip -n {name} addr add {}/24 dev eth0; ip -n {name} link set eth0 up",
                cables.of_host(host)
            ));
        }
        cables
    }

    fn bridge(&self) -> String {
        format!("wf{}", self.mark)
    }

    /// Of the networks for benchmarks (RFC 2544), which are nobody's.
    fn address(&self, last: usize) -> String {
        format!("198.18.{}.{last}", self.mark % 256)
    }

    fn of_host(&self, host: usize) -> String {
        self.address(host + 10)
    }
}

impl Drop for Cables {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).stderr(Stdio::null()).status();
        }
        let _ = Command::new("ip").args(["link", "del", &self.bridge()]).stderr(Stdio::null()).status();
    }
}

/// The value of a setting of a unit.
fn of_unit(unit: &str, name: &str) -> String {
    let line = unit.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    line.unwrap_or_else(|| panic!("no {name} in {unit}")).to_owned()
}

/// The installed control plane.
struct ControlPlane {
    root: PathBuf,
    api: String,
    program: Option<Child>,
}

impl ControlPlane {
    fn install(database: &Database, cables: &Cables, scratch: &Path) -> Self {
        let root = scratch.join("control-plane");
        // A free port of an address that is nobody's but this test's.
        let free = std::net::TcpListener::bind((cables.address(1), 0)).unwrap();
        let listen = free.local_addr().unwrap().to_string();
        drop(free);
        let output = Command::new(program("wrenn"))
            .args(["control-plane", "install", "--json", "--root"])
            .arg(&root)
            .args(["--listen", &listen, "--host-networks", &format!("{}/24", cables.address(0))])
            .env("DATABASE_URL", &database.url)
            .env_remove("WRENN_DIR")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let installed: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(installed["url"], format!("http://{listen}/"), "{installed}");
        std::fs::create_dir_all(root.join("var/lib/wrenn-cp")).unwrap();
        Self { root, api: format!("http://{listen}"), program: None }
    }

    /// What the unit says, below the root.
    fn command(&self, more: &str) -> Command {
        let unit = std::fs::read_to_string(self.root.join("etc/systemd/system/wrenn-cp.service")).unwrap();
        let (environment, file) = (of_unit(&unit, "Environment"), of_unit(&unit, "EnvironmentFile"));
        let dir = environment.strip_prefix("WRENN_DIR=").unwrap();
        let script = format!(
            "set -a; WRENN_DIR={r}{dir}; . {r}{file}; set +a; exec {r}{} {more}",
            of_unit(&unit, "ExecStart"),
            r = self.root.display()
        );
        let mut command = Command::new("sh");
        command.args(["-ec", &script]).stdin(Stdio::null());
        command
    }

    /// Gives what an operator has then: the API, a key, and an administrator's token.
    async fn start(&mut self) -> (Platform, String) {
        let log = std::fs::File::create(self.root.join("log")).unwrap();
        self.program = Some(self.command("").stderr(log).spawn().unwrap());
        let token = wait::until("a token of an administrator", START_LIMIT, || async {
            let output = self.command("admin-token").output().unwrap();
            output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().to_owned())
        });
        let token = token.await;
        let key = wait::until("the first API key", START_LIMIT, || async {
            let output = self.administrator(&token, &["key", "create", "--json"]);
            serde_json::from_slice::<Value>(&output).ok()?["key"].as_str().map(str::to_owned)
        });
        (Platform::elsewhere(self.api.clone(), key.await), token)
    }

    fn administrator(&self, token: &str, arguments: &[&str]) -> Vec<u8> {
        let mut wrenn = Command::new(program("wrenn"));
        wrenn.args(arguments).env("WRENN_API_URL", &self.api).env("WRENN_ADMIN_TOKEN", token).stdin(Stdio::null());
        wrenn.output().unwrap().stdout
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(self.root.join("log")).unwrap_or_default());
        }
        if let Some(program) = &mut self.program {
            let _ = program.kill();
            let _ = program.wait();
        }
    }
}

/// One installed host.
struct Host {
    network: String,
    root: PathBuf,
    data: PathBuf,
    agent: Option<Child>,
}

impl Host {
    /// As the operator's hands do it on a new machine.
    fn install(api: &str, token: &str, cables: &Cables, scratch: &Path, number: usize) -> Self {
        let (root, data) = (scratch.join(format!("root{number}")), scratch.join(format!("data{number}")));
        // What `make images` leaves, without taking its room again.
        let artifacts = std::env::var("WRENN_TEST_ARTIFACTS").unwrap();
        sh(&format!(
            "mkdir -m 711 {d}; cp -al {artifacts}/kernels {artifacts}/images {d}/ || cp -a --sparse=always {artifacts}/kernels {artifacts}/images {d}/",
            d = data.display()
        ));
        let listen = format!("WRENN_HOST_LISTEN_ADDR={}:50051", cables.of_host(number));
        let output = Command::new(program("wrenn"))
            .args(["host", "install", "--json", "--root"])
            .arg(&root)
            .args(["--cp-url", api, "--address", &format!("{}:50051", cables.of_host(number))])
            .args(["--set", &listen, "--set", "WRENN_POOL_MIB=2048", "--set", "WRENN_STANDBYS=0"])
            .env("WRENN_REGISTRATION_TOKEN", token)
            .env("WRENN_DIR", &data)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let installed: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(installed["running"], false, "{installed}");
        Self { network: cables.names[number].clone(), root, data, agent: None }
    }

    /// What the unit says, in the host's network.
    fn command(&self, more: &str) -> Command {
        let unit = std::fs::read_to_string(self.root.join("etc/systemd/system/wrenn-agent.service")).unwrap();
        let line = of_unit(&unit, "ExecStart");
        let script = format!(
            "set -a; . {r}/etc/wrenn/agent.env; [ ! -f {r}/etc/wrenn/registration.env ] || . {r}/etc/wrenn/registration.env
             set +a; exec {r}{line} {more}",
            r = self.root.display()
        );
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.network)).args(["sh", "-ec", &script]);
        command.env_remove("WRENN_DIR").env_remove("WRENN_REGISTRATION_TOKEN").stdin(Stdio::null());
        command
    }

    fn start(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.data.join("agent.log")).unwrap();
        self.agent = Some(self.command("").stderr(log).spawn().unwrap());
    }

    fn kill_9(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.data.join("agent.log")).unwrap_or_default()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}:\n{}", self.network, self.log());
        }
        if let Some(agent) = &mut self.agent {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        let ended = self.command("--stop-all").output();
        if !ended.as_ref().is_ok_and(|output| output.status.success()) {
            eprintln!("stop {}: {ended:?}", self.network);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_installed_hosts_join_and_an_upgrade_of_an_agent_disturbs_nobody() {
    let scratch = tempfile::Builder::new().prefix("wrenn-test-fleet-").tempdir_in("/var/tmp").unwrap();
    let cables = Cables::lay(2);
    let database = Database::new().await;
    let mut control_plane = ControlPlane::install(&database, &cables, scratch.path());
    let (platform, administrator) = control_plane.start().await;
    let ask = |arguments: &[&str]| -> Option<Value> {
        serde_json::from_slice(&control_plane.administrator(&administrator, arguments)).ok()
    };
    let install = |number| {
        let added = ask(&["host", "add", "--json"]).unwrap();
        let token = added["registration_token"].as_str().unwrap_or_else(|| panic!("{added}"));
        Host::install(&control_plane.api, token, &cables, scratch.path(), number)
    };
    let mut hosts: Vec<Host> = (0..2).map(install).collect();
    for host in &mut hosts {
        host.start();
    }
    let online = async || {
        wait::until("both hosts to be online", JOIN_LIMIT, || async {
            let listed = ask(&["host", "list", "--json"])?;
            let online: Vec<String> = listed
                .as_array()?
                .iter()
                .filter(|host| host["status"] == "online")
                .filter_map(|host| Some(host["id"].as_str()?.to_owned()))
                .collect();
            (online.len() == 2).then_some(online)
        })
        .await
    };
    let ids = online().await;
    // The token is spent; whoever installs takes it away when the host has joined.
    for host in &hosts {
        assert!(host.data.join("host-token").exists());
        std::fs::remove_file(host.root.join("etc/wrenn/registration.env")).unwrap();
    }
    // A sandbox on each.
    let mut placed: Vec<(String, String)> = Vec::new();
    while !ids.iter().all(|id| placed.iter().any(|(_, host)| host == id)) {
        assert!(placed.len() < 8, "all on one host: {placed:?}");
        let id = platform.create_with(json!({"template": "minimal", "memory_mb": 256})).await;
        let sandbox = platform.wait_status(&id, "running", CREATE_LIMIT).await;
        placed.push((id, sandbox["host_id"].as_str().unwrap().to_owned()));
    }
    for (id, host) in &placed {
        assert_eq!(
            platform.shell(id, &format!("echo {host} >/dev/shm/host; cat /dev/shm/host")).await,
            (0, format!("{host}\n"))
        );
    }
    // Another program takes over what the one before has started, of the settings that lie there.
    for host in &mut hosts {
        host.kill_9();
        host.start();
    }
    for (id, host) in &placed {
        assert_eq!(platform.shell_soon(id, "cat /dev/shm/host").await, (0, format!("{host}\n")));
    }
    assert_eq!(online().await.len(), 2);
    for (id, _) in &placed {
        platform.kill(id).await;
    }
}
