//! `wrenn host install`: makes this machine a host that comes back by itself: looks whether it can be one, puts programs, settings and the
//! service into place, joins by a registration token, and waits until the host agent serves. Repeated, it changes what is given and keeps the rest.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use serde::Serialize;

use crate::commands::doctor;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show};
use crate::platform::preflight::{Finding, Grade};
use crate::platform::service::{self, Files, Service, Settings};
use crate::platform::{advice, preflight};

const SERVICE: Service = Service {
    program: "wrenn-agent",
    title: "host agent",
    unit: include_str!("../../../../../deploy/systemd/wrenn-agent.service"),
    // It makes its pool and looks whether KVM boots a guest before it joins.
    start_max: Duration::from_secs(180),
};
/// For one look at the control plane.
const ANSWER_MAX: Duration = Duration::from_secs(5);
const DIR: &str = "WRENN_DIR";
/// In that directory, of a host that has joined.
const JOINED: &str = "host-token";
const SETTINGS: &str = "etc/wrenn/agent.env";
const HEAD: &str =
    "Settings of the host agent; their names are in .env.example. `wrenn host install --set NAME=VALUE` changes them.";
/// For the first start alone: the token works once.
const REGISTRATION: &str = "etc/wrenn/registration.env";
const MODULES: &str = "etc/modules-load.d/wrenn.conf";
const MODULES_TEXT: &str = "# What sandboxes are made of.\nkvm\nkvm_amd\nkvm_intel\nloop\nnf_tables\ntun\nveth\nxfs\n";
/// For disks by device-mapper.
const MAPPER_MODULES: &str = "etc/modules-load.d/wrenn-device-mapper.conf";
const MAPPER_MODULES_TEXT: &str = "# Disks of sandboxes, by WRENN_DISK=device-mapper.\ndm_snapshot\n";
const UDEV: &str = "etc/udev/rules.d/11-wrenn.rules";
const UDEV_TEXT: &str = include_str!("../../../../../deploy/udev/11-wrenn.rules");
/// As the package has it.
const UDEV_PACKAGED: &str = "usr/lib/udev/rules.d/11-wrenn.rules";
const DISK: &str = "WRENN_DISK";
const SYSCTL: &str = "etc/sysctl.d/90-wrenn.conf";
const SYSCTL_TEXT: &str = "# Guests reach the internet through this machine.\nnet.ipv4.ip_forward = 1\n";

#[derive(clap::Args)]
pub struct Arguments {
    /// The registration token of `wrenn host add`. Better given by the environment, where no process list shows it.
    #[arg(long, value_name = "TOKEN", env = "WRENN_REGISTRATION_TOKEN", hide_env_values = true)]
    register: Option<String>,
    /// The control plane, as this machine reaches it.
    #[arg(long, value_name = "URL", env = "WRENN_CP_URL")]
    cp_url: Option<String>,
    /// HOST:PORT by which the control plane reaches this machine.
    #[arg(long, value_name = "HOST:PORT")]
    address: Option<String>,
    /// A setting of the agent, such as WRENN_VMM=firecracker; may be repeated. The names are in .env.example.
    #[arg(long = "set", value_name = "NAME=VALUE")]
    settings: Vec<String>,
    /// Put everything into place and start nothing.
    #[arg(long)]
    no_start: bool,
    /// Go on although something that a host needs is missing.
    #[arg(long)]
    force: bool,
    /// Below this directory instead of `/`: to look at what would be put into place. Starts nothing.
    #[arg(long, default_value = "/", value_name = "DIR")]
    root: PathBuf,
}

