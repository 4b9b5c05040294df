//! Settings: command line and environment, checked once. A setting that cannot be used ends the program with one sentence that names
//! the setting, what is wrong with it and the cure.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::time::Duration;

use microvm::firecracker::{self, HugePages};
use telemetry::Listen;
use url::Url;

use crate::disk::DiskChoice;
use crate::vmm::{self, VmmChoice};

/// `EX_CONFIG` of sysexits: supervisors should not restart a program that ends so.
pub const EXIT_CONFIG: u8 = 78;

/// On loopback: the numbers are the operator's.
const METRICS_LISTEN: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9471));

#[derive(Debug, Clone, clap::Parser)]
#[command(name = "wrenn-agent", version, about = "Runs the sandboxes of one host")]
pub struct Args {
    /// Registers this host by a token of `POST /v1/hosts` (one hour, one use). Better given by the environment, where no process list shows it.
    #[arg(long, value_name = "TOKEN", env = "WRENN_REGISTRATION_TOKEN", hide_env_values = true)]
    pub register: Option<String>,
    /// HOST:PORT by which the control plane reaches this agent. Kept at registration.
    #[arg(long, value_name = "HOST:PORT")]
    pub address: Option<String>,
    /// The control plane. Kept at registration.
    #[arg(long, env = "WRENN_CP_URL", value_name = "URL")]
    pub cp_url: Option<String>,
    #[arg(long, env = "WRENN_HOST_LISTEN_ADDR", default_value = ":50051", value_name = "ADDR:PORT")]
    pub listen: String,
    /// Where Prometheus reads metrics, or off [default: 127.0.0.1:9471]
    #[arg(long, env = "WRENN_HOST_METRICS_LISTEN_ADDR", value_name = "ADDR:PORT")]
    pub metrics_listen: Option<String>,
    #[arg(long, env = "WRENN_DIR", default_value = "/var/lib/wrenn")]
    pub dir: PathBuf,
    /// Size in MiB of the agent's own XFS pool, where WRENN_DIR is on a file system without reflinks.
    #[arg(long, env = "WRENN_POOL_MIB")]
    pub pool_mib: Option<String>,
    /// How new disks are made of their templates: by reflinks of the pool's file system, or as snapshots of device-mapper.
    #[arg(long, env = "WRENN_DISK", default_value = "reflink", value_name = "reflink|device-mapper")]
    pub disk: String,
    /// How many network slots are made ahead.
    #[arg(long, env = "WRENN_SLOT_POOL", default_value = "4")]
    pub slot_pool: String,
    /// How many sandboxes this host takes at most.
    #[arg(long, env = "WRENN_MAX_SANDBOXES", default_value = "1000")]
    pub max_sandboxes: String,
    /// How a sandbox begins: restored from its template's booted state, which the first of its kind leaves behind, or always booted.
    #[arg(long, env = "WRENN_CREATE_BY", default_value = "restore", value_name = "restore|boot")]
    pub create_by: String,
    /// How many microVMs stand by at most: restored ahead for the creates that come, of the kinds that were asked for of late. 0: none.
    #[arg(long, env = "WRENN_STANDBYS", default_value = "4")]
    pub standbys: String,
    /// What runs the sandboxes. auto: Firecracker where it is installed and KVM boots a guest, else QEMU.
    #[arg(long, env = "WRENN_VMM", default_value = "auto", value_name = "auto|firecracker|qemu")]
    pub vmm: String,
    /// The static release build of Firecracker [default: /usr/local/bin/firecracker].
    #[arg(long, env = "WRENN_FIRECRACKER_BIN", value_name = "PATH")]
    pub firecracker_bin: Option<PathBuf>,
    /// Its jailer, of the same release [default: beside it, with "jailer" in its name for "firecracker"].
    #[arg(long, env = "WRENN_JAILER_BIN", value_name = "PATH")]
    pub jailer_bin: Option<PathBuf>,
    /// Known holes of a VMM that are put up with, by their CVE, with commas between.
    #[arg(long, env = "WRENN_VMM_ALLOW_CVE", default_value = "", value_name = "CVE,...")]
    pub vmm_allow_cve: String,
    /// What guests' memory is made of, under Firecracker.
    #[arg(long, env = "WRENN_HUGE_PAGES", default_value = "none", value_name = "none|transparent")]
    pub huge_pages: String,
    /// Whether guests give back the memory that they have freed, under Firecracker.
    #[arg(long, env = "WRENN_FREE_PAGE_REPORTING", default_value = "on", value_name = "on|off")]
    pub free_page_reporting: String,
    /// At most so many MiB per second of each guest's disk, under Firecracker. 0: no limit.
    #[arg(long, env = "WRENN_DISK_MIB_S", default_value = "0")]
    pub disk_mib_s: String,
    /// At most so many MiB per second of each guest's network, each way, under Firecracker. 0: no limit.
    #[arg(long, env = "WRENN_NETWORK_MIB_S", default_value = "0")]
    pub network_mib_s: String,
    /// Written when the agent serves: {"addr":"...","pid":N}.
    #[arg(long, value_name = "PATH")]
    pub ready_file: Option<PathBuf>,
    /// Kills every sandbox of WRENN_DIR and takes down what it holds on this host. Works when no agent runs.
    #[arg(long)]
    pub stop_all: bool,
}

