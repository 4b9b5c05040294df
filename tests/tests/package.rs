//! The Debian package: what is in it, and what dpkg does with it on a machine that has nothing of it yet: installs, upgrades, removes,
//! purges. It is packed of the programs under test, as `make deb` packs the release programs.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use whole_machine::bare_machine::BareMachine;
use whole_machine::platform::program;

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// A start brings the database to its version first.
const START_MAX: Duration = Duration::from_secs(30);
const PROGRAMS: [&str; 3] = ["wrenn", "wrenn-agent", "wrenn-cp"];
const UNITS: [&str; 2] = ["wrenn-agent.service", "wrenn-cp.service"];

fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

struct Package {
    scratch: TempDir,
    deb: PathBuf,
}

impl Package {
    fn pack() -> Self {
        let scratch = tempfile::Builder::new().prefix("wrenn-test-package-").tempdir_in("/var/tmp").unwrap();
        // Where cargo-deb looks for release programs.
        let target = scratch.path().join("target");
        std::fs::create_dir_all(target.join("release")).unwrap();
        for name in PROGRAMS {
            symlink(program(name), target.join("release").join(name)).unwrap();
        }
        let cargo_deb = std::env::var_os("WRENN_CARGO_DEB").unwrap_or_else(|| "cargo-deb".into());
        let mut packing = Command::new(&cargo_deb);
        packing.args(["deb", "--no-build", "--fast", "--locked", "--offline", "--package", "cli", "--output"]);
        packing.arg(scratch.path()).env("CARGO_TARGET_DIR", &target).current_dir(checkout());
        let packed = packing.output().unwrap_or_else(|e| {
            panic!("{}: {e}: `make check` makes cargo-deb and names it by WRENN_CARGO_DEB", cargo_deb.display())
        });
        let told = String::from_utf8_lossy(&packed.stderr);
        assert!(packed.status.success() && !told.contains("warning"), "{told}");
        let deb = scratch.path().join(format!("wrenn_{VERSION}_amd64.deb"));
        assert!(deb.is_file(), "{packed:?}");
        Self { scratch, deb }
    }

    fn field(&self, name: &str) -> String {
        run(Command::new("dpkg-deb").arg("--field").arg(&self.deb).arg(name)).trim().to_owned()
    }

    fn lists(&self, field: &str) -> Vec<String> {
        self.field(field).split(", ").map(|entry| entry.split(' ').next().unwrap_or_default().to_owned()).collect()
    }

    /// Mode, owner and path of each entry.
    fn entries(&self) -> Vec<(String, String, String)> {
        let listed = run(Command::new("dpkg-deb").arg("--contents").arg(&self.deb));
        let entry = |line: &str| {
            let mut words = line.split_whitespace();
            let (mode, owner) = (words.next().unwrap().to_owned(), words.next().unwrap().to_owned());
            (mode, owner, words.next_back().unwrap().trim_start_matches('.').to_owned())
        };
        listed.lines().map(entry).collect()
    }

    /// The same programs under another version.
    fn as_version(&self, version: &str) -> PathBuf {
        let tree = self.scratch.path().join(version);
        run(Command::new("dpkg-deb").arg("-R").arg(&self.deb).arg(&tree));
        let control = tree.join("DEBIAN/control");
        let text = std::fs::read_to_string(&control).unwrap();
        let changed = text.replace(&format!("Version: {VERSION}\n"), &format!("Version: {version}\n"));
        assert_ne!(changed, text);
        std::fs::write(control, changed).unwrap();
        let deb = tree.with_extension("deb");
        run(Command::new("dpkg-deb").args(["--root-owner-group", "-Znone", "-b"]).arg(&tree).arg(&deb));
        deb
    }
}

