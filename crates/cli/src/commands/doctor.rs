//! `wrenn doctor`: what this machine can do as a host, said plainly: each finding with its cure. Where a platform runs, the host agent
//! is asked what it really found, because only a boot proves that KVM works.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::{fleet, host};
use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show};
use crate::platform::preflight::{self, Finding, Grade};
use crate::platform::state::UpState;
use crate::platform::{advice, artifacts, objects};

const ASK_MAX: Duration = Duration::from_secs(10);
/// Below this a platform does not get its smallest pool and a database.
const DISK_FAIL_MIB: u64 = 6 << 10;
const DISK_WARN_MIB: u64 = 20 << 10;
const MEMORY_WARN_MIB: u64 = 2 << 10;

const UNDER_EMULATION: &str = "software emulation: for development, tests and trusted tenants. QEMU's project promises no isolation for it; \
                               the jail around the VMM is the boundary";
const UNDER_KVM: &str = "hardware virtualisation: each sandbox is a virtual machine of its own";

#[derive(clap::Args)]
pub struct Arguments {
    /// Of the platform as a whole instead, by its control plane: replicas, clocks, hosts, what waits. For administrators.
    #[arg(long)]
    fleet: bool,
}

#[derive(Serialize)]
struct Report {
    ok: bool,
    isolation: String,
    findings: Vec<Finding>,
    /// What the host agent says of itself; absent when none could be asked.
    host: Option<Value>,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    if arguments.fleet {
        return fleet::run(options, format).await;
    }
    // A host that was installed says itself where it lies.
    let installed = host::install::installed_dir().filter(|_| options.dir.is_none());
    let dir = installed.map_or_else(|| options.dir(), Ok)?;
    let mut findings = preflight::host();
    // One that has joined a control plane elsewhere needs none here.
    if !dir.join("host-token").exists() || UpState::read(&dir).running().is_some() {
        findings.extend(preflight::platform(&dir, true));
    }
    findings.extend(of_machine(&dir));
    findings.push(images(&dir));
    let driver = std::env::var("WRENN_DISK").ok().or_else(host::install::installed_disk);
    findings.extend(driver.as_deref().and_then(disk_driver));
    findings.extend(advice::all());
    let host = match asked(&dir, options).await {
        Ok(host) => host,
        Err(failure) => {
            findings.push(Finding::warn(
                "platform",
                failure.message(),
                "the findings above are about the machine alone",
            ));
            None
        }
    };
    let isolation = match host.as_ref().and_then(|host| host["isolation"].as_str()) {
        Some(level) if level.ends_with("/kvm") => format!("{level}: {UNDER_KVM}"),
        Some(level) if level.ends_with("/emulated") => format!("{level}: {UNDER_EMULATION}"),
        Some(other) => other.to_owned(),
        None if Path::new("/dev/kvm").exists() => {
            format!(
                "not known yet: /dev/kvm is there, and only a boot proves it; run `wrenn up`. Without it, {UNDER_EMULATION}"
            )
        }
        None => UNDER_EMULATION.to_owned(),
    };
    if let Some(host) = &host {
        findings.extend(agent_findings(host, &dir));
    }
    let report = Report { ok: findings.iter().all(|finding| finding.grade != Grade::Fail), isolation, findings, host };
    let ok = report.ok;
    show(format, &report, in_words)?;
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What this machine is, as a host with that directory.
pub fn of_machine(dir: &Path) -> Vec<Finding> {
    vec![kvm_node(), cgroups(), reflink(dir), disk(dir), memory()]
}

pub fn lines(findings: &[Finding]) -> Vec<String> {
    let mut lines = Vec::new();
    for finding in findings {
        let grade = match finding.grade {
            Grade::Ok => "ok  ",
            Grade::Warn => "warn",
            Grade::Fail => "FAIL",
        };
        lines.push(format!("{grade}  {}: {}", finding.what, finding.found));
        if !finding.cure.is_empty() {
            lines.push(format!("      -> {}", finding.cure));
        }
    }
    lines
}

fn in_words(report: &Report) -> String {
    let mut lines = lines(&report.findings);
    let notes = report.host.as_ref().and_then(|host| host["notes"].as_array());
    lines.extend(notes.into_iter().flatten().filter_map(Value::as_str).map(|note| format!("note  {note}")));
    lines.push(String::new());
    lines.push(format!("Isolation of sandboxes here: {}.", report.isolation));
    lines.push(if report.ok {
        "This machine can run Wrenn.".to_owned()
    } else {
        "This machine cannot run Wrenn yet: see the lines with FAIL.".to_owned()
    });
    lines.join("\n")
}

/// The host agent of the platform in `dir`, through the control plane; none when no platform runs there.
async fn asked(dir: &Path, options: &Options) -> Result<Option<Value>, Failure> {
    let state = UpState::read(dir);
    let (Some(_), Some(host_id)) = (state.running(), state.host_id.clone()) else { return Ok(None) };
    // The platform of this directory, whatever API the environment names.
    let options = Options { api_url: None, api_key: None, ..options.clone() };
    let asking = async {
        let client = Client::of_administrator(&options).await?;
        client.get::<Value>(client.url(&["v1", "hosts", &host_id, "inspect"])).await
    };
    tokio::time::timeout(ASK_MAX, asking)
        .await
        .map_err(|_| Failure::new(format!("the platform in {} runs and does not answer", dir.display())))?
        .map(Some)
}

fn agent_findings(host: &Value, dir: &Path) -> Vec<Finding> {
    let text = |field: &str| host[field].as_str().unwrap_or("?").to_owned();
    let mut findings = vec![
        Finding::ok("host agent", format!("{} with {} {}", text("agentVersion"), text("vmm"), text("vmmVersion"))),
        Finding::ok("guest kernel", text("kernelVersion")),
    ];
    findings.push(match text("cgroupDriver").as_str() {
        "none" | "" => {
            Finding::warn("limits", "no cgroup controller is usable", "sandboxes are not held to their CPU and memory")
        }
        driver => Finding::ok("limits", driver),
    });
    let held = objects::count(dir, objects::tag(dir).as_deref());
    let held: Vec<String> = held.iter().map(|(kind, number)| format!("{} {number}", kind.replace('_', " "))).collect();
    findings.push(Finding::ok("held in the kernel", held.join(", ")));
    findings
}

fn kvm_node() -> Finding {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(file) if file.metadata().is_ok_and(|about| is_for_root_alone(&about)) => Finding::warn(
            "/dev/kvm",
            "open to root alone, and no microVM runs as root",
            "chgrp kvm /dev/kvm && chmod 660 /dev/kvm",
        ),
        Ok(_) => Finding::ok("/dev/kvm", "opens (whether it boots a guest is found out by the host agent)"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Finding::warn(
            "/dev/kvm",
            "absent",
            "sandboxes run under emulation; on a cloud machine choose a type with nested virtualisation",
        ),
        Err(error) => {
            Finding::warn("/dev/kvm", error.to_string(), "sandboxes run under emulation; give the container the device")
        }
    }
}

fn is_for_root_alone(about: &std::fs::Metadata) -> bool {
    let may = |bits: u32| about.mode() & bits == bits;
    !may(0o006) && (about.gid() == 0 || !may(0o060))
}

fn cgroups() -> Finding {
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    let has = |name: &str| controllers.split_whitespace().any(|controller| controller == name);
    if has("cpu") && has("memory") && has("pids") {
        return Finding::ok("cgroups", "version 2");
    }
    if ["cpu", "memory", "pids"].iter().all(|name| Path::new("/sys/fs/cgroup").join(name).is_dir()) {
        return Finding::ok("cgroups", "version 1");
    }
    Finding::warn(
        "cgroups",
        "cpu, memory and pids are not all usable",
        "sandboxes are not held to their CPU and memory",
    )
}

/// By the type of the file system: nothing is written.
fn reflink(dir: &Path) -> Finding {
    const XFS: i64 = 0x5846_5342;
    const BTRFS: i64 = 0x9123_683e;
    match nix::sys::statfs::statfs(existing(dir)) {
        Ok(found) if [XFS, BTRFS].contains(&found.filesystem_type().0) => {
            Finding::ok("storage", "on a file system with reflinks")
        }
        Ok(_) => Finding::ok(
            "storage",
            "on a file system without reflinks: the host agent makes an XFS pool of its own in a file",
        ),
        Err(error) => Finding::warn("storage", error.to_string(), "is the directory readable?"),
    }
}

/// As WRENN_DISK names it.
pub const DEVICE_MAPPER: &str = "device-mapper";

/// Of a driver of disks that needs something of this machine.
pub fn disk_driver(name: &str) -> Option<Finding> {
    const WHAT: &str = "disks";
    let control = std::fs::File::options().read(true).write(true).open("/dev/mapper/control");
    match (name.trim(), control) {
        ("" | "reflink", _) => None,
        (DEVICE_MAPPER, Ok(_)) => Some(Finding::ok(WHAT, "the kernel has device-mapper")),
        (DEVICE_MAPPER, Err(error)) => Some(Finding::fail(
            WHAT,
            format!("WRENN_DISK is device-mapper, and the kernel has none: /dev/mapper/control: {error}"),
            "modprobe dm_snapshot (Debian's kernels have it), or set WRENN_DISK=reflink",
        )),
        (other, _) => Some(Finding::fail(
            WHAT,
            format!("WRENN_DISK is {other:?}"),
            "give reflink or device-mapper (docs/how-to/disks.md)",
        )),
    }
}

fn disk(dir: &Path) -> Finding {
    let Ok(found) = nix::sys::statvfs::statvfs(existing(dir)) else {
        return Finding::warn("disk", "unknown", "is the directory readable?");
    };
    let free_mib = found.blocks_available() * found.fragment_size() / (1 << 20);
    let words = format!("{:.1} GiB free for {}", free_mib as f64 / 1024.0, dir.display());
    if free_mib < DISK_FAIL_MIB {
        Finding::fail("disk", words, "make room, or use another --dir: 6 GiB are the least, 20 GiB are comfortable")
    } else if free_mib < DISK_WARN_MIB {
        Finding::warn("disk", words, "20 GiB are comfortable")
    } else {
        Finding::ok("disk", words)
    }
}

fn existing(dir: &Path) -> &Path {
    dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

fn memory() -> Finding {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 = available.and_then(|value| value.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0);
    let words = format!("{:.1} GiB available", kib as f64 / (1 << 20) as f64);
    match kib >> 10 {
        ..MEMORY_WARN_MIB => Finding::warn("memory", words, "a sandbox has 512 MiB by default"),
        _ => Finding::ok("memory", words),
    }
}

fn images(dir: &Path) -> Finding {
    let has = |base: &Path| base.join("kernels").is_dir() && base.join("images/minimal/rootfs.ext4").is_file();
    match artifacts::place(None) {
        _ if has(dir) => Finding::ok("kernel and images", dir.display().to_string()),
        Some(cache) if has(&cache) => Finding::ok("kernel and images", format!("ready in {}", cache.display())),
        _ => Finding::warn("kernel and images", "not made yet", "run `make images`"),
    }
}
