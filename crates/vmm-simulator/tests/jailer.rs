//! What the real jailer was seen to build and to refuse. They run against the simulator, or against the binaries that
//! `WRENN_JAILER_BIN` and `WRENN_FIRECRACKER_BIN` name. All but the refusals need root.

#[path = "host/mod.rs"]
mod host;

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tempfile::TempDir;

use crate::host::client;
use crate::host::netns::NetworkNamespace;
use crate::host::until;

/// Nobody's.
const UID: u32 = 61_234;
const GID: u32 = 61_235;

fn jailer() -> PathBuf {
    std::env::var_os("WRENN_JAILER_BIN").map_or_else(|| vmm_simulator::programs().jailer, PathBuf::from)
}

fn firecracker() -> PathBuf {
    std::env::var_os("WRENN_FIRECRACKER_BIN").map_or_else(|| vmm_simulator::programs().firecracker, PathBuf::from)
}

fn rooted() -> bool {
    let rooted = host::is_root();
    if !rooted {
        println!("SKIPPED: a jail needs root");
    }
    rooted
}

/// A directory for jails. What runs in them is killed when it goes.
struct Base {
    dir: TempDir,
    ends: Vec<Pid>,
}

impl Base {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), ends: Vec::new() }
    }

    fn jail(&self, id: &str) -> PathBuf {
        self.dir.path().join(firecracker().file_name().unwrap()).join(id).join("root")
    }

    fn socket(&self, id: &str) -> PathBuf {
        self.jail(id).join("run/firecracker.socket")
    }

    fn command(&self, id: &str, more: &[&str]) -> Command {
        let mut command = Command::new(jailer());
        command
            .args(["--id", id, "--uid", &UID.to_string(), "--gid", &GID.to_string(), "--exec-file"])
            .arg(firecracker())
            .arg("--chroot-base-dir")
            .arg(self.dir.path())
            .args(more)
            .stdin(Stdio::null());
        command
    }

    /// With a pid namespace of its own, until its API answers.
    fn start(&mut self, id: &str, more: &[&str]) -> Pid {
        let console = fs::File::create(self.dir.path().join("console")).unwrap();
        let mut command = self.command(id, &["--new-pid-ns"]);
        // What is open here, and not marked, would go with it.
        let done = command.args(more).env("SECRET", "x").stdout(console).status().unwrap();
        assert!(done.success(), "{done}");
        let name = format!("{}.pid", firecracker().file_name().unwrap().to_string_lossy());
        let pid = Pid::from_raw(fs::read_to_string(self.jail(id).join(name)).unwrap().parse().unwrap());
        self.ends.push(pid);
        until("the jailed API answers", || client::connect(&self.socket(id)).ok());
        pid
    }

    fn end(&mut self, pid: Pid) {
        self.ends.retain(|other| *other != pid);
        end(pid);
    }

    #[track_caller]
    fn refused(&self, id: &str, more: &[&str], words: &str) {
        one_line_of(self.command(id, more).output().unwrap(), words);
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        self.ends.drain(..).for_each(end);
    }
}

fn end(pid: Pid) {
    let _ = kill(pid, Signal::SIGKILL);
    until("the process ends", || is_over(pid).then_some(()));
}

/// Gone, or only waiting for a parent that does not look.
fn is_over(pid: Pid) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

#[track_caller]
fn one_line_of(output: Output, words: &str) {
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(words), "`{words}` is not in: {text}");
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
}

fn status_line(pid: Pid, name: &str) -> Vec<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_start_matches(':').split_whitespace().map(str::to_owned).collect()
}

fn limit(pid: Pid, name: &str) -> String {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().next().unwrap().to_owned()
}

#[test]
fn it_says_its_version() {
    let output = Command::new(jailer()).arg("--version").output().unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().starts_with("Jailer v1."));
    assert!(output.status.success());
}

#[test]
fn the_program_is_the_first_process_of_its_namespace() {
    if !rooted() {
        return;
    }
    let mut base = Base::new();
    let pid = base.start("first", &[]);
    assert_eq!(status_line(pid, "NSpid")[1], "1");
    // To the first process only what it handles is delivered.
    kill(pid, Signal::SIGTERM).unwrap();
    let info = client::call(&base.socket("first"), "GET", "/", "").unwrap().found();
    assert_eq!(info["id"], "first");
    base.end(pid);
}

#[test]
fn the_program_is_the_jail_s_user_and_nothing_more() {
    if !rooted() {
        return;
    }
    let mut base = Base::new();
    let pid = base.start("user", &[]);
    assert_eq!(status_line(pid, "Uid"), [&*UID.to_string(); 4]);
    assert_eq!(status_line(pid, "Gid"), [&*GID.to_string(); 4]);
    assert!(status_line(pid, "Groups").is_empty());
    assert_eq!(u64::from_str_radix(&status_line(pid, "CapEff")[0], 16).unwrap(), 0);
    assert_eq!(fs::read(format!("/proc/{pid}/environ")).unwrap(), b"");
    let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    for argument in ["--id\0user\0", "--start-time-us\0", "--start-time-cpu-us\0", "--parent-cpu-time-us\0"] {
        assert!(arguments.contains(argument), "{argument}");
    }
}

