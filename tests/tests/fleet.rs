//! Two hosts in networks of their own, put into place by `wrenn host install` as an operator does it, joined to one control plane by tokens,
//! and started by what was put into place. systemd is no part of it: what the unit says is done by hand.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use whole_machine::platform::{CREATE_LIMIT, Options, Platform, program};
use whole_machine::wait;

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

/// One installed host.
struct Host {
    network: String,
    root: PathBuf,
    data: PathBuf,
    agent: Option<Child>,
}

impl Host {
    /// As the operator's hands do it on a new machine.
    fn install(platform: &Platform, cables: &Cables, scratch: &Path, number: usize) -> Self {
        let (root, data) = (scratch.join(format!("root{number}")), scratch.join(format!("data{number}")));
        let added = platform.wrenn(&["host", "add", "--json"]);
        let added: Value = serde_json::from_slice(&added.stdout).unwrap();
        let token = added["registration_token"].as_str().unwrap_or_else(|| panic!("{added}"));
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
            .args(["--cp-url", &platform.api, "--address", &format!("{}:50051", cables.of_host(number))])
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
        let line = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
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
    let platform = Platform::start_with(&Options {
        listen: Some(format!("{}:0", cables.address(1))),
        args: vec!["--no-agent".to_owned()],
        env: [("WRENN_HOST_NETWORKS".to_owned(), format!("{}/24", cables.address(0)))].into(),
        ..Options::default()
    });
    let mut hosts: Vec<Host> = (0..2).map(|number| Host::install(&platform, &cables, scratch.path(), number)).collect();
    for host in &mut hosts {
        host.start();
    }
    let online = async || {
        wait::until("both hosts to be online", JOIN_LIMIT, || async {
            let listed = platform.wrenn(&["host", "list", "--json"]);
            let listed: Vec<Value> = serde_json::from_slice(&listed.stdout).ok()?;
            let online: Vec<String> = listed
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
