//! The floor: a jailed load as a script would do it. Files get names in the jail, the jailer is run, its VMM is waited for, and asked over one
//! connection: for all that the driver asks for, or for the least, which is one request that loads the state and lets the vCPUs run.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use microvm::process::Unborn;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::{Value, json};
use whole_machine::jailed::Jails;
use whole_machine::objects;

use crate::{Saved, make_run, milliseconds};

/// Between looks for the socket.
const LOOK_AGAIN: Duration = Duration::from_micros(200);
const LIMIT: Duration = Duration::from_secs(20);

/// What is asked of the VMM.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Calls {
    AsTheDriver,
    Least,
}

/// In milliseconds, one after the other.
pub struct Parts {
    /// The jail is laid out.
    pub files: f64,
    /// The jailer has built it and has ended.
    pub jailer: f64,
    /// The VMM has made its socket.
    pub socket: f64,
    /// The requests.
    pub load: f64,
}

impl Parts {
    pub fn total(&self) -> f64 {
        self.files + self.jailer + self.socket + self.load
    }
}

pub fn load(jails: &Jails, saved: &Saved, run: &Path, slot: u32, calls: Calls) -> Result<Parts> {
    make_run(run)?;
    let user = jails.user(slot);
    let program = jails.release.firecracker.file_name().context("a program without a name")?;
    let root = run.join(program).join("vm/root");
    let tap = jails.tap();

    let began = Instant::now();
    fs::create_dir_all(&root)?;
    fs::hard_link(&saved.disk, root.join("disk"))?;
    fs::hard_link(&saved.memory, root.join("memory"))?;
    fs::copy(&saved.device, root.join("device"))?;
    chown(root.join("device"), Some(user), Some(user))?;
    let mut readers = Vec::new();
    for pipe in ["serial", "metrics"].iter().filter(|_| calls == Calls::AsTheDriver) {
        let pipe = root.join(pipe);
        mkfifo(&pipe, Mode::S_IRUSR | Mode::S_IWUSR)?;
        chown(&pipe, Some(user), Some(user))?;
        readers.push(File::options().read(true).write(true).open(&pipe)?);
    }
    let files = milliseconds(began);

    let began = Instant::now();
    let mut jailer = Command::new(&jails.release.jailer);
    jailer.args(["--id", "vm", "--exec-file"]).arg(&jails.release.firecracker);
    jailer.args(["--uid", &user.to_string(), "--gid", &user.to_string(), "--chroot-base-dir"]).arg(run);
    jailer.arg("--netns").arg(&tap.namespace);
    jailer.args(["--new-pid-ns", "--cgroup-version", "1", "--", "--api-sock", "/api.sock"]);
    let said = jailer.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    ensure!(said.success(), "the jailer ended with {said}");
    let jailer = milliseconds(began);

    let began = Instant::now();
    let socket = root.join("api.sock");
    let mut stream = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(error) if began.elapsed() > LIMIT => return Err(error).context("the VMM makes no socket"),
            Err(_) => std::thread::sleep(LOOK_AGAIN),
        }
    };
    let ready = milliseconds(began);

    let began = Instant::now();
    stream.set_read_timeout(Some(LIMIT))?;
    let load = json!({
        "snapshot_path": "device",
        "mem_backend": {"backend_type": "File", "backend_path": "memory"},
        "track_dirty_pages": true,
        "resume_vm": calls == Calls::Least,
        "network_overrides": [{"iface_id": "eth0", "host_dev_name": tap.name}],
    });
    match calls {
        Calls::Least => ask(&mut stream, "PUT", "/snapshot/load", &load)?,
        Calls::AsTheDriver => {
            let none = json!({"bandwidth": {"size": 0, "refill_time": 0}});
            let serial = json!({"serial_out_path": "serial", "rate_limiter": {"size": 262_144, "refill_time": 1000}});
            let card = json!({"iface_id": "eth0", "rx_rate_limiter": none, "tx_rate_limiter": none});
            ask(&mut stream, "GET", "/", &Value::Null)?;
            ask(&mut stream, "PUT", "/metrics", &json!({"metrics_path": "metrics"}))?;
            ask(&mut stream, "PUT", "/serial", &serial)?;
            ask(&mut stream, "PUT", "/snapshot/load", &load)?;
            ask(&mut stream, "PATCH", "/drives/disk", &json!({"drive_id": "disk", "rate_limiter": none}))?;
            ask(&mut stream, "PATCH", "/network-interfaces/eth0", &card)?;
            ask(&mut stream, "PATCH", "/vm", &json!({"state": "Resumed"}))?;
        }
    }
    let load = milliseconds(began);

    end(jails)?;
    fs::remove_dir_all(run)?;
    Ok(Parts { files, jailer, socket: ready, load })
}

/// An answer fits into one piece.
fn ask(stream: &mut UnixStream, method: &str, path: &str, body: &Value) -> Result<()> {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes())?;
    let mut answer = [0; 4096];
    let count = stream.read(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer[..count]);
    ensure!(answer.starts_with("HTTP/1.1 20"), "{method} {path} answers {answer:?}");
    Ok(())
}

/// Waits until it has let go of all that it had: the next one needs its tap.
fn end(jails: &Jails) -> Result<()> {
    for pid in objects::microvms(&jails.tag) {
        drop(Unborn::of(pid).context("hold a VMM")?);
    }
    Ok(())
}
