//! A program as a service of this machine: where it lies, its unit, its start. What `host install` and `control-plane install` share.
//!
//! A package brings program and unit. What was built here is copied to where programs of this machine lie, with a unit that says so.

mod files;
mod settings;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub use files::Files;
pub use settings::Settings;

use crate::failure::{Doing as _, Failure};
use crate::platform::layout;
use crate::platform::preflight::Finding;

/// Where programs go that were built on this machine.
const LOCAL: &str = "usr/local/bin";
/// Where a package has programs and units.
const PACKAGED: &str = "usr/bin";
const PACKAGED_UNITS: &str = "usr/lib/systemd/system";
/// Goes before those of packages.
const UNITS: &str = "etc/systemd/system";
const LOOK_EVERY: Duration = Duration::from_millis(200);

pub struct Service {
    pub program: &'static str,
    /// For people.
    pub title: &'static str,
    /// The unit's text, as the package has it: it names the program in `/usr/bin`.
    pub unit: &'static str,
    /// Longest time to the first word that it serves.
    pub start_max: Duration,
}

impl Service {
    pub fn unit_name(&self) -> String {
        format!("{}.service", self.program)
    }

    fn packaged(&self) -> String {
        format!("/{PACKAGED}/{}", self.program)
    }

    /// Puts program and unit into place, where no package has done it, and says how the program is called.
    pub fn place(&self, files: &mut Files) -> Result<String, Failure> {
        let present = layout::program(self.program)?;
        // A root that stands for a machine may have the package in it.
        let root = std::fs::canonicalize(files.root()).unwrap_or_else(|_| files.root().to_owned());
        let below = [root.as_path(), Path::new("/")].into_iter().find_map(|root| present.strip_prefix(root).ok());
        let is_in = |folder: &str| below.and_then(Path::parent) == Some(Path::new(folder));
        let program = if is_in(PACKAGED) || is_in(LOCAL) {
            format!("/{}", below.unwrap_or(&present).display())
        } else {
            for name in [self.program, "wrenn"] {
                let from = layout::program(name)?;
                let bytes = std::fs::read(&from).doing(|| format!("read {}", from.display()))?;
                files.write(&format!("{LOCAL}/{name}"), &bytes, 0o755)?;
            }
            format!("/{LOCAL}/{}", self.program)
        };
        if !self.is_packaged(&program, files.root()) {
            let unit = self.unit.replace(&self.packaged(), &program);
            files.write(&format!("{UNITS}/{}", self.unit_name()), unit.as_bytes(), 0o644)?;
        }
        Ok(program)
    }

    /// Where it lies on this machine; what was built here goes before a package's, as its unit does.
    pub fn installed(&self) -> Option<PathBuf> {
        let places = [LOCAL, PACKAGED].map(|folder| Path::new("/").join(folder).join(self.program));
        places.into_iter().find(|place| place.is_file())
    }

    fn is_packaged(&self, program: &str, root: &Path) -> bool {
        let unit = format!("{PACKAGED_UNITS}/{}", self.unit_name());
        program == self.packaged() && (root.join(&unit).exists() || Path::new("/").join(&unit).exists())
    }

    /// A unit of before a package came, or somebody's own: it is not touched, and the package's does nothing meanwhile.
    pub fn hidden(&self, program: &str, root: &Path) -> Option<Finding> {
        let own = root.join(UNITS).join(self.unit_name());
        (self.is_packaged(program, root) && own.exists()).then(|| {
            Finding::warn(
                &self.unit_name(),
                format!("{} goes before the package's", own.display()),
                "remove it, unless it is meant to: an upgrade of the package does not change it",
            )
        })
    }

    /// Starts the service anew, also one that runs: its settings may have changed. Waits until it says that it serves.
    pub async fn start(&self) -> Result<(), Failure> {
        let unit = self.unit_name();
        systemctl(&["daemon-reload"])?;
        systemctl(&["enable", &unit])?;
        let before = self.state()?;
        systemctl(&["restart", "--no-block", &unit])?;
        let deadline = Instant::now() + self.start_max;
        loop {
            let now = self.state()?;
            // Each start has another number; until then it is the state of before.
            match now.active.as_str() {
                "active" if now.invocation != before.invocation => return Ok(()),
                "failed" if now.invocation != before.invocation => return Err(self.not_started("it ended")),
                _ if Instant::now() > deadline => return Err(self.not_started("it does not serve")),
                _ => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    pub fn not_started(&self, how: &str) -> Failure {
        let (title, unit) = (self.title, self.unit_name());
        Failure::new(format!("the {title} did not come up ({how}); it says why: journalctl -u {unit} -n 50"))
    }

    /// For who starts nothing now.
    pub fn later(&self) -> String {
        format!("start it: systemctl daemon-reload && systemctl enable --now {}", self.unit_name())
    }

    fn state(&self) -> Result<State, Failure> {
        let told = systemctl(&["show", "--property=ActiveState,InvocationID", &self.unit_name()])?;
        let value = |name: &str| told.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().to_owned();
        Ok(State { active: value("ActiveState="), invocation: value("InvocationID=") })
    }
}

struct State {
    active: String,
    invocation: String,
}

pub fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// What changes the system is for root.
pub fn only_root() -> Result<(), Failure> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(Failure::new("this is not root: run it with sudo, because it puts a service of the system into place"))
}

/// A user of the system for a service, when there is none of that name.
pub fn make_user(name: &str, home: &str) -> Result<(), Failure> {
    let doing = || format!("make the user {name}");
    if nix::unistd::User::from_name(name).doing(doing)?.is_some() {
        return Ok(());
    }
    let mut useradd = Command::new("useradd");
    useradd.args(["--system", "--user-group", "--no-create-home", "--home-dir", home]);
    let output = useradd.args(["--shell", "/usr/sbin/nologin", name]).stdin(Stdio::null()).output().doing(doing)?;
    if output.status.success() {
        return Ok(());
    }
    Err(Failure::new(format!("{}: {}", doing(), String::from_utf8_lossy(&output.stderr).trim())))
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
