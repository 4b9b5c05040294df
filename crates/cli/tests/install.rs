//! What `wrenn host install` and `wrenn control-plane install` put into place, below a directory that stands for a machine.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

const UNIT: &str = "etc/systemd/system/wrenn-agent.service";

fn install(root: &Path, arguments: &[&str]) -> Output {
    installed("host", root, arguments)
}

fn installed(what: &str, root: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_wrenn"))
        .args([what, "install", "--json", "--root"])
        .arg(root)
        .args(arguments)
        .env_remove("WRENN_REGISTRATION_TOKEN")
        .env_remove("WRENN_CP_URL")
        .env_remove("WRENN_DIR")
        .env_remove("DATABASE_URL")
        .env_remove("WRENN_CP_LISTEN_ADDR")
        .env_remove("WRENN_HOST_NETWORKS")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn words(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

const FIRST: [&str; 6] = ["--cp-url", "http://10.0.0.1:8000", "--address", "10.0.0.5:50051", "--register", "token-1"];

#[test]
fn settings_service_and_token_are_put_into_place_and_kept_when_it_is_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let data = root.join("data");
    let at = format!("WRENN_DIR={}", data.display());
    let more = ["--set", &at, "--set", "WRENN_VMM=qemu", "--set", "WRENN_LOG=two words \"quoted\""];
    let done = install(root, &[&FIRST[..4], &more].concat());
    assert!(done.status.success() && words(&done).contains("wrenn host add"), "{}", words(&done));
    let done = install(root, &[&FIRST[..], &more].concat());
    assert!(done.status.success() && !words(&done).contains("wrenn host add"), "{}", words(&done));
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(report["running"], false);
    assert!(report["next"].as_str().unwrap().contains("systemctl enable --now wrenn-agent.service"), "{report}");
    for file in report["files"].as_array().unwrap() {
        assert!(root.join(file.as_str().unwrap().trim_start_matches('/')).is_file(), "{file}");
    }
    let settings = fs::read_to_string(root.join("etc/wrenn/agent.env")).unwrap();
    for line in [
        "WRENN_CP_URL=\"http://10.0.0.1:8000\"",
        "WRENN_HOST_ADDRESS=\"10.0.0.5:50051\"",
        "WRENN_LOG=\"two words \\\"quoted\\\"\"",
        "WRENN_VMM=\"qemu\"",
    ] {
        assert!(settings.lines().any(|it| it == line), "{line} is not in\n{settings}");
    }
    let token = root.join("etc/wrenn/registration.env");
    assert_eq!(fs::read_to_string(&token).unwrap(), "WRENN_REGISTRATION_TOKEN=token-1\n");
    for secret in ["etc/wrenn/agent.env", "etc/wrenn/registration.env"] {
        assert_eq!(mode(&root.join(secret)), 0o600, "{secret}");
    }
    assert_eq!(mode(&root.join("usr/local/bin/wrenn-agent")), 0o755);
    let unit = fs::read_to_string(root.join(UNIT)).unwrap();
    assert!(unit.contains("ExecStart=/usr/local/bin/wrenn-agent --address ${WRENN_HOST_ADDRESS}"), "{unit}");
    assert!(unit.contains("KillMode=process") && unit.contains("WatchdogSec=30"));

    assert!(settings.contains(&format!("WRENN_DIR=\"{}\"", data.display())), "{settings}");

    // Another VMM: all else stays, also the directory and a token that nobody has used yet.
    let again = install(root, &["--set", "WRENN_VMM=firecracker"]);
    assert!(again.status.success(), "{}", words(&again));
    let changed = fs::read_to_string(root.join("etc/wrenn/agent.env")).unwrap();
    assert_eq!(changed, settings.replace("WRENN_VMM=\"qemu\"", "WRENN_VMM=\"firecracker\""));
    assert!(token.exists());
    // Of a host that has joined the token is spent.
    fs::create_dir(&data).unwrap();
    fs::write(data.join("host-token"), "").unwrap();
    assert!(install(root, &[]).status.success());
    assert!(!token.exists());
    assert_eq!(fs::read_to_string(root.join("etc/wrenn/agent.env")).unwrap(), changed);
}

#[test]
fn without_another_word_a_host_lies_where_its_manual_says() {
    let dir = tempfile::tempdir().unwrap();
    assert!(install(dir.path(), &FIRST).status.success());
    let settings = fs::read_to_string(dir.path().join("etc/wrenn/agent.env")).unwrap();
    assert!(settings.contains("WRENN_DIR=\"/var/lib/wrenn\""), "{settings}");
}

#[test]
fn disks_by_device_mapper_have_their_module_and_udev_looks_away() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let (module, rules) = ("etc/modules-load.d/wrenn-device-mapper.conf", "etc/udev/rules.d/11-wrenn.rules");
    assert!(install(root, &FIRST).status.success());
    assert!(!root.join(module).exists() && !root.join(rules).exists());
    let done = install(root, &["--set", "WRENN_DISK=device-mapper"]);
    assert!(done.status.success(), "{}", words(&done));
    assert!(words(&done).contains("device-mapper"), "the kernel is not looked at: {}", words(&done));
    assert!(fs::read_to_string(root.join(module)).unwrap().contains("dm_snapshot"));
    let rules = fs::read_to_string(root.join(rules)).unwrap();
    assert!(rules.contains("ATTR{dm/name}==\"wrenn-*\"") && rules.contains("pool/sandboxes"), "{rules}");
    let told = install(root, &["--set", "WRENN_DISK=qcow2"]);
    assert!(words(&told).contains("give reflink or device-mapper"), "{}", words(&told));
}