#[derive(Serialize)]
struct Installed {
    findings: Vec<Finding>,
    /// What was put into place.
    files: Vec<String>,
    /// The agent serves.
    running: bool,
    /// What is left to do, for a person.
    next: Option<String>,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let mut files = Files::below(&arguments.root);
    // What lies there counts, unless another directory is named.
    let named = options.dir.as_ref().map(|_| options.dir()).transpose()?;
    let mut settings = wanted(arguments, named.as_deref())?.over(Settings::read(&files.at(SETTINGS))?);
    if settings.get(DIR).is_none() {
        settings.put(DIR, options.dir()?.display().to_string())?;
    }
    let dir = PathBuf::from(settings.get(DIR).unwrap_or_default());
    if !dir.is_absolute() {
        return Err(Failure::usage(format!("{DIR} is no absolute path: {}", dir.display())));
    }
    let needed = [("WRENN_CP_URL", "--cp-url"), ("WRENN_HOST_ADDRESS", "--address")];
    let missing: Vec<&str> =
        needed.iter().filter(|(name, _)| settings.get(name).is_none()).map(|(_, option)| *option).collect();
    if !missing.is_empty() {
        return Err(Failure::usage(format!("not given yet, and needed the first time: {}", missing.join(", "))));
    }
    let token = checked_token(arguments)?;
    let is_here = arguments.root == Path::new("/");
    if is_here {
        service::only_root()?;
    }
    let mut findings = preflight::host();
    findings.extend(doctor::of_machine(&dir));
    findings.extend(settings.get(DISK).and_then(doctor::disk_driver));
    findings.extend(advice::all());
    let has_joined = dir.join(JOINED).exists();
    let has_token = token.is_some() || files.at(REGISTRATION).exists();
    findings.push(membership(has_joined, has_token));
    if is_here {
        findings.push(control_plane(settings.get("WRENN_CP_URL").unwrap_or_default()).await);
    }
    let is_fit = findings.iter().all(|finding| finding.grade != Grade::Fail);
    if is_here && !is_fit && !arguments.force {
        let report = Installed { findings, files: Vec::new(), running: false, next: Some(NOT_FIT.to_owned()) };
        show(format, &report, in_words)?;
        return Ok(ExitCode::FAILURE);
    }
    let program = SERVICE.place(&mut files)?;
    findings.extend(SERVICE.hidden(&program, &arguments.root));
    lay_out(&settings, (token, has_joined), &mut files)?;
    let next = if arguments.no_start || !is_here {
        Some(SERVICE.later())
    } else if !service::has_systemd() {
        Some(by_hand(&program))
    } else {
        start(&dir, &files).await?;
        None
    };
    let report = Installed { findings, files: files.written, running: next.is_none(), next };
    show(format, &report, in_words)?;
    Ok(ExitCode::SUCCESS)
}

/// Whether it will be let in.
fn membership(has_joined: bool, has_token: bool) -> Finding {
    const WHAT: &str = "membership";
    match (has_joined, has_token) {
        (true, _) => Finding::ok(WHAT, "this machine has joined"),
        (false, true) => Finding::ok(WHAT, "a registration token is given"),
        (false, false) => Finding::warn(
            WHAT,
            "this machine has not joined, and no registration token is given",
            "`wrenn host add` on the control plane prints one; repeat this with WRENN_REGISTRATION_TOKEN=... before it",
        ),
    }
}

/// No reason to refuse anything: it may be made after its hosts, and they ask for it as long as it takes.
async fn control_plane(url: &str) -> Finding {
    const WHAT: &str = "control plane";
    let cure = "is --cp-url right, does wrenn-cp run there, and is the way to it open?";
    let asked = async {
        let client = reqwest::Client::builder().timeout(ANSWER_MAX).redirect(reqwest::redirect::Policy::none()).build();
        let health = url::Url::parse(url).and_then(|url| url.join("health")).map_err(|error| error.to_string())?;
        let answer =
            client.map_err(|error| causes(&error))?.get(health).send().await.map_err(|error| causes(&error))?;
        let status = answer.status();
        let said: serde_json::Value = answer.json().await.unwrap_or_default();
        said["version"]
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| format!("what answers is no control plane ({status})"))
    };
    match asked.await {
        Ok(version) => Finding::ok(WHAT, format!("version {version} answers at {url}")),
        Err(why) => Finding::warn(WHAT, format!("{url}: {why}"), cure),
    }
}

fn causes(error: &dyn std::error::Error) -> String {
    let last = std::iter::successors(error.source(), |error| error.source()).last();
    last.map_or_else(|| error.to_string(), ToString::to_string)
}

const NOT_FIT: &str = "this machine cannot be a host yet: see the lines with FAIL (--force goes on all the same)";

