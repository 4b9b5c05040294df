//! QEMU's microvm machine: the driver.
//!
//! The VMM runs as a uid of its own from its first instruction on, without capabilities, with QEMU's system call filter on, in a network
//! namespace with nothing in it, and may open its own program's files only. What else it may use it gets as descriptors: tap, control
//! socket, disk, memory, device state. Flags and their reasons: [`command`].

pub mod command;
mod landlock;
mod memory;
mod probe;
mod qmp;
mod spawn;
mod tsc;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::json;
use tokio::sync::Mutex;

use crate::process::{ExitCause, Process, ProcessRecord};
use crate::{Driver, Error, Isolation, KernelImage, Launch, Microvm, SaveTarget, Saved, Stamp, Start, Stats, cpu};
pub use command::Accelerator;
use qmp::Qmp;

pub const NAME: &str = "qemu";
/// Of the console kept in QEMU and, after it was read out, here.
const CONSOLE_BYTES: usize = 64 * 1024;
/// QEMU answers within milliseconds; this is for a machine that is far overloaded.
const COMMAND_LIMIT: Duration = Duration::from_secs(10);
/// From the spawn to the first answer (25 to 42 ms measured, idle).
const START_LIMIT: Duration = Duration::from_secs(20);
/// Loading a device state (33 ms measured).
const LOAD_LIMIT: Duration = Duration::from_secs(30);
const DEFAULT_BINARY: &str = "qemu-system-x86_64";

pub struct Qemu {
    binary: PathBuf,
    version: String,
    accelerator: Accelerator,
    /// Under emulation the guest sees the host's time stamp counter and must be told its rate.
    tsc_khz: u64,
}

impl Qemu {
    /// Finds QEMU and its version. `accelerator` is what [`Self::probe`] found.
    pub async fn new(binary: Option<PathBuf>, accelerator: Accelerator) -> Result<Self, Error> {
        let binary = probe::find(&binary.unwrap_or_else(|| DEFAULT_BINARY.into()))?;
        let version = probe::version(&binary).await?;
        let tsc_khz = tokio::task::spawn_blocking(tsc::measure_khz)
            .await
            .map_err(|e| Error::io("measure the TSC")(std::io::Error::other(e)))?;
        Ok(Self { binary, version, accelerator, tsc_khz })
    }

    /// Whether KVM really boots this kernel here. Takes seconds at most; the answer stays true until the machine boots again.
    pub async fn probe(binary: Option<PathBuf>, kernel: &KernelImage) -> Accelerator {
        probe::accelerator(&binary.unwrap_or_else(|| DEFAULT_BINARY.into()), kernel).await
    }

    /// Whether a VMM's own user may open `/dev/kvm` at all, and if not, why.
    pub fn kvm_within_reach() -> Result<(), String> {
        probe::kvm_access().map(|_| ())
    }

    /// Whether this kernel keeps a VMM from opening files that it was not given (Landlock).
    pub fn files_are_confined() -> bool {
        landlock::is_there()
    }

    pub fn tsc_khz(&self) -> u64 {
        self.tsc_khz
    }
}

#[async_trait]
impl Driver for Qemu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn isolation(&self) -> Isolation {
        match self.accelerator {
            Accelerator::Kvm => Isolation::Kvm,
            Accelerator::Tcg => Isolation::Emulation,
        }
    }

    fn stamp(&self) -> Stamp {
        match self.accelerator {
            Accelerator::Tcg => Stamp { tsc_khz: self.tsc_khz, ..Stamp::of(self) },
            // The guest's counter is scaled where the rates differ, but the processor is the host's.
            Accelerator::Kvm => Stamp { cpu: cpu::model(), ..Stamp::of(self) },
        }
    }

    async fn start(&self, launch: Launch, start: Start) -> Result<Arc<dyn Microvm>, Error> {
        let loading = matches!(start, Start::Load { .. });
        let plan = spawn::Plan {
            binary: self.binary.clone(),
            accelerator: self.accelerator,
            tsc_khz: self.tsc_khz,
            version: self.version.clone(),
            launch,
            start,
        };
        // Given up half way, this start leaves no process: the newborn, also one that nobody waits for any more, carries its own end.
        let newborn = tokio::task::spawn_blocking(move || spawn::spawn(plan))
            .await
            .map_err(|e| Error::io("spawn")(std::io::Error::other(e)))??;
        let spawn::Newborn { record, unborn, log } = newborn;
        let record = ProcessRecord { made_by: Some(self.stamp()), ..record };
        let process = Process::of_child(record.pid).map_err(Error::io("hold the VMM's process"))?;
        let vm = Vm { process, turn: Mutex::default(), console: Mutex::default(), record };
        let ready = async {
            vm.call("query-status", json!({}), START_LIMIT).await?;
            if loading { vm.wait_loaded().await } else { Ok(()) }
        };
        let outcome = tokio::select! {
            biased;
            outcome = ready => outcome,
            cause = vm.exited() => Err(Error::Stillborn(format!("{cause}: {}", log.complaints()))),
        };
        if let Err(error) = outcome {
            return Err(log.end_of(&vm.process, error).await);
        }
        unborn.disarm();
        Ok(Arc::new(vm))
    }

    async fn adopt(&self, record: &ProcessRecord) -> Result<Arc<dyn Microvm>, Error> {
        adopt(record)
    }
}

