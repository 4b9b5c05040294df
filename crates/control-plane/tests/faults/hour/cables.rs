//! Network namespaces, joined to the test by a bridge. All of it bears the number of the process that made it.

use std::net::IpAddr;
use std::process::{Command, Stdio};

const MARK: &str = "wh";

/// Runs a script of shell, which must succeed.
pub fn sh(script: &str) {
    let output = Command::new("sh").args(["-ec", script]).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

fn lines(program: &str, arguments: &[&str]) -> Vec<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap();
    String::from_utf8_lossy(&output.stdout).lines().map(ToOwned::to_owned).collect()
}

/// The bridge, and so many namespaces, each with an `eth0` of its own on it.
pub struct Cables {
    mark: u32,
    hosts: usize,
}

/// What becomes of what a host sends or gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// Nothing arrives at the host.
    Sent,
    /// Nothing of the host arrives.
    Answered,
    /// The cable is pulled.
    Both,
}

impl Cables {
    pub fn lay(hosts: usize) -> Self {
        sweep();
        let cables = Self { mark: std::process::id(), hosts };
        let bridge = cables.bridge();
        sh(&format!(
            "ip link add {bridge} type bridge; ip addr add {}/24 dev {bridge}; ip link set {bridge} up",
            cables.own()
        ));
        for host in 0..hosts {
            let (name, link) = (cables.namespace(host), cables.link(host));
            sh(&format!(
                "ip netns add {name}; ip link add {link} type veth peer name eth0 netns {name}
                 ip link set {link} master {bridge} up; ip -n {name} link set lo up
                 ip -n {name} addr add {}/24 dev eth0; ip -n {name} link set eth0 up",
                cables.of_host(host)
            ));
        }
        cables
    }

    fn bridge(&self) -> String {
        format!("{MARK}{}", self.mark)
    }

    fn link(&self, host: usize) -> String {
        format!("{}v{host}", self.bridge())
    }

    pub fn namespace(&self, host: usize) -> String {
        format!("{}-{host}", self.bridge())
    }

    /// Of the networks for benchmarks (RFC 2544), which are nobody's.
    fn address(&self, last: u8) -> IpAddr {
        IpAddr::from([198, 19, u8::try_from(self.mark % 256).expect("below 256"), last])
    }

    /// The test's own address, which the hosts reach.
    pub fn own(&self) -> IpAddr {
        self.address(1)
    }

    pub fn of_host(&self, host: usize) -> IpAddr {
        self.address(10 + u8::try_from(host).expect("few hosts"))
    }

    pub fn lose(&self, host: usize, lost: Lost) {
        let (name, link) = (self.namespace(host), self.link(host));
        let hook = match lost {
            Lost::Both => return sh(&format!("ip link set {link} down")),
            Lost::Sent => "input",
            Lost::Answered => "output",
        };
        let device = if hook == "input" { "iifname" } else { "oifname" };
        sh(&format!(
            "nsenter --net=/run/netns/{name} nft 'add table inet lost
             add chain inet lost {hook} {{ type filter hook {hook} priority 0; policy accept; }}
             add rule inet lost {hook} {device} \"eth0\" drop'"
        ));
    }

    /// Nothing is lost any more.
    pub fn mend(&self, host: usize) {
        let (name, link) = (self.namespace(host), self.link(host));
        sh(&format!(
            "ip link set {link} up; nsenter --net=/run/netns/{name} nft 'add table inet lost; delete table inet lost'"
        ));
    }

    /// False: this kernel cannot.
    pub fn delay(&self, host: usize, ms: u64) -> bool {
        let arguments = format!("qdisc replace dev {} root netem delay {ms}ms", self.link(host));
        let mut command = Command::new("tc");
        command.args(arguments.split(' ')).stdin(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    }

    pub fn hurry(&self, host: usize) {
        sh(&format!("tc qdisc del dev {} root", self.link(host)));
    }
}

impl Drop for Cables {
    fn drop(&mut self) {
        for host in 0..self.hosts {
            remove_link(&self.link(host));
            remove_namespace(&self.namespace(host));
        }
        remove_link(&self.bridge());
    }
}

/// With the processes that are left in it.
fn remove_namespace(name: &str) {
    for pid in lines("ip", &["netns", "pids", name]) {
        if let Ok(pid) = pid.trim().parse() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
    let _ = Command::new("ip").args(["netns", "del", name]).stderr(Stdio::null()).status();
}

fn remove_link(name: &str) {
    let _ = Command::new("ip").args(["link", "del", name]).stderr(Stdio::null()).status();
}

/// Removes what runs left whose process is gone.
fn sweep() {
    let is_abandoned = |name: &str| {
        let number = name.strip_prefix(MARK).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        number.is_some_and(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists())
    };
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        if let Some(name) = entry.file_name().to_str().filter(|name| is_abandoned(name)) {
            remove_namespace(name);
        }
    }
    for line in lines("ip", &["-o", "link", "show", "type", "bridge"]) {
        if let Some(name) = line.split(": ").nth(1).filter(|name| is_abandoned(name)) {
            remove_link(name);
        }
    }
}