fn holds_what_a_machine_needs(package: &Package) {
    assert_eq!(package.field("Package"), "wrenn");
    assert_eq!(package.field("Version"), VERSION);
    assert_eq!(package.field("Architecture"), "amd64");
    assert!(package.field("Maintainer").contains('@') && !package.field("Description").is_empty());
    // What the host agent calls (`wrenn doctor` names it too), and the library that every program is linked with.
    for needed in ["ca-certificates", "e2fsprogs", "iproute2", "libc6", "mount", "nftables", "xfsprogs"] {
        assert!(package.lists("Depends").contains(&needed.to_owned()), "{needed}: {}", package.field("Depends"));
    }
    assert!(package.lists("Recommends").contains(&"qemu-system-x86".to_owned()), "{}", package.field("Recommends"));
    assert_eq!(package.lists("Suggests"), ["postgresql"]);

    let entries = package.entries();
    let mut found = BTreeSet::new();
    for (mode, owner, path) in &entries {
        assert_eq!(owner, "0/0", "{path}");
        let wanted = match path.as_str() {
            path if path.ends_with('/') => "drwxr-xr-x",
            path if path.starts_with("/usr/bin/") => "-rwxr-xr-x",
            _ => "-rw-r--r--",
        };
        assert_eq!(mode, wanted, "{path}");
        // Settings are made on the machine, by its own install commands.
        assert!(path == "/" || path.starts_with("/usr/"), "{path}");
        if !path.ends_with('/') && !path.starts_with("/usr/share/doc/wrenn/") {
            found.insert(path.trim_start_matches("/usr/").to_owned());
        }
    }
    let rules = std::fs::read_dir(checkout().join("deploy/udev")).into_iter().flatten().flatten();
    let expected: BTreeSet<String> = (PROGRAMS.iter().map(|name| format!("bin/{name}")))
        .chain(UNITS.iter().map(|name| format!("lib/systemd/system/{name}")))
        .chain(rules.map(|rule| format!("lib/udev/rules.d/{}", rule.file_name().to_string_lossy())))
        .collect();
    assert_eq!(found, expected);
    // What the package tells people to read is in it.
    let documents: BTreeSet<&str> =
        entries.iter().filter_map(|(_, _, path)| path.strip_prefix("/usr/share/doc/wrenn/")).collect();
    for name in ["README.md", "copyright", "env.example"] {
        assert!(documents.contains(name), "{name}");
    }
    let readme = std::fs::read_to_string(checkout().join("README.md")).unwrap();
    for linked in readme.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target) {
        assert!(linked.contains(':') || linked == ".env.example" || documents.contains(linked), "{linked}");
    }
}

fn copy_to(machine: &BareMachine, deb: &Path) -> String {
    let name = deb.file_name().unwrap().to_str().unwrap();
    std::fs::copy(deb, machine.root.join(name)).unwrap();
    format!("/{name}")
}

/// What it depends on is there, but this dpkg has not put it there.
fn install(machine: &BareMachine, deb: &str) -> String {
    machine.said("dpkg", &["--force-depends", "--install", deb])
}

fn status(machine: &BareMachine) -> String {
    let output = machine.run("dpkg-query", &["--show", "--showformat=${db:Status-Abbrev}${Version}", "wrenn"]);
    String::from_utf8(output.stdout).unwrap()
}

const HOST: [&str; 8] =
    ["host", "install", "--json", "--force", "--cp-url", "http://10.0.0.1:8000", "--address", "10.0.0.5:50051"];