/// Checked settings.
#[derive(Debug, Clone)]
pub struct Config {
    pub register: Option<String>,
    pub address: Option<String>,
    pub cp_url: Option<Url>,
    pub listen: SocketAddr,
    pub metrics: Listen,
    pub dir: PathBuf,
    pub pool_mib: Option<u32>,
    pub disk: DiskChoice,
    pub slot_pool: u16,
    pub max_sandboxes: usize,
    /// Creates are restored where they can be.
    pub restores: bool,
    pub standbys: usize,
    pub vmm: vmm::Wanted,
    pub ready_file: Option<PathBuf>,
    pub stop_all: bool,
    /// How long an object that no journal knows must have been seen before it is removed.
    pub orphan_grace: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{setting} {problem}; {cure}")]
pub struct BadSetting {
    pub setting: &'static str,
    pub problem: String,
    pub cure: String,
}

pub fn bad(setting: &'static str, problem: impl Into<String>, cure: impl Into<String>) -> BadSetting {
    BadSetting { setting, problem: problem.into(), cure: cure.into() }
}

impl TryFrom<Args> for Config {
    type Error = BadSetting;

    fn try_from(args: Args) -> Result<Self, BadSetting> {
        if !args.dir.is_absolute() {
            return Err(bad(
                "WRENN_DIR",
                format!("is not an absolute path: {:?}", args.dir),
                "give a path that begins with /",
            ));
        }
        let vmm = wanted_vmm(&args)?;
        Ok(Self {
            vmm,
            register: args.register.filter(|token| !token.is_empty()),
            address: args.address.map(|address| checked_address(&address)).transpose()?,
            cp_url: args.cp_url.filter(|url| !url.is_empty()).map(|url| checked_url(&url)).transpose()?,
            listen: listen_address(&args.listen)?,
            metrics: Listen::parse(args.metrics_listen.as_deref(), METRICS_LISTEN).map_err(|problem| {
                bad("WRENN_HOST_METRICS_LISTEN_ADDR", problem.to_string(), "give 127.0.0.1:9471 or :9471, or off")
            })?,
            dir: args.dir,
            pool_mib: args
                .pool_mib
                .filter(|text| !text.is_empty())
                .map(|text| number("WRENN_POOL_MIB", &text, 512, 1 << 30))
                .transpose()?,
            disk: match args.disk.trim() {
                "reflink" | "" => DiskChoice::Reflink,
                "device-mapper" => DiskChoice::DeviceMapper,
                other => return Err(bad("WRENN_DISK", format!("is {other:?}"), "give reflink or device-mapper")),
            },
            slot_pool: number("WRENN_SLOT_POOL", &args.slot_pool, 0, 256)?,
            max_sandboxes: number("WRENN_MAX_SANDBOXES", &args.max_sandboxes, 1, 32_767)?,
            restores: match args.create_by.trim() {
                "restore" | "" => true,
                "boot" => false,
                other => return Err(bad("WRENN_CREATE_BY", format!("is {other:?}"), "give restore or boot")),
            },
            standbys: number("WRENN_STANDBYS", &args.standbys, 0, 256)?,
            ready_file: args.ready_file,
            stop_all: args.stop_all,
            orphan_grace: ORPHAN_GRACE,
        })
    }
}

fn wanted_vmm(args: &Args) -> Result<vmm::Wanted, BadSetting> {
    let firecracker = args.firecracker_bin.clone().filter(|path| !path.as_os_str().is_empty());
    let is_named = firecracker.is_some();
    let firecracker = firecracker.unwrap_or_else(|| FIRECRACKER.into());
    let jailer = args.jailer_bin.clone().filter(|path| !path.as_os_str().is_empty());
    let beside = || {
        let name = firecracker.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        firecracker.with_file_name(name.replace("firecracker", "jailer"))
    };
    let rate = |setting, text: &str| -> Result<Option<u64>, BadSetting> {
        let mib: u64 = number(setting, text, 0, 1 << 20)?;
        Ok(Some(mib << 20).filter(|bytes| *bytes > 0))
    };
    Ok(vmm::Wanted {
        choice: match args.vmm.trim() {
            "auto" | "" => VmmChoice::Auto,
            "firecracker" => VmmChoice::Firecracker,
            "qemu" => VmmChoice::Qemu,
            other => return Err(bad("WRENN_VMM", format!("is {other:?}"), "give auto, firecracker or qemu")),
        },
        jailer: jailer.unwrap_or_else(beside),
        firecracker,
        is_named,
        allowed: args.vmm_allow_cve.split(',').map(|id| id.trim().to_owned()).filter(|id| !id.is_empty()).collect(),
        options: firecracker::Options {
            huge_pages: match args.huge_pages.trim() {
                "none" | "" => HugePages::None,
                "transparent" => HugePages::Transparent,
                other => return Err(bad("WRENN_HUGE_PAGES", format!("is {other:?}"), "give none or transparent")),
            },
            keeps_freed_memory: match args.free_page_reporting.trim() {
                "on" | "" => false,
                "off" => true,
                other => return Err(bad("WRENN_FREE_PAGE_REPORTING", format!("is {other:?}"), "give on or off")),
            },
            disk_bytes_per_second: rate("WRENN_DISK_MIB_S", &args.disk_mib_s)?,
            network_bytes_per_second: rate("WRENN_NETWORK_MIB_S", &args.network_mib_s)?,
        },
    })
}

/// Where its installation guide puts it.
const FIRECRACKER: &str = "/usr/local/bin/firecracker";

/// Two scans at least this far apart: longer than any step between making an object and writing down whose it is.
const ORPHAN_GRACE: Duration = Duration::from_secs(60);

fn number<T: TryFrom<u64>>(setting: &'static str, text: &str, min: u64, max: u64) -> Result<T, BadSetting> {
    text.trim()
        .parse::<u64>()
        .ok()
        .filter(|value| (min..=max).contains(value))
        .and_then(|value| T::try_from(value).ok())
        .ok_or_else(|| bad(setting, format!("is {text:?}"), format!("give a whole number from {min} to {max}")))
}

/// `:50051`, `0.0.0.0:50051`, `[::]:50051`.
fn listen_address(text: &str) -> Result<SocketAddr, BadSetting> {
    let full = if text.starts_with(':') { format!("0.0.0.0{text}") } else { text.to_owned() };
    full.parse().map_err(|_| {
        bad(
            "WRENN_HOST_LISTEN_ADDR",
            format!("is {text:?}"),
            "give :PORT or ADDRESS:PORT, for example :50051 or 127.0.0.1:50051",
        )
    })
}

/// Only the form: whether the control plane accepts to dial it is the control plane's decision.
fn checked_address(text: &str) -> Result<String, BadSetting> {
    let wrong = |problem: String| {
        bad(
            "--address",
            problem,
            "give HOST:PORT by which the control plane reaches this agent, for example 10.0.0.5:50051",
        )
    };
    let (host, port) = text.rsplit_once(':').ok_or_else(|| wrong(format!("has no port: {text:?}")))?;
    if host.is_empty() || host.len() > 253 || text.contains(['/', '@', ' ', '?', '#']) {
        return Err(wrong(format!("is {text:?}")));
    }
    match port.parse::<u16>() {
        Ok(0) | Err(_) => Err(wrong(format!("has no usable port: {text:?}"))),
        Ok(_) => Ok(text.to_owned()),
    }
}

fn checked_url(text: &str) -> Result<Url, BadSetting> {
    let cure = "give the control plane's URL, for example http://10.0.0.1:8000";
    let url =
        Url::parse(text).map_err(|error| bad("WRENN_CP_URL", format!("is not a URL ({error}): {text:?}"), cure))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(bad("WRENN_CP_URL", format!("is not an http or https URL: {text:?}"), cure));
    }
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        return Err(bad("WRENN_CP_URL", "has a user, a query or a fragment", cure));
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    fn config(arguments: &[&str]) -> Result<Config, BadSetting> {
        let all = ["wrenn-agent"].iter().chain(arguments);
        Config::try_from(Args::try_parse_from(all).unwrap())
    }

