//! What must be there before `wrenn up` begins, each with its cure. `doctor` shows all of it; `up` stops at the first that fails.

use std::path::Path;

use serde::Serialize;

use super::{layout, postgres};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Grade {
    Ok,
    Warn,
    Fail,
}

#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    pub what: String,
    pub grade: Grade,
    /// What was found.
    pub found: String,
    /// What to do about it; empty when it is fine.
    pub cure: String,
}

impl Finding {
    pub fn ok(what: &str, found: impl Into<String>) -> Self {
        Self { what: what.to_owned(), grade: Grade::Ok, found: found.into(), cure: String::new() }
    }

    pub fn warn(what: &str, found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { what: what.to_owned(), grade: Grade::Warn, found: found.into(), cure: cure.into() }
    }

    pub fn fail(what: &str, found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { what: what.to_owned(), grade: Grade::Fail, found: found.into(), cure: cure.into() }
    }
}

/// What a host needs from the system, and in which Debian package it is.
const TOOLS: [(&str, &str); 7] = [
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("losetup", "mount"),
    ("mkfs.xfs", "xfsprogs"),
    ("mount", "mount"),
    ("resize2fs", "e2fsprogs"),
    ("cp", "coreutils"),
];

/// Everything that a host needs of this machine.
pub fn host() -> Vec<Finding> {
    let mut findings = vec![architecture(), root()];
    let missing: Vec<&(&str, &str)> = TOOLS.iter().filter(|(tool, _)| layout::system_program(tool).is_none()).collect();
    findings.push(if missing.is_empty() {
        Finding::ok("tools", "all there")
    } else {
        let (tools, packages): (Vec<_>, Vec<_>) = missing.iter().map(|(tool, package)| (*tool, *package)).unzip();
        Finding::fail(
            "tools",
            format!("missing: {}", tools.join(", ")),
            format!("run scripts/setup, or apt-get install {}", packages.join(" ")),
        )
    });
    findings.push(vmm());
    findings.push(device(
        "/dev/net/tun",
        "tap devices",
        "load the module tun (modprobe tun), or give the container /dev/net/tun",
    ));
    findings.push(device("/dev/loop-control", "loop devices", "load the module loop (modprobe loop)"));
    findings.push(kernel_feature("network namespaces", "/proc/self/ns/net", "use a kernel with CONFIG_NET_NS"));
    findings.push(kernel_feature("forwarding", "/proc/sys/net/ipv4/ip_forward", "use a kernel with IPv4"));
    findings.push(filesystem("xfs"));
    findings
}

/// What the control plane's side of `up` needs.
pub fn platform(dir: &Path, agent: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    for name in ["wrenn-cp", "wrenn-agent"].iter().filter(|name| agent || **name != "wrenn-agent") {
        findings.push(match layout::program(name) {
            Ok(place) => Finding::ok(name, place.display().to_string()),
            Err(failure) => Finding::fail(name, failure.message(), "run `make build`"),
        });
    }
    let external = std::env::var_os("DATABASE_URL").is_some_and(|url| !url.is_empty());
    findings.push(match (external, postgres::binaries(dir)) {
        (true, _) => Finding::ok("PostgreSQL", "by DATABASE_URL"),
        (false, Ok(bin)) => Finding::ok("PostgreSQL", bin.display().to_string()),
        (false, Err(failure)) => Finding::fail("PostgreSQL", failure.message(), "run scripts/setup"),
    });
    findings
}

/// Either will do; the agent finds out which works.
fn vmm() -> Finding {
    let named = std::env::var_os("WRENN_FIRECRACKER_BIN").filter(|path| !path.is_empty());
    let firecracker = std::path::PathBuf::from(named.unwrap_or_else(|| "/usr/local/bin/firecracker".into()));
    let found = [Some(firecracker).filter(|path| path.exists()), layout::system_program("qemu-system-x86_64")];
    let found: Vec<String> = found.into_iter().flatten().map(|path| path.display().to_string()).collect();
    if found.is_empty() {
        return Finding::fail(
            "VMM",
            "neither Firecracker nor QEMU",
            "apt-get install qemu-system-x86, or install Firecracker (docs/how-to/firecracker.md)",
        );
    }
    Finding::ok("VMM", found.join(", "))
}

fn architecture() -> Finding {
    match std::env::consts::ARCH {
        "x86_64" => Finding::ok("architecture", "x86_64"),
        other => Finding::fail("architecture", other, "guest kernels and images are made for x86_64 only"),
    }
}

/// Root by number is not enough in a container that took capabilities away.
fn root() -> Finding {
    const NEEDED: [(u32, &str); 7] = [
        (1, "DAC_OVERRIDE"),
        (5, "KILL"),
        (7, "SETUID"),
        (12, "NET_ADMIN"),
        (13, "NET_RAW"),
        (19, "SYS_PTRACE"),
        (21, "SYS_ADMIN"),
    ];
    if !nix::unistd::geteuid().is_root() {
        return Finding::fail(
            "root",
            "this is not root",
            "run it as root (sudo): it makes namespaces, taps and mounts",
        );
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).map(str::trim);
    let effective = effective.and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or(u64::MAX);
    let missing: Vec<&str> =
        NEEDED.iter().filter(|(bit, _)| effective & (1 << bit) == 0).map(|(_, name)| *name).collect();
    if missing.is_empty() {
        Finding::ok("root", "with the capabilities that are needed")
    } else {
        Finding::fail(
            "root",
            format!("without {}", missing.join(", ")),
            "start the container with these capabilities (--privileged)",
        )
    }
}

fn device(path: &str, what: &str, cure: &str) -> Finding {
    match std::fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Finding::ok(what, path),
        Err(error) => Finding::fail(what, format!("{path}: {error}"), cure),
    }
}

fn kernel_feature(what: &str, path: &str, cure: &str) -> Finding {
    if Path::new(path).exists() { Finding::ok(what, "there") } else { Finding::fail(what, format!("no {path}"), cure) }
}

fn filesystem(name: &str) -> Finding {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let loaded = known.lines().any(|line| line.split_whitespace().last() == Some(name));
    let release =
        nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    let module = Path::new("/lib/modules").join(release).join("kernel/fs").join(name);
    if loaded || module.exists() {
        Finding::ok("reflinks", format!("{name} is there"))
    } else {
        Finding::warn(
            "reflinks",
            format!("this kernel has no {name}"),
            "disks are copied sparsely instead of shared: slower, larger",
        )
    }
}
