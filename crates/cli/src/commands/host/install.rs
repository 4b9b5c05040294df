//! `wrenn host install`: makes this machine a host that comes back by itself: looks whether it can be one, puts programs, settings and the
//! service into place, joins by a registration token, and waits until the host agent serves. Repeated, it changes what is given and keeps the rest.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::commands::doctor;
use crate::credentials::Options;
use crate::failure::{Doing as _, Failure};
use crate::output::{Format, show};
use crate::platform::preflight::{Finding, Grade};
use crate::platform::{advice, layout, preflight};

/// As the package has them.
const UNIT: &str = include_str!("../../../../../deploy/systemd/wrenn-agent.service");
const UNIT_NAME: &str = "wrenn-agent.service";
/// What the unit says of the program; another place is written over it.
const PACKAGED: &str = "/usr/bin/wrenn-agent";
/// Where programs go that were built on this machine.
const LOCAL: &str = "usr/local/bin";
const DIR: &str = "WRENN_DIR";
/// In that directory, of a host that has joined.
const JOINED: &str = "host-token";
const SETTINGS: &str = "etc/wrenn/agent.env";
/// For the first start alone: the token works once.
const REGISTRATION: &str = "etc/wrenn/registration.env";
const MODULES: &str = "etc/modules-load.d/wrenn.conf";
const MODULES_TEXT: &str = "# What sandboxes are made of.\nkvm\nkvm_amd\nkvm_intel\nloop\nnf_tables\ntun\nveth\nxfs\n";
const SYSCTL: &str = "etc/sysctl.d/90-wrenn.conf";
const SYSCTL_TEXT: &str = "# Guests reach the internet through this machine.\nnet.ipv4.ip_forward = 1\n";
/// The agent makes its pool and looks whether KVM boots a guest before it joins.
const START_MAX: Duration = Duration::from_secs(180);
const LOOK_EVERY: Duration = Duration::from_millis(200);

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
    // What lies there counts, unless another directory is named.
    let named = options.dir.as_ref().map(|_| options.dir()).transpose()?;
    let mut settings = Settings::wanted(arguments, named.as_deref())?.merged(&arguments.root.join(SETTINGS))?;
    let dir = settings.entry(DIR.to_owned()).or_insert(options.dir()?.display().to_string()).clone();
    let dir = PathBuf::from(dir);
    if !dir.is_absolute() {
        return Err(Failure::usage(format!("{DIR} is no absolute path: {}", dir.display())));
    }
    let needed = [("WRENN_CP_URL", "--cp-url"), ("WRENN_HOST_ADDRESS", "--address")];
    let missing: Vec<&str> =
        needed.iter().filter(|(name, _)| !settings.contains_key(*name)).map(|(_, option)| *option).collect();
    if !missing.is_empty() {
        return Err(Failure::usage(format!("{} is missing: the first time it has to be given", missing.join(" and "))));
    }
    let token = checked_token(arguments)?;
    let is_here = arguments.root == Path::new("/");
    if is_here && !nix::unistd::geteuid().is_root() {
        return Err(Failure::new(
            "this is not root: run it with sudo, because it puts a service of the system into place",
        ));
    }
    let mut findings = preflight::host();
    findings.extend(doctor::of_machine(&dir));
    findings.extend(advice::all());
    let is_fit = findings.iter().all(|finding| finding.grade != Grade::Fail);
    if is_here && !is_fit && !arguments.force {
        let report = Installed { findings, files: Vec::new(), running: false, next: Some(NOT_FIT.to_owned()) };
        show(format, &report, in_words)?;
        return Ok(ExitCode::FAILURE);
    }
    let mut files = Vec::new();
    let program = place_program(&arguments.root, &mut files)?;
    let has_joined = dir.join(JOINED).exists();
    lay_out(&arguments.root, &program, &settings, (token, has_joined), &mut files)?;
    let has_systemd = Path::new("/run/systemd/system").is_dir();
    let next = if arguments.no_start || !is_here {
        Some(format!("start it: systemctl daemon-reload && systemctl enable --now {UNIT_NAME}"))
    } else if !has_systemd {
        Some(by_hand(&program))
    } else {
        start(&dir).await?;
        None
    };
    let report = Installed { findings, files, running: next.is_none(), next };
    show(format, &report, in_words)?;
    Ok(ExitCode::SUCCESS)
}

