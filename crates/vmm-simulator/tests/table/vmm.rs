//! One process of the program under test, in a directory of its own.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::host::client::{self, Answer};
use crate::host::netns::NetworkNamespace;
use crate::host::until;

/// Of every guest here. Small, and a multiple of every page size.
pub const GUEST_MIB: u64 = 128;
pub const GUEST_BYTES: u64 = GUEST_MIB << 20;

/// The real binary, when the environment names one.
pub fn real() -> Option<PathBuf> {
    std::env::var_os("WRENN_FIRECRACKER_BIN").map(PathBuf::from)
}

/// For rows that no real binary can be asked.
pub fn simulated() -> bool {
    let simulated = real().is_none();
    if !simulated {
        println!("SKIPPED: only of the simulator");
    }
    simulated
}

pub fn program() -> PathBuf {
    real().unwrap_or_else(|| vmm_simulator::programs().firecracker)
}

/// Killed and collected when dropped; its files go with its directory.
pub struct Vmm {
    child: Child,
    dir: Directory,
}

enum Directory {
    Own(TempDir),
    OfAnother(PathBuf),
}

impl Vmm {
    pub fn new() -> Self {
        Self::with(&[])
    }

    pub fn with(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = spawn(Command::new(program()), dir.path(), arguments);
        Self { child, dir: Directory::Own(dir) }.ready()
    }

    pub fn inside(namespace: &NetworkNamespace) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = Self::inside_at(namespace, dir.path());
        Self { child, dir: Directory::Own(dir) }.ready()
    }

    /// Another process in the directory of this one, which may be gone already.
    pub fn beside(&self) -> Self {
        let _ = fs::remove_file(self.path("api.sock"));
        let child = spawn(Command::new(program()), self.dir(), &[]);
        Self { child, dir: Directory::OfAnother(self.dir().to_owned()) }.ready()
    }

    pub fn beside_inside(&self, namespace: &NetworkNamespace) -> Self {
        let _ = fs::remove_file(self.path("api.sock"));
        let child = Self::inside_at(namespace, self.dir());
        Self { child, dir: Directory::OfAnother(self.dir().to_owned()) }.ready()
    }

    fn inside_at(namespace: &NetworkNamespace, dir: &Path) -> Child {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &namespace.name]).arg(program());
        spawn(command, dir, &[])
    }

    fn ready(mut self) -> Self {
        let socket = self.socket();
        until("the API answers", || {
            assert_eq!(self.child.try_wait().unwrap(), None, "ended before it answered");
            client::connect(&socket).ok()
        });
        self
    }

    pub fn dir(&self) -> &Path {
        match &self.dir {
            Directory::Own(dir) => dir.path(),
            Directory::OfAnother(path) => path,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("api.sock")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A file of so many bytes, by the name that the process uses.
    pub fn file(&self, name: &str, bytes: u64) -> String {
        File::create(self.path(name)).unwrap().set_len(bytes).unwrap();
        name.to_owned()
    }

    pub fn allocated(&self, name: &str) -> u64 {
        fs::metadata(self.path(name)).unwrap().blocks() * 512
    }

    #[track_caller]
    pub fn call(&self, method: &str, path: &str, body: &str) -> Answer {
        client::call(&self.socket(), method, path, body).unwrap()
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        self.call("GET", path, "").found()
    }

    #[track_caller]
    pub fn put(&self, path: &str, body: Value) -> Answer {
        self.call("PUT", path, &body.to_string())
    }

    #[track_caller]
    pub fn patch(&self, path: &str, body: Value) -> Answer {
        self.call("PATCH", path, &body.to_string())
    }

    #[track_caller]
    pub fn action(&self, action: &str) -> Answer {
        self.put("/actions", json!({ "action_type": action }))
    }

    pub fn put_machine(&self, track_dirty_pages: bool) {
        let machine = json!({ "vcpu_count": 1, "mem_size_mib": GUEST_MIB, "track_dirty_pages": track_dirty_pages });
        self.put("/machine-config", machine).accepted();
    }

    /// `None`, and a sentence, when there is no kernel for a real binary.
    pub fn put_kernel(&self) -> Option<()> {
        let kernel = match (real(), std::env::var("WRENN_TEST_KERNEL")) {
            (None, _) => {
                fs::write(self.path("kernel"), [b"\x7fELF".as_slice(), &[7; 100_000]].concat()).unwrap();
                "kernel".to_owned()
            }
            (Some(_), Ok(kernel)) => kernel,
            (Some(_), Err(_)) => {
                println!("SKIPPED: WRENN_TEST_KERNEL names no kernel");
                return None;
            }
        };
        self.put("/boot-source", json!({ "kernel_image_path": kernel, "boot_args": "console=ttyS0" })).accepted();
        Some(())
    }

    #[track_caller]
    pub fn pause(&self) {
        self.patch("/vm", json!({ "state": "Paused" })).accepted();
    }

    #[track_caller]
    pub fn resume(&self) {
        self.patch("/vm", json!({ "state": "Resumed" })).accepted();
    }

    pub fn state(&self) -> String {
        self.get("/")["state"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    pub fn snapshot(&self, kind: &str, state: &str, memory: &str) -> Answer {
        let body = json!({ "snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory });
        self.put("/snapshot/create", body)
    }

    /// Runs and pauses until a Diff has pages in it, which it writes to new files of these names.
    pub fn diff_of_something(&self, state: &str, memory: &str) {
        until("the guest changes a page", || {
            self.resume();
            std::thread::yield_now();
            self.pause();
            let _ = fs::remove_file(self.path(memory));
            self.snapshot("Diff", state, memory).accepted();
            (self.allocated(memory) > 0).then_some(())
        });
    }

    #[track_caller]
    pub fn exit_code(&mut self) -> Option<i32> {
        until("the process ends", || self.child.try_wait().unwrap()).code()
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn console(&self) -> String {
        fs::read_to_string(self.path("console")).unwrap_or_default()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A load from the files `state` and `memory`, with more fields.
pub fn load(more: Value) -> Value {
    let mut body = json!({
        "snapshot_path": "state",
        "mem_backend": { "backend_type": "File", "backend_path": "memory" },
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn spawn(mut command: Command, dir: &Path, arguments: &[&str]) -> Child {
    command
        .args(["--id", "row", "--api-sock", "api.sock"])
        .args(arguments)
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(File::options().append(true).create(true).open(dir.join("console")).unwrap())
        .spawn()
        .unwrap()
}