fn wanted(arguments: &Arguments, dir: Option<&Path>) -> Result<Settings, Failure> {
    let mut all = Settings::default();
    if let Some(dir) = dir {
        all.put(DIR, dir.display().to_string())?;
    }
    if let Some(url) = arguments.cp_url.as_ref().filter(|url| !url.is_empty()) {
        let parsed = url::Url::parse(url).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
        parsed.ok_or_else(|| Failure::usage(format!("--cp-url is no http or https URL: {url:?}")))?;
        all.put("WRENN_CP_URL", url)?;
    }
    if let Some(address) = &arguments.address {
        let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
        if !matches!(port, Some(Ok(1..))) {
            return Err(Failure::usage(format!("--address is {address:?}: give HOST:PORT, such as 10.0.0.5:50051")));
        }
        all.put("WRENN_HOST_ADDRESS", address)?;
    }
    all.put_given(&arguments.settings)?;
    Ok(all)
}

/// Where the host of this machine lies, by its settings; none where it was not installed.
pub fn installed_dir() -> Option<PathBuf> {
    installed(DIR).map(PathBuf::from)
}

/// What makes its disks, where that is said.
pub fn installed_disk() -> Option<String> {
    installed(DISK)
}

fn installed(name: &str) -> Option<String> {
    let settings = Settings::read(&Path::new("/").join(SETTINGS)).ok()?;
    settings.get(name).map(str::to_owned)
}

/// It goes into a file of settings: nothing in it may be one of its marks.
fn checked_token(arguments: &Arguments) -> Result<Option<&str>, Failure> {
    match arguments.register.as_deref().filter(|token| !token.is_empty()) {
        Some(token) if !token.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"\\'$`#;".contains(&byte)) => {
            Err(Failure::usage("the registration token is none: take it as `wrenn host add` prints it"))
        }
        token => Ok(token),
    }
}

fn lay_out(settings: &Settings, (token, has_joined): (Option<&str>, bool), files: &mut Files) -> Result<(), Failure> {
    files.write(SETTINGS, settings.text(HEAD).as_bytes(), 0o600)?;
    match token {
        Some(token) => {
            let line = format!("WRENN_REGISTRATION_TOKEN={token}\n");
            files.write(REGISTRATION, line.as_bytes(), 0o600)?;
        }
        // It is spent.
        None if has_joined => files.remove(REGISTRATION)?,
        None => {}
    }
    files.write(MODULES, MODULES_TEXT.as_bytes(), 0o644)?;
    if settings.get(DISK).is_some_and(|driver| driver.trim() == doctor::DEVICE_MAPPER) {
        files.write(MAPPER_MODULES, MAPPER_MODULES_TEXT.as_bytes(), 0o644)?;
        if !files.at(UDEV_PACKAGED).exists() {
            files.write(UDEV, UDEV_TEXT.as_bytes(), 0o644)?;
        }
    }
    files.write(SYSCTL, SYSCTL_TEXT.as_bytes(), 0o644)
}

/// Starts the service, waits until it serves, and takes the spent token away.
async fn start(dir: &Path, files: &Files) -> Result<(), Failure> {
    // What is missing here is told by the agent, in its words.
    let _ = Command::new("sysctl").args(["--quiet", "--load"]).arg(files.at(SYSCTL)).status();
    let _ = Command::new("udevadm").args(["control", "--reload"]).status();
    SERVICE.start().await?;
    if !dir.join(JOINED).exists() {
        return Err(SERVICE.not_started("it has not joined: give a new token (wrenn host add)"));
    }
    files.remove(REGISTRATION)
}

fn by_hand(program: &str) -> String {
    format!(
        "systemd does not run here, so nothing was started. By hand:\n  set -a; . /{SETTINGS}; [ ! -f /{REGISTRATION} ] || . /{REGISTRATION}; set +a\n  \
         {program} --address \"$WRENN_HOST_ADDRESS\"\nWhen it has joined, remove /{REGISTRATION}: the token is spent."
    )
}

fn in_words(installed: &Installed) -> String {
    let mut lines: Vec<String> = doctor::lines(&installed.findings);
    lines.extend(installed.files.iter().map(|file| format!("wrote {file}")));
    match &installed.next {
        Some(next) => lines.push(next.clone()),
        None => lines.push("The host agent serves. `wrenn host list` on the control plane's side shows it.".to_owned()),
    }
    lines.join("\n")
}