    #[test]
    fn reads_the_documented_forms() {
        let config = config(&["--address", "10.0.0.5:50051", "--cp-url", "http://10.0.0.1:8000/"]).unwrap();
        assert_eq!(config.listen, "0.0.0.0:50051".parse().unwrap());
        assert_eq!(config.dir, PathBuf::from("/var/lib/wrenn"));
        assert_eq!(config.cp_url.unwrap().as_str(), "http://10.0.0.1:8000/");
        assert_eq!(config.vmm.jailer, PathBuf::from("/usr/local/bin/jailer"));
    }

    #[test]
    fn a_jailer_lies_beside_its_firecracker() {
        let released = "/opt/release-v1.17.0-x86_64/firecracker-v1.17.0-x86_64";
        let config = config(&["--firecracker-bin", released, "--disk-mib-s", "100", "--vmm-allow-cve", "CVE-1, CVE-2"]);
        let vmm = config.unwrap().vmm;
        assert_eq!(vmm.jailer, PathBuf::from("/opt/release-v1.17.0-x86_64/jailer-v1.17.0-x86_64"));
        assert_eq!(vmm.options.disk_bytes_per_second, Some(100 << 20));
        assert_eq!(vmm.options.network_bytes_per_second, None);
        assert_eq!(vmm.allowed, ["CVE-1", "CVE-2"]);
    }

