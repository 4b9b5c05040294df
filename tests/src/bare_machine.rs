//! A machine on which nothing of Wrenn is installed: a root directory with this machine's `/usr` below a layer of its own, and with `/etc`,
//! `/var` and an empty database of dpkg that are its own.
//!
//! It lies in namespaces of the thread that made it, in memory, and what runs on it ends with it, also when the test is killed: nothing is
//! written to this machine. Root is needed. Its `systemctl` writes down how it is called, says what the test lets it say, and starts a
//! service where the test wants that, as far as a shell understands its unit.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

/// `show` tells that each restart was another start, as systemd does of a service that comes up.
const SYSTEMCTL: &str = r#"#!/bin/sh
[ "$1" = show ] || echo "$*" >> /systemctl.calls
for unit; do :; done
ends() { kill "$1"; for _ in $(seq 400); do readlink "/proc/$1/exe" >/dev/null || return 0; sleep 0.1; done; exit 1; }
says() { sed -n "s/^$1=//p" "$file"; }
case $1 in
show) printf 'ActiveState=active\nInvocationID=%s\n' "$(grep -c ^restart /systemctl.calls)" ;;
daemon-reload | disable | try-restart) [ ! -e /systemctl.fails ] ;;
restart)
    grep -qxF "$unit" /systemctl.starts 2>/dev/null || exit 0
    # As systemd does: the next start waits for the end of the one before.
    [ ! -e "/run/$unit.pid" ] || ends "$(cat "/run/$unit.pid")"
    file=/etc/systemd/system/$unit
    [ -e "$file" ] || file=/usr/lib/systemd/system/$unit
    user=$(says User)
    install -d -m 700 -o "$user" -g "$user" "/var/lib/$(says StateDirectory)"
    set -a; eval "$(says Environment)"; . "$(says EnvironmentFile)"; set +a
    setsid setpriv --reuid "$user" --regid "$user" --clear-groups $(says ExecStart) </dev/null >>/journal 2>&1 &
    echo $! > "/run/$unit.pid"
    ;;
esac
"#;
/// What programs of the system read to work at all; copied where this machine has it.
const SETTINGS: [&str; 8] =
    ["ld.so.cache", "ld.so.conf", "login.defs", "nsswitch.conf", "pam.d", "postgresql-common", "security", "ssl"];
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\npostgres:x:70:70::/var/lib/postgresql:/bin/sh\n";
const GROUP: &str = "root:x:0:\npostgres:x:70:\n";
/// Between a start of `unshare` and its namespace.
const INIT_MAX: Duration = Duration::from_secs(10);

pub struct BareMachine {
    pub root: PathBuf,
    home: TempDir,
    /// The first process: it waits for the end of its standard input.
    init: Child,
}