const NOT_FIT: &str = "this machine cannot be a host yet: see the lines with FAIL (--force goes on all the same)";

/// Names and values for the agent's environment.
struct Settings(BTreeMap<String, String>);

impl Settings {
    fn wanted(arguments: &Arguments, dir: Option<&Path>) -> Result<Self, Failure> {
        let mut all: BTreeMap<String, String> =
            dir.iter().map(|dir| (DIR.to_owned(), dir.display().to_string())).collect();
        if let Some(url) = arguments.cp_url.as_ref().filter(|url| !url.is_empty()) {
            let parsed = url::Url::parse(url).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
            parsed.ok_or_else(|| Failure::usage(format!("--cp-url is no http or https URL: {url:?}")))?;
            all.insert("WRENN_CP_URL".to_owned(), url.clone());
        }
        if let Some(address) = &arguments.address {
            let port =
                address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
            if !matches!(port, Some(Ok(1..))) {
                return Err(Failure::usage(format!(
                    "--address is {address:?}: give HOST:PORT, such as 10.0.0.5:50051"
                )));
            }
            all.insert("WRENN_HOST_ADDRESS".to_owned(), address.clone());
        }
        for setting in &arguments.settings {
            let (name, value) = setting.split_once('=').unwrap_or_default();
            let is_name = |name: &str| {
                name.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_')
            };
            if !name.starts_with("WRENN_") || !is_name(name) {
                return Err(Failure::usage(format!(
                    "--set {setting:?}: give NAME=VALUE with a name that begins with WRENN_"
                )));
            }
            all.insert(name.to_owned(), value.to_owned());
        }
        // A line break would be another setting.
        match all.iter().find(|(_, value)| value.chars().any(char::is_control)) {
            Some((name, _)) => Err(Failure::usage(format!("{name} has control characters"))),
            None => Ok(Self(all)),
        }
    }

    /// With what is there already and was not given anew.
    fn merged(self, present: &Path) -> Result<BTreeMap<String, String>, Failure> {
        let text = match std::fs::read_to_string(present) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            text => text.doing(|| format!("read {}", present.display()))?,
        };
        let mut all = BTreeMap::new();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            if let Some((name, value)) = line.split_once('=') {
                all.insert(name.trim().to_owned(), unquoted(value.trim()));
            }
        }
        all.extend(self.0);
        Ok(all)
    }
}

/// Where the host of this machine lies, by its settings; none where it was not installed.
pub fn installed_dir() -> Option<PathBuf> {
    let settings = Settings(BTreeMap::new()).merged(&Path::new("/").join(SETTINGS)).ok()?;
    settings.get(DIR).map(PathBuf::from)
}

fn unquoted(value: &str) -> String {
    let inner = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
    inner.map_or_else(|| value.to_owned(), |inner| inner.replace("\\\"", "\"").replace("\\\\", "\\"))
}

/// As an EnvironmentFile has it: quoted, because a value may hold spaces.
fn quoted(settings: &BTreeMap<String, String>) -> String {
    let line = |(name, value): (&String, &String)| {
        format!("{name}=\"{}\"\n", value.replace('\\', "\\\\").replace('"', "\\\""))
    };
    let head = "# Settings of the host agent; their names are in .env.example. `wrenn host install --set NAME=VALUE` changes them.\n";
    settings.iter().fold(head.to_owned(), |text, setting| text + &line(setting))
}