#[test]
fn wrong_usage_is_told_and_changes_nothing() {
    let with = |arguments: &[&'static str]| [&FIRST[..4], arguments].concat();
    for (arguments, told) in [
        (vec![], "needed the first time: --cp-url, --address"),
        (vec!["--address", "10.0.0.5:50051"], "needed the first time: --cp-url"),
        (vec!["--cp-url", "10.0.0.1:8000", "--address", "10.0.0.5:50051"], "no http or https URL"),
        (vec!["--cp-url", "http://10.0.0.1", "--address", "10.0.0.5"], "HOST:PORT"),
        (vec!["--cp-url", "http://10.0.0.1", "--address", ":50051"], "HOST:PORT"),
        (with(&["--set", "PATH=/tmp"]), "begins with WRENN_"),
        (with(&["--set", "WRENN_DIR=data"]), "no absolute path"),
        (with(&["--set", "WRENN_VMM"]), "NAME=VALUE"),
        (with(&["--set", "WRENN_VM=qemu"]), "is WRENN_VMM meant?"),
        (with(&["--set", "WRENN_VMM=qemu\nLD_PRELOAD=x"]), "control characters"),
        (with(&["--register", "a'; rm -rf /'"]), "registration token"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let refused = install(dir.path(), &arguments);
        assert_eq!(refused.status.code(), Some(2), "{arguments:?}: {}", words(&refused));
        assert!(words(&refused).contains(told), "{arguments:?}: {}", words(&refused));
        assert!(!dir.path().join("etc/wrenn/agent.env").exists(), "{arguments:?}");
    }
}

const CONTROL_PLANE: &str = "etc/wrenn/control-plane.env";

fn control_plane(root: &Path, arguments: &[&str]) -> Output {
    installed("control-plane", root, arguments)
}

#[test]
fn a_control_plane_is_put_into_place_and_kept_when_it_is_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let first = ["--database-url", "postgres://wrenn:p$ss@db.example:5432/wrenn", "--host-networks", "10.0.0.0/8"];
    let done = control_plane(root, &first);
    assert!(done.status.success(), "{}", words(&done));
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((&report["running"], &report["url"]), (&false.into(), &"http://127.0.0.1:8000/".into()));
    assert!(report["next"].as_str().unwrap().contains("systemctl enable --now wrenn-cp.service"), "{report}");
    for file in report["files"].as_array().unwrap() {
        assert!(root.join(file.as_str().unwrap().trim_start_matches('/')).is_file(), "{file}");
    }
    let settings = fs::read_to_string(root.join(CONTROL_PLANE)).unwrap();
    let lines: Vec<&str> = settings.lines().skip(1).collect();
    assert_eq!(
        lines,
        [
            "DATABASE_URL=\"postgres://wrenn:p\\$ss@db.example:5432/wrenn\"",
            "WRENN_CP_LISTEN_ADDR=\":8000\"",
            "WRENN_HOST_NETWORKS=\"10.0.0.0/8\"",
        ]
    );
    assert_eq!(mode(&root.join(CONTROL_PLANE)), 0o600);
    let unit = fs::read_to_string(root.join("etc/systemd/system/wrenn-cp.service")).unwrap();
    assert!(unit.contains("ExecStart=/usr/local/bin/wrenn-cp\n"), "{unit}");
    // The unit reads what was written.
    assert!(unit.contains(&format!("EnvironmentFile=/{CONTROL_PLANE}\n")), "{unit}");

    let again = control_plane(root, &["--listen", "[::1]:9000"]);
    assert!(again.status.success(), "{}", words(&again));
    let changed = fs::read_to_string(root.join(CONTROL_PLANE)).unwrap();
    assert_eq!(changed, settings.replace("\":8000\"", "\"[::1]:9000\""));
}

#[test]
fn wrong_usage_of_a_control_plane_is_told_and_changes_nothing() {
    let with = |arguments: &[&'static str]| [&["--database-url", "postgres://u:secret@h/d"][..], arguments].concat();
    for (arguments, told) in [
        (vec![], "--database-url or --local-database"),
        (vec!["--database-url", "mysql://u:secret@h/d"], "postgres://USER:PASSWORD@HOST:5432/DATABASE"),
        (vec!["--database-url", "h/d"], "postgres://USER:PASSWORD@HOST:5432/DATABASE"),
        (with(&["--local-database"]), "two databases"),
        (with(&["--listen", "8000"]), "ADDR:PORT"),
        (with(&["--listen", "127.0.0.1:0"]), "give a port"),
        (with(&["--set", "DATABASE_URL=x"]), "begins with WRENN_"),
        (with(&["--host-networks", "10.0.0.0/8\nLD_PRELOAD=x"]), "control characters"),
        (with(&["--dir", "/srv/wrenn"]), "/var/lib/wrenn-cp"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let refused = control_plane(dir.path(), &arguments);
        assert_eq!(refused.status.code(), Some(2), "{arguments:?}: {}", words(&refused));
        assert!(words(&refused).contains(told), "{arguments:?}: {}", words(&refused));
        assert!(!words(&refused).contains("secret"), "{}", words(&refused));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{arguments:?}");
    }
}

/// systemd reads the units as they are meant: a name that it does not know would be a line that does nothing.
#[test]
fn systemd_understands_the_units() {
    if !Path::new("/usr/bin/systemd-analyze").exists() {
        println!("SKIPPED: there is no systemd-analyze here");
        return;
    }
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/systemd");
    let dir = tempfile::tempdir().unwrap();
    for name in ["wrenn-agent.service", "wrenn-cp.service"] {
        let unit = fs::read_to_string(deploy.join(name)).unwrap();
        // The programs are not installed where this runs.
        let unit = unit.replace("/usr/bin/wrenn-agent", "/bin/true").replace("/usr/bin/wrenn-cp", "/bin/true");
        let at = dir.path().join(name);
        fs::write(&at, unit).unwrap();
        let verified = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&at).output().unwrap();
        let said: Vec<String> =
            words(&verified).lines().filter(|line| line.contains(name)).map(str::to_owned).collect();
        assert!(said.is_empty(), "{said:?}");
    }
}
