//! A machine on which nothing of Wrenn is installed: a root directory with this machine's `/usr` below a layer of its own, and with `/etc`,
//! `/var` and an empty database of dpkg that are its own.
//!
//! It lies in a mount namespace of the thread that made it, in memory: with the thread all of it is gone, and nothing is written to this
//! machine. Root is needed. Its `systemctl` writes down how it is called, and says what the test lets it say.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

/// `show` tells that each restart was another start, as systemd does of a service that comes up.
const SYSTEMCTL: &str = r#"#!/bin/sh
[ "$1" = show ] || echo "$*" >> /systemctl.calls
case $1 in
show) printf 'ActiveState=active\nInvocationID=%s\n' "$(grep -c ^restart /systemctl.calls)" ;;
try-restart) [ ! -e /systemctl.fails ] ;;
esac
"#;
/// What programs of the system read to work at all; copied where this machine has it.
const SETTINGS: [&str; 5] = ["ld.so.cache", "ld.so.conf", "nsswitch.conf", "login.defs", "postgresql-common"];

pub struct BareMachine {
    pub root: PathBuf,
    home: TempDir,
}

impl BareMachine {
    pub fn new() -> Self {
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace (this test needs root)");
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("mounts of its own");
        let home = tempfile::Builder::new().prefix("wrenn-test-machine-").tempdir_in("/var/tmp").unwrap();
        mount(Some("tmpfs"), home.path(), Some("tmpfs"), MsFlags::empty(), Some("mode=755")).expect("a tmpfs");
        let machine = Self { root: home.path().join("root"), home };
        machine.furnish();
        machine
    }

    fn furnish(&self) {
        let (root, none) = (&self.root, None::<&str>);
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
        mount(Some("proc"), &root.join("proc"), Some("proc"), MsFlags::empty(), none).expect("/proc");
        for (node, numbers) in [("null", "1 3"), ("zero", "1 5"), ("urandom", "1 9"), ("random", "1 8")] {
            let place = root.join("dev").join(node);
            let made = Command::new("mknod").arg("-m666").arg(place).arg("c").args(numbers.split(' ')).status();
            assert!(made.unwrap().success(), "mknod {node}");
        }
        for name in SETTINGS.iter().filter(|name| Path::new("/etc").join(name).exists()) {
            let copied = Command::new("cp").arg("-a").arg(Path::new("/etc").join(name)).arg(root.join("etc")).status();
            assert!(copied.unwrap().success(), "{name}");
        }
        std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
        std::fs::write(root.join("etc/group"), "root:x:0:\n").unwrap();
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
        let mut command = Command::new("chroot");
        command.arg(&self.root).arg(program).stdin(Stdio::null()).env_clear();
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C").env("HOME", "/root");
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

    /// How `systemctl` was called since this was asked last.
    pub fn systemctl_calls(&self) -> Vec<String> {
        let place = self.root.join("systemctl.calls");
        let calls = std::fs::read_to_string(&place).unwrap();
        std::fs::write(&place, "").unwrap();
        calls.lines().map(str::to_owned).collect()
    }
}

impl Default for BareMachine {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for BareMachine {
    fn drop(&mut self) {
        // What is mounted below goes with it; only then is the directory empty and may be removed.
        if let Err(error) = umount2(self.home.path(), MntFlags::MNT_DETACH) {
            eprintln!("{}: {error}", self.home.path().display());
        }
    }
}