impl BareMachine {
    pub fn new() -> Self {
        let none = None::<&str>;
        let namespaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC;
        unshare(namespaces).expect("namespaces (this test needs root)");
        assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().expect("ip").success());
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("mounts of its own");
        let home = tempfile::Builder::new().prefix("wrenn-test-machine-").tempdir_in("/var/tmp").unwrap();
        mount(Some("tmpfs"), home.path(), Some("tmpfs"), MsFlags::empty(), Some("mode=755")).expect("a tmpfs");
        let machine = Self { root: home.path().join("root"), home, init: first_process() };
        machine.furnish();
        machine
    }

    fn furnish(&self) {
        let root = &self.root;
        for folder in ["usr", "etc", "proc", "dev/shm", "tmp", "run/systemd/system", "var/tmp", "var/lib/dpkg/info"] {
            std::fs::create_dir_all(root.join(folder)).unwrap();
        }
        for folder in ["dev/shm", "tmp", "var/tmp"] {
            std::fs::set_permissions(root.join(folder), std::fs::Permissions::from_mode(0o1777)).unwrap();
        }
        for folder in ["bin", "sbin", "lib", "lib64"] {
            symlink(format!("usr/{folder}"), root.join(folder)).unwrap();
        }
        symlink("../run", root.join("var/run")).unwrap();
        let (upper, work) = (self.home.path().join("upper"), self.home.path().join("work"));
        std::fs::create_dir_all(&upper).unwrap();
        std::fs::create_dir_all(&work).unwrap();
        let layers = format!("lowerdir=/usr,upperdir={},workdir={}", upper.display(), work.display());
        mount(Some("overlay"), &root.join("usr"), Some("overlay"), MsFlags::empty(), Some(layers.as_str()))
            .expect("an overlay");
        let mounted = self.entering("mount").args(["-t", "proc", "proc"]).arg(root.join("proc")).status();
        assert!(mounted.unwrap().success(), "mount /proc");
        for (node, numbers) in [("null", "1 3"), ("zero", "1 5"), ("urandom", "1 9"), ("random", "1 8")] {
            let place = root.join("dev").join(node);
            let made = Command::new("mknod").arg("-m666").arg(place).arg("c").args(numbers.split(' ')).status();
            assert!(made.unwrap().success(), "mknod {node}");
        }
        for name in SETTINGS.iter().filter(|name| Path::new("/etc").join(name).exists()) {
            let copied = Command::new("cp").arg("-a").arg(Path::new("/etc").join(name)).arg(root.join("etc")).status();
            assert!(copied.unwrap().success(), "{name}");
        }
        std::fs::write(root.join("etc/passwd"), PASSWD).unwrap();
        std::fs::write(root.join("etc/group"), GROUP).unwrap();
        std::fs::write(root.join("var/lib/dpkg/status"), "").unwrap();
        self.put("usr/bin/systemctl", SYSTEMCTL, 0o755);
        self.put("systemctl.calls", "", 0o644);
        // Of a machine on which such tests are run by somebody who has the package.
        for program in ["wrenn", "wrenn-cp", "wrenn-agent"] {
            let _ = std::fs::remove_file(root.join("usr/bin").join(program));
        }
    }

    /// Another file than this machine's, also where a package of the system has one.
    pub fn put(&self, path: &str, text: &str, mode: u32) {
        let place = self.root.join(path);
        let _ = std::fs::remove_file(&place);
        std::fs::create_dir_all(place.parent().unwrap()).unwrap();
        std::fs::write(&place, text).unwrap();
        std::fs::set_permissions(&place, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    /// A program of it, as root of it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = self.entering("chroot");
        command.arg(&self.root).arg(program).env_clear();
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C").env("HOME", "/root");
        command
    }

    /// A program of this machine, among the processes of that one.
    fn entering(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--pid=/proc/{}/ns/pid_for_children", self.init.id())).arg(program).stdin(Stdio::null());
        command
    }

    pub fn run(&self, program: &str, arguments: &[&str]) -> Output {
        self.command(program).args(arguments).output().expect("chroot")
    }

    /// What it printed, of a command that must succeed.
    pub fn said(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.run(program, arguments);
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{program} {arguments:?}: {} {said}", output.status);
        said
    }

    /// The system's PostgreSQL, as Debian starts it: a server that knows users of the system by their names.
    pub fn start_postgres(&self) {
        self.said(
            "sh",
            &[
                "-ec",
                "cd /; bin=$(ls -d /usr/lib/postgresql/*/bin | tail -n 1)
                 install -d -o postgres -g postgres /var/lib/postgresql /run/postgresql
                 as() { setpriv --reuid postgres --regid postgres --clear-groups \"$@\"; }
                 as $bin/initdb --no-sync --auth-local peer --pgdata /var/lib/postgresql/data
                 as $bin/pg_ctl start --wait --pgdata /var/lib/postgresql/data --log /var/lib/postgresql/log \\
                     --options '-c listen_addresses= -c unix_socket_directories=/var/run/postgresql -c fsync=off'",
            ],
        );
    }

    /// How `systemctl` was called since this was asked last.
    pub fn systemctl_calls(&self) -> Vec<String> {
        let place = self.root.join("systemctl.calls");
        let calls = std::fs::read_to_string(&place).unwrap();
        std::fs::write(&place, "").unwrap();
        calls.lines().map(str::to_owned).collect()
    }
}

/// Of a process namespace, when it is there.
fn first_process() -> Child {
    let mut unshare = Command::new("unshare");
    unshare.args(["--pid", "--fork", "--", "cat"]).stdin(Stdio::piped()).stdout(Stdio::null());
    let init = unshare.spawn().expect("unshare");
    let (its, own) =
        (format!("/proc/{}/ns/pid_for_children", init.id()), std::fs::read_link("/proc/self/ns/pid").unwrap());
    let began = Instant::now();
    while std::fs::read_link(&its).map_or(true, |its| its == own) {
        assert!(began.elapsed() < INIT_MAX, "no process namespace");
        std::thread::sleep(Duration::from_millis(5));
    }
    init
}

impl Default for BareMachine {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for BareMachine {
    fn drop(&mut self) {
        // The first process goes, and the kernel ends all others.
        drop(self.init.stdin.take());
        let _ = self.init.wait();
        // What is mounted below goes with it; only then is the directory empty and may be removed.
        if let Err(error) = umount2(self.home.path(), MntFlags::MNT_DETACH) {
            eprintln!("{}: {error}", self.home.path().display());
        }
    }
}
