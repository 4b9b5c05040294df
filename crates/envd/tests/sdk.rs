//! The published SDKs as clients of one envd, at the port that they expect in debug mode. That port is fixed, so each test has a network
//! of its own; the scripts below `sdk/` say what is right.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use testkit::sdk::{self, run};

/// Tells the inner run of a test that it has its network, and where its SDK lies.
const INSIDE: &str = "WRENN_TEST_SDK";
/// A script is given up after so many seconds; the slowest takes about ten on an idle machine.
const SCRIPT_SECONDS_MAX: &str = "90";
/// The oldest that the SDKs run on.
const NODE_OLDEST: u32 = 20;

#[test]
fn python_2_45_1() {
    python("python_2_45_1", "2.45.1");
}

#[test]
fn python_2_63_0() {
    python("python_2_63_0", "2.63.0");
}

#[test]
fn javascript_2_45_0() {
    javascript("javascript_2_45_0", "2.45.0");
}

#[test]
fn javascript_2_51_0() {
    javascript("javascript_2_51_0", "2.51.0");
}

fn python(test: &str, version: &str) {
    let Some(sdk) = inside(test, || Some(sdk::python(&format!("e2b=={version}"), &[]))) else { return };
    let _envd = Envd::start();
    for script in ["commands.py", "terminal.py", "files.py"] {
        // The checkout stays as it is.
        let mut command = client(&sdk.join("bin/python"));
        run(command.env("PYTHONDONTWRITEBYTECODE", "1").arg(scripts().join(script)));
    }
}

fn javascript(test: &str, version: &str) {
    let look = || {
        has_node().map_err(|why| eprintln!("skipped: {test}: {why}")).ok()?;
        Some(sdk::javascript(&format!("e2b@{version}")))
    };
    let Some(sdk) = inside(test, look) else { return };
    // A module is looked for beside and above who imports it.
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(sdk.join("node_modules"), dir.path().join("node_modules")).unwrap();
    let _envd = Envd::start();
    for script in ["commands.mjs", "files.mjs"] {
        let own = dir.path().join(script);
        fs::copy(scripts().join(script), &own).unwrap();
        run(client(Path::new("node")).arg(own));
    }
}

/// Debian 12's own is too old, and not everybody wants another: without one these tests say so and end.
fn has_node() -> Result<(), String> {
    let version = Command::new("node").arg("--version").output().map_err(|_| "there is no node".to_owned())?;
    let version = String::from_utf8_lossy(&version.stdout).trim().to_owned();
    let major = version.trim_start_matches('v').split('.').next().and_then(|it| it.parse().ok()).unwrap_or(0);
    if major < NODE_OLDEST {
        return Err(format!("node is {version}, the SDK needs {NODE_OLDEST} or newer"));
    }
    Command::new("npm").arg("--version").output().map(drop).map_err(|_| "there is no npm".to_owned())
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk")
}

/// A command that sees neither a proxy nor a real sandbox.
fn client(program: &Path) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", SCRIPT_SECONDS_MAX]).arg(program);
    command.envs([("E2B_DEBUG", "true"), ("E2B_API_KEY", "e2b_00")]);
    for name in ["http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(name).env_remove(name.to_uppercase());
    }
    command
}

/// No network but the own one. And what the machine's owner has every login shell do is not done: commands here are killed in the middle of
/// it, and locks that it holds would stay.
const LONELY: &str = r#"ip link set lo up
for file in .profile .bash_profile .bash_login .bashrc; do
    [ ! -e "$HOME/$file" ] || mount --bind /dev/null "$HOME/$file"
done
exec "$@""#;

/// Outside: finds the SDK, runs the test of this name again in a network of its own, and is `None`. Inside: where the SDK lies.
fn inside(test: &str, find: impl FnOnce() -> Option<PathBuf>) -> Option<PathBuf> {
    if let Some(sdk) = std::env::var_os(INSIDE) {
        return Some(sdk.into());
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: {test}: not root");
        return None;
    }
    // Before the network is gone.
    let sdk = find()?;
    run(Command::new("unshare")
        .args(["--net", "--mount", "sh", "-ec", LONELY, "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, sdk));
    None
}

struct Envd(std::process::Child);

impl Envd {
    /// At the port that the SDKs expect.
    fn start() -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_envd"))
            .args(["--standalone", "--port", &api::guest::PORT.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It says its port when it listens.
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line.trim(), api::guest::PORT.to_string());
        Self(child)
    }
}

impl Drop for Envd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