/// Of a package the agent stays where it is; what was built here is copied to where programs of this machine lie.
fn place_program(root: &Path, files: &mut Vec<String>) -> Result<String, Failure> {
    let present = layout::program("wrenn-agent")?;
    if ["/usr/bin", "/usr/local/bin"].iter().any(|folder| present.parent() == Some(Path::new(folder))) {
        return Ok(present.display().to_string());
    }
    for name in ["wrenn-agent", "wrenn"] {
        let from = layout::program(name)?;
        let bytes = std::fs::read(&from).doing(|| format!("read {}", from.display()))?;
        write(root, &format!("{LOCAL}/{name}"), &bytes, 0o755, files)?;
    }
    Ok(format!("/{LOCAL}/wrenn-agent"))
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

fn lay_out(
    root: &Path,
    program: &str,
    settings: &BTreeMap<String, String>,
    (token, has_joined): (Option<&str>, bool),
    files: &mut Vec<String>,
) -> Result<(), Failure> {
    write(root, SETTINGS, quoted(settings).as_bytes(), 0o600, files)?;
    match token {
        Some(token) => {
            let line = format!("WRENN_REGISTRATION_TOKEN={token}\n");
            write(root, REGISTRATION, line.as_bytes(), 0o600, files)?;
        }
        // It is spent.
        None if has_joined => remove(&root.join(REGISTRATION))?,
        None => {}
    }
    write(root, MODULES, MODULES_TEXT.as_bytes(), 0o644, files)?;
    write(root, SYSCTL, SYSCTL_TEXT.as_bytes(), 0o644, files)?;
    let unit = UNIT.replace(PACKAGED, program);
    // A package has its own, which an equal one here would hide from its updates.
    if program != PACKAGED || !Path::new("/lib/systemd/system").join(UNIT_NAME).exists() {
        write(root, &format!("etc/systemd/system/{UNIT_NAME}"), unit.as_bytes(), 0o644, files)?;
    }
    Ok(())
}

/// Whole or not at all, below the root.
fn write(root: &Path, path: &str, bytes: &[u8], mode: u32, files: &mut Vec<String>) -> Result<(), Failure> {
    let target = root.join(path);
    let doing = || format!("write {}", target.display());
    let folder = target.parent().expect("it has a folder");
    std::fs::create_dir_all(folder).doing(doing)?;
    let temporary =
        folder.join(format!(".{}.{}", target.file_name().unwrap_or_default().display(), std::process::id()));
    remove(&temporary)?;
    let written = || -> std::io::Result<()> {
        let mut file = std::fs::File::options().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, &target)
    };
    let outcome = written();
    if outcome.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    outcome.doing(doing)?;
    files.push(format!("/{path}"));
    Ok(())
}

fn remove(path: &Path) -> Result<(), Failure> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
    .doing(|| format!("remove {}", path.display()))
}

/// Starts the service, waits until it serves, and takes the spent token away.
async fn start(dir: &Path) -> Result<(), Failure> {
    // What is missing here is told by the agent, in its words.
    let _ = Command::new("sysctl").args(["--quiet", "--load", "/etc/sysctl.d/90-wrenn.conf"]).status();
    systemctl(&["daemon-reload"])?;
    systemctl(&["enable", UNIT_NAME])?;
    let before = state()?;
    // Also of one that runs: its settings may have changed.
    systemctl(&["restart", "--no-block", UNIT_NAME])?;
    let deadline = Instant::now() + START_MAX;
    loop {
        let now = state()?;
        // Each start has another number; until then it is the state of before.
        match now.active.as_str() {
            "active" if now.invocation != before.invocation => break,
            "failed" if now.invocation != before.invocation => return Err(not_started("it ended")),
            _ if Instant::now() > deadline => return Err(not_started("it does not serve")),
            _ => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
    if !dir.join(JOINED).exists() {
        return Err(not_started("it has not joined: give a new token (wrenn host add)"));
    }
    remove(&Path::new("/").join(REGISTRATION))
}

struct State {
    active: String,
    invocation: String,
}

fn state() -> Result<State, Failure> {
    let told = systemctl(&["show", "--property=ActiveState,InvocationID", UNIT_NAME])?;
    let value = |name: &str| told.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().to_owned();
    Ok(State { active: value("ActiveState="), invocation: value("InvocationID=") })
}

fn systemctl(arguments: &[&str]) -> Result<String, Failure> {
    let output = Command::new("systemctl").args(arguments).stdin(Stdio::null()).output();
    let output = output.doing(|| "run systemctl".to_owned())?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Failure::new(format!("systemctl {}: {said}", arguments.join(" "))))
}

fn not_started(how: &str) -> Failure {
    Failure::new(format!("the host agent did not come up ({how}); it says why: journalctl -u {UNIT_NAME} -n 50"))
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