    #[test]
    fn names_the_setting_that_is_wrong() {
        for (arguments, setting) in [
            (vec!["--address", "10.0.0.5"], "--address"),
            (vec!["--address", "http://10.0.0.5:1/x"], "--address"),
            (vec!["--address", "10.0.0.5:0"], "--address"),
            (vec!["--address", ":50051"], "--address"),
            (vec!["--listen", "nonsense"], "WRENN_HOST_LISTEN_ADDR"),
            (vec!["--metrics-listen", "on"], "WRENN_HOST_METRICS_LISTEN_ADDR"),
            (vec!["--cp-url", "ftp://x"], "WRENN_CP_URL"),
            (vec!["--cp-url", "http://u:p@x"], "WRENN_CP_URL"),
            (vec!["--dir", "relative"], "WRENN_DIR"),
            (vec!["--pool-mib=-1"], "WRENN_POOL_MIB"),
            (vec!["--disk", "qcow2"], "WRENN_DISK"),
            (vec!["--slot-pool", "many"], "WRENN_SLOT_POOL"),
            (vec!["--max-sandboxes", "0"], "WRENN_MAX_SANDBOXES"),
            (vec!["--create-by", "magic"], "WRENN_CREATE_BY"),
            (vec!["--standbys=-1"], "WRENN_STANDBYS"),
            (vec!["--vmm", "xen"], "WRENN_VMM"),
            (vec!["--huge-pages", "1G"], "WRENN_HUGE_PAGES"),
            (vec!["--free-page-reporting", "maybe"], "WRENN_FREE_PAGE_REPORTING"),
            (vec!["--disk-mib-s", "fast"], "WRENN_DISK_MIB_S"),
            (vec!["--network-mib-s=-1"], "WRENN_NETWORK_MIB_S"),
        ] {
            assert_eq!(config(&arguments).unwrap_err().setting, setting, "{arguments:?}");
        }
    }
}
