//! A driver without guests: each microVM is a process that only exists. Start, exit, adoption and kill are real; what would happen
//! inside is not. For tests of everything above this crate.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::process::{self, ExitCause, Process, ProcessRecord, Unborn};
use crate::{Driver, Error, Isolation, Launch, Microvm, SaveTarget, Saved, Stamp, Start, Stats, path_text};

pub const NAME: &str = "fake";

/// What to run as the microVM's process.
type Body = dyn Fn(&Launch) -> Command + Send + Sync;

pub struct Fake {
    body: Box<Body>,
}

impl Fake {
    /// The process sleeps until it is killed.
    pub fn new() -> Self {
        Self::with_body(|_| {
            let mut sleep = Command::new("sleep");
            sleep.arg("infinity");
            sleep
        })
    }

    /// The process is whatever `body` says: an envd outside a sandbox, for example.
    pub fn with_body(body: impl Fn(&Launch) -> Command + Send + Sync + 'static) -> Self {
        Self { body: Box::new(body) }
    }
}

impl Default for Fake {
    fn default() -> Self {
        Self::new()
    }
}

struct FakeVm {
    record: ProcessRecord,
    process: Process,
}

#[async_trait]
impl Driver for Fake {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> &str {
        "0"
    }

    fn isolation(&self) -> Isolation {
        Isolation::Fake
    }

    fn stamp(&self) -> Stamp {
        Stamp::of(self)
    }

    async fn start(&self, launch: Launch, start: Start) -> Result<Arc<dyn Microvm>, Error> {
        let missing =
            |what: &'static str, path: &std::path::Path| std::fs::metadata(path).map(|_| ()).map_err(Error::io(what));
        missing("open the disk", &launch.disk)?;
        missing("open the memory file", &launch.memory)?;
        if let Start::Boot { kernel, .. } = &start {
            missing("open the kernel", &kernel.vmlinux)?;
        }
        let mut command = (self.body)(&launch);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // A session of its own: in the caller's, the kernel would send it SIGHUP when it stands still while the caller dies.
        // SAFETY: setsid is async-signal-safe, and of a child that leads no group yet it cannot fail.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                Ok(())
            })
        };
        let child = command.spawn().map_err(|cause| Error::Start { reason: "spawn".to_owned(), cause })?;
        let pid = i32::try_from(child.id()).expect("a pid fits");
        let unborn = Unborn::of(pid).map_err(Error::io("hold the process"))?;
        let process = Process::of_child(pid).map_err(Error::io("hold the process"))?;
        let record = ProcessRecord {
            driver: self.name().to_owned(),
            vmm_version: self.version().to_owned(),
            pid,
            start_ticks: process::start_ticks(pid).map_err(|_| Error::Stillborn("at once".to_owned()))?,
            boot_id: process::boot_id().map_err(Error::io("read the boot id"))?,
            dir: launch.dir,
            memory: launch.memory,
            memory_private: matches!(start, Start::Load { .. }),
            memory_mib: launch.shape.memory_mib,
            made_by: Some(self.stamp()),
        };
        unborn.disarm();
        Ok(Arc::new(FakeVm { record, process }))
    }

    async fn adopt(&self, record: &ProcessRecord) -> Result<Arc<dyn Microvm>, Error> {
        adopt(record)
    }
}

pub fn adopt(record: &ProcessRecord) -> Result<Arc<dyn Microvm>, Error> {
    Ok(Arc::new(FakeVm { record: record.clone(), process: Process::of_record(record)? }))
}

impl FakeVm {
    fn signal(&self, signal: libc::c_int) -> Result<(), Error> {
        if self.process.has_ended() {
            return Err(Error::Gone);
        }
        // SAFETY: a plain system call; the process has not been collected, so its number is its own.
        let done = unsafe { libc::kill(self.record.pid, signal) };
        if done == 0 { Ok(()) } else { Err(Error::Gone) }
    }
}

#[async_trait]
impl Microvm for FakeVm {
    fn record(&self) -> &ProcessRecord {
        &self.record
    }

    async fn stop_vcpus(&self) -> Result<(), Error> {
        self.signal(libc::SIGSTOP)
    }

    async fn continue_vcpus(&self) -> Result<(), Error> {
        self.signal(libc::SIGCONT)
    }

    async fn save(&self, target: &SaveTarget) -> Result<Saved, Error> {
        self.stop_vcpus().await?;
        let copied_bytes =
            tokio::fs::copy(&self.record.memory, &target.memory).await.map_err(Error::io("copy the memory"))?;
        tokio::fs::write(&target.device, path_text(&self.record.dir))
            .await
            .map_err(Error::io("write the device state"))?;
        Ok(Saved { copied_bytes, stopped: Duration::ZERO })
    }

    async fn kill(&self) -> Result<(), Error> {
        self.process.kill().await
    }

    async fn stats(&self) -> Result<Stats, Error> {
        self.process.stats()
    }

    async fn console_tail(&self, _: usize) -> Result<Vec<u8>, Error> {
        Ok(Vec::new())
    }

    async fn exited(&self) -> ExitCause {
        self.process.exited().await
    }
}