#[test]
fn open_descriptors_are_not_handed_on() {
    use std::os::unix::process::CommandExt as _;
    if !rooted() {
        return;
    }
    let mut base = Base::new();
    let mark = fs::File::create(base.dir.path().join("mark")).unwrap();
    let mut command = base.command("open", &["--new-pid-ns"]);
    let shared = std::os::fd::AsRawFd::as_raw_fd(&mark);
    // SAFETY: dup is one plain system call, and the new descriptor stays open over exec.
    unsafe {
        command.pre_exec(move || if libc::dup(shared) < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) });
    }
    assert!(command.stdout(Stdio::null()).status().unwrap().success());
    let name = format!("{}.pid", firecracker().file_name().unwrap().to_string_lossy());
    let pid = Pid::from_raw(fs::read_to_string(base.jail("open").join(name)).unwrap().parse().unwrap());
    base.ends.push(pid);
    until("the jailed API answers", || client::connect(&base.socket("open")).ok());
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let mut targets = open.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    assert!(!targets.any(|target| target.ends_with("mark")));
}

#[test]
fn what_is_in_a_jail_and_whose_it_is() {
    if !rooted() {
        return;
    }
    let mut base = Base::new();
    base.start("files", &[]);
    let jail = base.jail("files");
    for folder in ["", "dev", "dev/net", "run"] {
        let found = fs::metadata(jail.join(folder)).unwrap();
        assert_eq!((found.mode() & 0o7777, found.uid(), found.gid()), (0o700, UID, GID), "/{folder}");
    }
    for (node, major, minor) in [("dev/net/tun", 10, 200), ("dev/kvm", 10, 232), ("dev/urandom", 1, 9)] {
        let found = fs::metadata(jail.join(node)).unwrap();
        assert!(found.file_type().is_char_device(), "{node}");
        assert_eq!(found.rdev(), nix::sys::stat::makedev(major, minor), "{node}");
        assert_eq!((found.mode() & 0o777, found.uid(), found.gid()), (0o600, UID, GID), "{node}");
    }
    let has_userfaultfd = fs::read_to_string("/proc/misc").unwrap().contains("userfaultfd");
    assert_eq!(jail.join("dev/userfaultfd").exists(), has_userfaultfd);
    let copy = fs::read(jail.join(firecracker().file_name().unwrap())).unwrap();
    assert!(copy == fs::read(firecracker()).unwrap(), "another program");
}

#[test]
fn nothing_of_a_jail_is_mounted_outside() {
    if !rooted() {
        return;
    }
    let mut base = Base::new();
    let pid = base.start("mounts", &[]);
    let ours = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!ours.contains(base.dir.path().to_str().unwrap()));
    let its = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert!(!its.contains("old_root"));
    assert!(!base.jail("mounts").join("old_root").exists());
}

#[test]
fn it_runs_in_the_network_namespace_with_a_tap_of_its_user() {
    let Some(namespace) = NetworkNamespace::new(&[]) else { return };
    let uid = UID.to_string();
    let made = Command::new("ip")
        .args(["-n", &namespace.name, "tuntap", "add", "tap0", "mode", "tap", "user", &uid])
        .status()
        .unwrap();
    assert!(made.success());
    let mut base = Base::new();
    let path = format!("/run/netns/{}", namespace.name);
    let pid = base.start("net", &["--netns", &path]);
    let inode = |path: &str| fs::metadata(path).unwrap().ino();
    assert_eq!(inode(&format!("/proc/{pid}/ns/net")), inode(&path));
    let socket = base.socket("net");
    let card = |tap: &str| json!({ "iface_id": "eth0", "host_dev_name": tap }).to_string();
    client::call(&socket, "PUT", "/network-interfaces/eth0", &card("tap0")).unwrap().accepted();
    // Without rights a missing one is not made.
    client::call(&socket, "PUT", "/network-interfaces/eth0", &card("tap9")).unwrap().refused("Open tap device failed");
}

#[test]
fn limits_of_files_and_of_their_size() {
    if !rooted() {
        return;
    }
    let mut base = Base::new();
    let plain = base.start("plain", &[]);
    assert_eq!(limit(plain, "Max open files"), "2048");
    assert_eq!(limit(plain, "Max file size"), "unlimited");
    let limited = base.start("limited", &["--resource-limit", "no-file=300", "--resource-limit", "fsize=70000000"]);
    assert_eq!(limit(limited, "Max open files"), "300");
    assert_eq!(limit(limited, "Max file size"), "70000000");
}