/// It takes what the package has put there for what it is.
fn becomes_a_host(machine: &BareMachine) {
    let report: Value = serde_json::from_str(&machine.said("wrenn", &[&HOST[..], &["--no-start"]].concat())).unwrap();
    let files: Vec<&str> = report["files"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert_eq!(
        files,
        ["/etc/wrenn/agent.env", "/etc/modules-load.d/wrenn.conf", "/etc/sysctl.d/90-wrenn.conf"],
        "no second program and no second unit"
    );
    assert_eq!(machine.systemctl_calls(), Vec::<String>::new());
    // Looked at from outside, below its root, it is the same.
    let output = Command::new(machine.root.join("usr/bin/wrenn"))
        .args(HOST)
        .arg("--root")
        .arg(&machine.root)
        .env_remove("WRENN_DIR")
        .env_remove("WRENN_REGISTRATION_TOKEN")
        .output()
        .unwrap();
    let outside: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    assert_eq!(outside["files"], report["files"]);
    // One that has joined is started.
    machine.put("var/lib/wrenn/host-token", "{}", 0o600);
    let report: Value = serde_json::from_str(&machine.said("wrenn", &HOST)).unwrap();
    assert_eq!(report["running"], true, "{report}");
    let restarted = "restart --no-block wrenn-agent.service";
    assert_eq!(machine.systemctl_calls(), ["daemon-reload", "enable wrenn-agent.service", restarted]);
    assert!(!machine.root.join("usr/local/bin/wrenn-agent").exists());
    // A unit of before the package came is told, because it goes before the package's.
    machine.put("etc/systemd/system/wrenn-agent.service", "[Service]\n", 0o644);
    let told = machine.said("wrenn", &[&HOST[..], &["--no-start"]].concat());
    assert!(told.contains("goes before the package's"), "{told}");
    std::fs::remove_file(machine.root.join("etc/systemd/system/wrenn-agent.service")).unwrap();
}

const CONTROL_PLANE: [&str; 3] = ["control-plane", "install", "--json"];
const DATABASE_OF_NOBODY: &str = "postgres://nobody@localhost/none?host=/var/run/postgresql";

fn words(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// From a machine that has PostgreSQL to a control plane that gives tokens to hosts.
fn becomes_a_control_plane(machine: &BareMachine) {
    let install = |arguments: &[&str]| machine.run("wrenn", &[&CONTROL_PLANE[..], arguments].concat());
    let settings = machine.root.join("etc/wrenn/control-plane.env");
    let refused = |arguments: &[&str], told: &str| {
        let output = install(arguments);
        assert!(!output.status.success() && words(&output).contains(told), "{arguments:?}: {}", words(&output));
        assert!(!settings.exists(), "{arguments:?}");
    };
    refused(&["--local-database"], "systemctl start postgresql");
    machine.start_postgres();
    refused(&["--database-url", DATABASE_OF_NOBODY], "DATABASE_URL: no database answers");
    refused(&["--local-database", "--host-networks", "10.0.0.0/33"], "WRENN_HOST_NETWORKS");
    refused(&["--local-database", "--set", "WRENN_SECRET=short"], "WRENN_SECRET: is not 64 hex digits");
    let taken = TcpListener::bind("127.0.0.1:8001").unwrap();
    refused(&["--local-database", "--listen", "127.0.0.1:8001"], "cannot listen on 127.0.0.1:8001");
    drop(taken);
    let nobody = ["--reuid", "65534", "--clear-groups", "--", "wrenn", "control-plane", "install", "--local-database"];
    let output = machine.run("setpriv", &nobody);
    assert!(words(&output).contains("not root"), "{}", words(&output));
    assert_eq!(machine.systemctl_calls(), Vec::<String>::new());

    machine.put("systemctl.starts", "wrenn-cp.service\n", 0o644);
    let first = install(&["--local-database", "--listen", "127.0.0.1:8000"]);
    let report: Value = serde_json::from_slice(&first.stdout).unwrap_or_else(|e| panic!("{e}: {}", words(&first)));
    assert_eq!((&report["running"], &report["files"]), (&json!(true), &json!(["/etc/wrenn/control-plane.env"])));
    assert_eq!(settings.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
    let restarted = "restart --no-block wrenn-cp.service";
    assert_eq!(machine.systemctl_calls(), ["daemon-reload", "enable wrenn-cp.service", restarted]);
    // Root of this machine is an administrator without another word.
    let host: Value = serde_json::from_str(&machine.said("wrenn", &["host", "add", "--json"])).unwrap();
    assert!(host["registration_token"].as_str().is_some_and(|token| !token.is_empty()), "{host}");
    let told = machine.said("wrenn", &["host", "add"]);
    assert!(told.contains("WRENN_CP_URL=http://CONTROL-PLANE:8000 "), "{told}");
    let key: Value = serde_json::from_str(&machine.said("wrenn", &["key", "create", "--json"])).unwrap();
    let listed = machine
        .command("wrenn")
        .args(["sandbox", "list", "--json"])
        .env("WRENN_API_KEY", key["key"].as_str().unwrap())
        .output();
    assert!(listed.as_ref().unwrap().status.success(), "{}", words(&listed.unwrap()));

    // Again, while it runs: what is given changes, and it is the same platform.
    let before = std::fs::read_to_string(&settings).unwrap();
    let again = install(&["--set", "WRENN_LOG=debug"]);
    assert!(again.status.success(), "{}", words(&again));
    assert_eq!(std::fs::read_to_string(&settings).unwrap(), before + "WRENN_LOG=\"debug\"\n");
    let hosts: Value = serde_json::from_str(&machine.said("wrenn", &["host", "list", "--json"])).unwrap();
    assert_eq!(hosts[0]["id"], host["host"]["id"], "{hosts}");
    let journal = std::fs::read_to_string(machine.root.join("journal")).unwrap();
    assert_eq!(journal.matches("made the administrator").count(), 1, "{journal}");
    machine.systemctl_calls();
}

/// Without systemd a person starts it, by what is printed.
fn starts_by_hand(machine: &BareMachine) {
    let (systemd, aside) = (machine.root.join("run/systemd"), machine.root.join("run/no-systemd"));
    std::fs::rename(&systemd, &aside).unwrap();
    let ends = "pid=$(cat /run/wrenn-cp.service.pid); kill $pid; while readlink /proc/$pid/exe; do sleep 0.1; done";
    machine.said("sh", &["-ec", ends]);
    let report: Value = serde_json::from_str(&machine.said("wrenn", &CONTROL_PLANE)).unwrap();
    assert_eq!(report["running"], false);
    let (_, lines) = report["next"].as_str().unwrap().split_once("By hand:\n").unwrap();
    let mut program = machine.command("sh").args(["-ec", lines]).stderr(Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    let answers = || {
        let versions: Value = serde_json::from_str(&machine.said("wrenn", &["version", "--json"])).unwrap();
        versions["control_plane"] == VERSION
    };
    while !answers() {
        assert!(began.elapsed() < START_MAX, "{lines}");
        std::thread::sleep(Duration::from_millis(50));
    }
    machine.said("sh", &["-ec", "kill $(pidof wrenn-cp)"]);
    program.wait().unwrap();
    std::fs::rename(&aside, &systemd).unwrap();
    assert_eq!(machine.systemctl_calls(), Vec::<String>::new());
}

#[test]
fn a_machine_gets_it_upgrades_it_and_is_rid_of_it() {
    let package = Package::pack();
    holds_what_a_machine_needs(&package);
    let machine = BareMachine::new();
    let first = copy_to(&machine, &package.deb);
    let second = copy_to(&machine, &package.as_version("9.0"));

    // Nothing is started.
    install(&machine, &first);
    assert_eq!(status(&machine), format!("ii {VERSION}"));
    assert_eq!(machine.systemctl_calls(), ["daemon-reload"]);
    assert!(!machine.root.join("etc/wrenn").exists());
    for name in PROGRAMS {
        assert_eq!(machine.said(name, &["--version"]).trim(), format!("{name} {VERSION}"));
    }
    for script in ["postinst", "prerm", "postrm"] {
        let place = machine.root.join(format!("var/lib/dpkg/info/wrenn.{script}"));
        assert_eq!(place.metadata().unwrap().permissions().mode() & 0o777, 0o755, "{script}");
        run(Command::new("sh").arg("-n").arg(place));
    }
    becomes_a_host(&machine);
    becomes_a_control_plane(&machine);
    starts_by_hand(&machine);
    let settings = std::fs::read(machine.root.join("etc/wrenn/agent.env")).unwrap();

    // What runs is started anew, and what is configured stays.
    let restarts = ["daemon-reload", "try-restart wrenn-cp.service", "try-restart wrenn-agent.service"];
    install(&machine, &second);
    assert_eq!(status(&machine), "ii 9.0");
    assert_eq!(machine.systemctl_calls(), restarts);
    assert_eq!(std::fs::read(machine.root.join("etc/wrenn/agent.env")).unwrap(), settings);
    // A service that does not come up is told, and the package is whole.
    machine.put("systemctl.fails", "", 0o644);
    let told = install(&machine, &second);
    assert!(told.contains("wrenn-agent.service does not come up"), "{told}");
    assert_eq!(
        (status(&machine), machine.systemctl_calls()),
        ("ii 9.0".to_owned(), restarts.map(str::to_owned).to_vec())
    );

    // A removal that is broken off leaves the service as it was.
    let postinst = "/var/lib/dpkg/info/wrenn.postinst";
    machine.said(postinst, &["abort-remove"]);
    let both = ["enable --now wrenn-cp.service", "enable --now wrenn-agent.service"];
    assert_eq!(machine.systemctl_calls(), both);

    let told = machine.said("dpkg", &["--remove", "wrenn"]);
    assert!(told.contains("sandboxes of this host are not ended"), "{told}");
    assert!(told.contains("wrenn-cp.service is not stopped"), "systemctl still fails: {told}");
    let stops = ["disable --now wrenn-agent.service", "disable --now wrenn-cp.service", "daemon-reload"];
    assert_eq!(machine.systemctl_calls(), stops);
    assert!(!machine.root.join("usr/bin/wrenn").exists() && machine.root.join("etc/wrenn/agent.env").exists());
    let told = machine.said("dpkg", &["--purge", "wrenn"]);
    for data in ["/var/lib/wrenn ", "/var/lib/wrenn-cp "] {
        assert!(told.contains(&format!("{data}is left as it is")), "{told}");
    }
    assert!(!machine.root.join("etc/wrenn").exists() && machine.root.join("var/lib/wrenn/host-token").exists());
    assert_eq!(machine.systemctl_calls(), ["daemon-reload"]);
}

/// In a container or an image that is being made.
#[test]
fn without_systemd_it_comes_and_goes_as_well() {
    let machine = BareMachine::new();
    std::fs::remove_dir_all(machine.root.join("run/systemd")).unwrap();
    let scripts = checkout().join("deploy/debian");
    for (script, arguments) in [
        ("postinst", ["configure", ""]),
        ("postinst", ["configure", "0.0.1"]),
        ("postinst", ["abort-remove", ""]),
        ("postinst", ["abort-upgrade", "0.0.1"]),
        ("prerm", ["upgrade", "9.0"]),
        ("prerm", ["remove", ""]),
        ("postrm", ["upgrade", "9.0"]),
        ("postrm", ["remove", ""]),
        ("postrm", ["purge", ""]),
    ] {
        machine.put("script", &std::fs::read_to_string(scripts.join(script)).unwrap(), 0o755);
        machine.said("/script", &arguments);
    }
    assert_eq!(machine.systemctl_calls(), Vec::<String>::new());
}