/// Takes over what another run of this program started, of whatever version.
pub fn adopt(record: &ProcessRecord) -> Result<Arc<dyn Microvm>, Error> {
    let process = Process::of_record(record)?;
    Ok(Arc::new(Vm { process, turn: Mutex::default(), console: Mutex::default(), record: record.clone() }))
}

struct Vm {
    record: ProcessRecord,
    process: Process,
    /// QEMU serves one client at a time. A connection is made for each errand and closed after it (a third of a millisecond): on one that
    /// is kept, events that a guest can cause pile up unread in QEMU, and a call that was given up leaves half an exchange behind.
    turn: Mutex<()>,
    console: Mutex<Vec<u8>>,
}

impl Vm {
    /// The limit is for everything: waiting for one's turn, the connection, the answer.
    async fn call(
        &self,
        command: &'static str,
        arguments: serde_json::Value,
        limit: Duration,
    ) -> Result<serde_json::Value, Error> {
        within(command, limit, async {
            let _turn = self.turn.lock().await;
            self.connect(command).await?.call(command, arguments).await
        })
        .await
    }

    async fn connect(&self, command: &'static str) -> Result<Qmp, Error> {
        if self.process.has_ended() {
            return Err(Error::Gone);
        }
        Qmp::connect(&self.record.dir).await.map_err(|cause| Error::Control { command, cause })
    }

    /// Device state and memory into new files. While this holds its turn nobody can make the vCPUs run on.
    async fn write_state(&self, target: &SaveTarget) -> Result<Saved, Error> {
        let limit = COMMAND_LIMIT;
        let _turn = within("stop", limit, async { Ok(self.turn.lock().await) }).await?;
        let mut qmp = within("stop", limit, self.connect("stop")).await?;
        let device = tokio::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&target.device).await;
        let device = device.map_err(Error::io("create the device state file"))?.into_std().await;
        let began = Instant::now();
        within("stop", limit, qmp.call("stop", json!({}))).await?;
        // The descriptor's access mode must be exactly O_WRONLY: an fdset matches it exactly. The set goes with its connection.
        let set = within("add-fd", limit, qmp.add_descriptor(&device)).await?;
        let (command, name) = ("xen-save-devices-state", format!("/dev/fdset/{set}"));
        within(command, LOAD_LIMIT, qmp.call(command, json!({"filename": name}))).await?;
        within("remove-fd", limit, qmp.call("remove-fd", json!({"fdset-id": set}))).await?;
        let (record, memory) = (self.record.clone(), target.memory.clone());
        let written = tokio::task::spawn_blocking(move || memory::write(&record, &memory)).await;
        let copied_bytes = written.map_err(|e| Error::io("copy the memory")(std::io::Error::other(e)))??;
        Ok(Saved { copied_bytes, stopped: began.elapsed() })
    }

    async fn wait_loaded(&self) -> Result<(), Error> {
        let began = Instant::now();
        loop {
            let status = self.call("query-status", json!({}), COMMAND_LIMIT).await?;
            match status["status"].as_str() {
                Some("inmigrate") if began.elapsed() < LOAD_LIMIT => tokio::time::sleep(Duration::from_millis(1)).await,
                Some("inmigrate") => return Err(Error::Silent { command: "load", limit: LOAD_LIMIT }),
                _ => return Ok(()),
            }
        }
    }
}

#[async_trait]
impl Microvm for Vm {
    fn record(&self) -> &ProcessRecord {
        &self.record
    }

    async fn stop_vcpus(&self) -> Result<(), Error> {
        self.call("stop", json!({}), COMMAND_LIMIT).await.map(|_| ())
    }

    async fn continue_vcpus(&self) -> Result<(), Error> {
        self.call("cont", json!({}), COMMAND_LIMIT).await.map(|_| ())
    }

    async fn save(&self, target: &SaveTarget) -> Result<Saved, Error> {
        target.refuse_existing().await?;
        let saved = self.write_state(target).await;
        if saved.is_err() {
            target.remove().await;
        }
        saved
    }

    async fn kill(&self) -> Result<(), Error> {
        self.process.kill().await
    }

    async fn stats(&self) -> Result<Stats, Error> {
        self.process.stats()
    }

    async fn console_tail(&self, bytes: usize) -> Result<Vec<u8>, Error> {
        let mut console = self.console.lock().await;
        // Reading takes the text out of QEMU's ring, so it is kept here.
        match self
            .call("ringbuf-read", json!({"device": "c0", "size": CONSOLE_BYTES, "format": "base64"}), COMMAND_LIMIT)
            .await
        {
            Ok(text) => console.extend(BASE64.decode(text.as_str().unwrap_or_default()).unwrap_or_default()),
            // What was read before the VMM ended is still worth showing.
            Err(_) if self.process.has_ended() => {}
            Err(e) => return Err(e),
        }
        let beyond = console.len().saturating_sub(CONSOLE_BYTES);
        console.drain(..beyond);
        Ok(console[console.len().saturating_sub(bytes)..].to_vec())
    }

    async fn exited(&self) -> ExitCause {
        self.process.exited().await
    }
}

async fn within<T>(
    command: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::time::timeout(limit, work).await.map_err(|_| Error::Silent { command, limit })?
}