#[test]
fn a_snapshot_above_the_limit_is_a_refusal() {
    if !rooted() {
        return;
    }
    if std::env::var_os("WRENN_FIRECRACKER_BIN").is_some() {
        println!("SKIPPED: only of the simulator");
        return;
    }
    let mut base = Base::new();
    base.start("small", &["--resource-limit", "fsize=1000000"]);
    let (jail, socket) = (base.jail("small"), base.socket("small"));
    fs::write(jail.join("kernel"), b"\x7fELF").unwrap();
    let call = |method: &str, path: &str, body: serde_json::Value| {
        client::call(&socket, method, path, &body.to_string()).unwrap()
    };
    call("PUT", "/boot-source", json!({ "kernel_image_path": "kernel" })).accepted();
    call("PUT", "/actions", json!({ "action_type": "InstanceStart" })).accepted();
    call("PATCH", "/vm", json!({ "state": "Paused" })).accepted();
    call("PUT", "/snapshot/create", json!({ "snapshot_path": "s", "mem_file_path": "m" })).refused("os error 27");
    assert_eq!(client::call(&socket, "GET", "/", "").unwrap().found()["state"], "Paused");
}

#[test]
fn an_existing_group_is_entered() {
    if !rooted() {
        return;
    }
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let Some(top) = mounts.lines().find_map(|line| {
        let fields: Vec<_> = line.split(' ').collect();
        (fields[2] == "cgroup2").then(|| PathBuf::from(fields[1]))
    }) else {
        println!("SKIPPED: no cgroup2 hierarchy is mounted");
        return;
    };
    let group = Group::new(top.join(format!("vmmsim-{}", std::process::id())));
    let Some(group) = group else {
        println!("SKIPPED: no cgroup can be made");
        return;
    };
    let name = group.0.file_name().unwrap().to_str().unwrap().to_owned();
    let mut base = Base::new();
    let pid = base.start("group", &["--cgroup-version", "2", "--parent-cgroup", &name]);
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(groups.lines().any(|line| line.starts_with("0::") && line.ends_with(&name)), "{groups}");
    base.end(pid);
}

struct Group(PathBuf);

impl Group {
    fn new(path: PathBuf) -> Option<Self> {
        fs::create_dir(&path).ok().map(|()| Self(path))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn without_a_pid_namespace_it_becomes_the_program() {
    if !rooted() {
        return;
    }
    let base = Base::new();
    let mut child = Killed(base.command("same", &[]).stdout(Stdio::null()).spawn().unwrap());
    until("the jailed API answers", || client::connect(&base.socket("same")).ok());
    assert_eq!(child.0.try_wait().unwrap(), None, "the same process");
    let pids = fs::read_dir(base.jail("same")).unwrap();
    assert!(!pids.map(|entry| entry.unwrap().path()).any(|path| path.extension().is_some_and(|end| end == "pid")));
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_jail_stays_and_is_not_used_twice() {
    if !rooted() {
        return;
    }
    let mut base = Base::new();
    let pid = base.start("twice", &[]);
    base.end(pid);
    assert!(base.jail("twice").exists(), "nobody removed it");
    base.refused("twice", &["--new-pid-ns"], "File exists (os error 17)");
    // It goes as any directory goes: nothing is mounted in it.
    fs::remove_dir_all(base.jail("twice").parent().unwrap()).unwrap();
    base.start("twice", &[]);
}

#[test]
fn a_jail_is_removed_while_its_program_runs() {
    if !rooted() {
        return;
    }
    let mut base = Base::new();
    let pid = base.start("early", &[]);
    fs::remove_dir_all(base.jail("early").parent().unwrap()).unwrap();
    assert!(!is_over(pid));
}

#[test]
fn an_id_has_its_letters_and_its_length() {
    let base = Base::new();
    for id in ["a.b", "a/b", "a_b", ""] {
        base.refused(id, &[], "nvalid instance ID");
    }
    base.refused(&"x".repeat(65), &[], "nvalid instance ID");
    assert!(!Path::new(&base.jail("a.b")).exists());
}

#[test]
fn the_program_s_name_has_firecracker_in_it() {
    let base = Base::new();
    let other = base.dir.path().join("other");
    fs::write(&other, "").unwrap();
    let output = Command::new(jailer())
        .args(["--id", "x", "--uid", "1", "--gid", "1", "--exec-file"])
        .arg(&other)
        .arg("--chroot-base-dir")
        .arg(base.dir.path())
        .output()
        .unwrap();
    one_line_of(output, "firecracker");
}

#[test]
fn a_base_that_is_missing_is_refused() {
    let output = Command::new(jailer())
        .args(["--id", "x", "--uid", "1", "--gid", "1", "--chroot-base-dir", "/no/such/base", "--exec-file"])
        .arg(firecracker())
        .output()
        .unwrap();
    one_line_of(output, "No such file or directory (os error 2)");
}

#[test]
fn groups_and_limits_that_are_none_are_refused() {
    let base = Base::new();
    base.refused("x", &["--parent-cgroup", "/top"], "arent cgroup path");
    base.refused("x", &["--parent-cgroup", "../up"], "arent cgroup path");
    base.refused("x", &["--resource-limit", "memory=1"], "memory");
    base.refused("x", &["--resource-limit", "fsize"], "fsize");
}

#[test]
fn a_network_namespace_that_is_missing_is_refused() {
    if !rooted() {
        return;
    }
    Base::new().refused("x", &["--netns", "/run/netns/nowhere"], "No such file or directory (os error 2)");
}
