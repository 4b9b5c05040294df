//! Firecracker: the driver for production. Always on KVM, always in its jailer: a user, a mount, pid and network namespace and limits of
//! its own, MMIO transport, no vsock.
//!
//! ```text
//!   api       its HTTP API, typed
//!   jail      from a launch to a jailed process
//!   memory    saves: the dirty pages onto a clone of what was saved before
//!   pipes     console and counters, bounded
//!   versions  releases side by side, and those that are refused
//! ```

mod api;
mod jail;
mod memory;
mod pipes;
mod versions;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::sync::{Mutex, OwnedMutexGuard};

pub use api::HugePages;
use api::{Call, Line, TokenBucket};
use jail::name;
use pipes::Tail;
pub use versions::{Release, Version};

use crate::process::{ExitCause, Process, ProcessRecord, Unborn};
use crate::{
    Driver, Error, GUEST_MAC, Isolation, Jail, KernelImage, Launch, Microvm, SaveTarget, Saved, Shape, Stamp, Start,
    Stats, cpu, proof,
};

pub const NAME: &str = "firecracker";
/// The interface's name towards the API; saved states hold it.
const CARD: &str = "eth0";
/// It answers within milliseconds; this is for a machine that is far overloaded.
const COMMAND_LIMIT: Duration = Duration::from_secs(10);
/// From the jailer's end to the first answer (4 to 20 ms measured).
const START_LIMIT: Duration = Duration::from_secs(20);
/// Loading a kernel or a saved state.
const LOAD_LIMIT: Duration = Duration::from_secs(30);
/// Between looks for the control socket.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// Of the console's text; what is more is dropped by the VMM, so that a guest that shouts costs nothing.
const CONSOLE_BYTES_PER_SECOND: u64 = 256 * 1024;
const BALLOON_STATS_SEC: u16 = 5;
/// Of counters that were asked for.
const COUNTERS_LIMIT: Duration = Duration::from_secs(2);
/// What an operator may choose.
#[derive(Debug, Clone, Default)]
pub struct Options {
    pub huge_pages: HugePages,
    /// Of a guest's disk, both ways together. None: no limit.
    pub disk_bytes_per_second: Option<u64>,
    /// Of a guest's network, each way.
    pub network_bytes_per_second: Option<u64>,
    /// Guests do not give freed memory back by themselves.
    pub keeps_freed_memory: bool,
}

pub struct Firecracker {
    /// The first makes new microVMs.
    releases: Vec<Release>,
    version: String,
    options: Options,
    cpu: String,
}

impl Firecracker {
    /// `older` are further releases, for states that they have saved. The caller has asked [`Version::check`] about each.
    pub fn new(release: Release, older: Vec<Release>, options: Options) -> Self {
        let version = release.version.to_string();
        let mut releases = vec![release];
        releases.extend(older);
        Self { releases, version, options, cpu: cpu::model() }
    }

    /// Whether KVM really boots this kernel here, in the jail. `dir` is a new directory for it alone; `jail` a user for it alone.
    pub async fn probe(&self, kernel: &KernelImage, dir: PathBuf, jail: Jail) -> Result<(), String> {
        let (disk, memory) = (dir.join("probe-disk"), dir.join("probe-memory"));
        let shape = Shape { vcpus: 1, memory_mib: 128 };
        let files = [(&disk, 1 << 20), (&memory, u64::from(shape.memory_mib) << 20)];
        for (path, bytes) in files {
            let made = std::fs::File::create_new(path).and_then(|file| file.set_len(bytes));
            let owned = made.and_then(|()| std::os::unix::fs::chown(path, Some(jail.uid), Some(jail.gid)));
            owned.map_err(|e| format!("{}: {e}", path.display()))?;
        }
        let launch = Launch { dir, shape, disk, memory, tap: None, jail };
        let start = Start::Boot { kernel: kernel.clone(), arguments: String::new() };
        let vm = self.start(launch, start).await.map_err(|e| e.to_string())?;
        // Given up half way, it leaves no guest.
        let held = Unborn::of(vm.record().pid).map_err(|e| e.to_string())?;
        let deadline = Instant::now() + proof::BOOT_LIMIT;
        let seen = loop {
            let console = vm.console_tail(usize::MAX).await.unwrap_or_default();
            let text = String::from_utf8_lossy(&console).into_owned();
            if proof::is_booted(&text) {
                break Ok(());
            }
            if Instant::now() > deadline {
                let limit = proof::BOOT_LIMIT;
                let last = text.trim_end().rsplit('\n').next().unwrap_or_default();
                break Err(format!("a guest kernel did not get to its end in {limit:?}; it said last: {last:?}"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        vm.kill().await.map_err(|e| e.to_string())?;
        held.disarm();
        seen
    }

    fn release(&self, version: Option<&str>) -> Result<&Release, Error> {
        let wanted = |release: &&Release| version.is_none_or(|version| release.version.to_string() == version);
        self.releases.iter().find(wanted).ok_or_else(|| Error::Start {
            reason: format!("find Firecracker {}", version.unwrap_or_default()),
            cause: std::io::ErrorKind::NotFound.into(),
        })
    }
}

#[async_trait]
impl Driver for Firecracker {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn isolation(&self) -> Isolation {
        Isolation::Kvm
    }

    fn stamp(&self) -> Stamp {
        Stamp { cpu: self.cpu.clone(), ..Stamp::of(self) }
    }

    fn loads(&self, saved: &Stamp) -> Result<(), String> {
        let version = if self.release(Some(&saved.version)).is_ok() { &saved.version } else { &self.version };
        Stamp { version: version.clone(), ..self.stamp() }.loads(saved)
    }

    fn boots_into_its_file(&self) -> bool {
        false
    }

    async fn start(&self, launch: Launch, start: Start) -> Result<Arc<dyn Microvm>, Error> {
        let version = match &start {
            Start::Boot { .. } => None,
            Start::Load { made_by, .. } => made_by.as_ref().map(|stamp| stamp.version.as_str()),
        };
        let release = self.release(version)?.clone();
        // Given up half way, this start leaves no process: the newborn, also one that nobody waits for any more, carries its own end.
        let (newborn, launch, start) = tokio::task::spawn_blocking(move || {
            let newborn = jail::spawn(&release, &launch, &start)?;
            Ok::<_, Error>((newborn, launch, start))
        })
        .await
        .map_err(|e| Error::io("spawn")(std::io::Error::other(e)))??;
        let jail::Newborn { record, unborn, log, is_closed } = newborn;
        let made_by = Stamp { version: record.vmm_version.clone(), ..self.stamp() };
        let record = ProcessRecord { made_by: Some(made_by), ..record };
        let root = jail::root(&record.dir);
        let tail = |name| Tail::open(&root, name).map_err(Error::io("open the VMM's pipes"));
        let vm = Vm {
            console: tail(name::SERIAL)?,
            counters: tail(name::METRICS)?,
            turn: Arc::default(),
            control: Arc::new(Control { process: Process::of_record(&record)?, record }),
        };
        let outcome = tokio::select! {
            biased;
            outcome = self.set_up(&vm.control, is_closed, &launch, &start) => outcome,
            cause = vm.exited() => Err(Error::Stillborn(format!("{cause}: {}", log.complaints()))),
        };
        if let Err(error) = outcome {
            return Err(log.end_of(&vm.control.process, error).await);
        }
        unborn.disarm();
        Ok(Arc::new(vm))
    }

    async fn adopt(&self, record: &ProcessRecord) -> Result<Arc<dyn Microvm>, Error> {
        adopt(record)
    }
}

/// Takes over what another run of this program started, of whatever release.
pub fn adopt(record: &ProcessRecord) -> Result<Arc<dyn Microvm>, Error> {
    let root = jail::root(&record.dir);
    Ok(Arc::new(Vm {
        console: Tail::follow(&root, name::SERIAL),
        counters: Tail::follow(&root, name::METRICS),
        turn: Arc::default(),
        control: Arc::new(Control { process: Process::of_record(record)?, record: record.clone() }),
    }))
}

impl Firecracker {
    /// From the first answer to a guest that runs, or stands still where it was saved.
    async fn set_up(&self, vm: &Control, is_closed: bool, launch: &Launch, start: &Start) -> Result<(), Error> {
        let mut vm = vm.wait_ready().await?;
        if !is_closed {
            // It has made its socket, the last file that is its own to make.
            let root = vm.control.root();
            let closed = tokio::task::spawn_blocking(move || jail::close(&root)).await;
            closed.map_err(std::io::Error::other).and_then(|closed| closed).map_err(Error::io("close the jail"))?;
        }
        let vm = &mut vm;
        // Not in a saved state, and refused after a load.
        let metrics = api::Metrics { metrics_path: name::METRICS };
        vm.put("/metrics", &metrics).await?;
        let serial = api::Serial {
            serial_out_path: name::SERIAL,
            rate_limiter: TokenBucket::per_second(CONSOLE_BYTES_PER_SECOND),
        };
        vm.put("/serial", &serial).await?;
        match start {
            Start::Boot { kernel, arguments } => self.boot(vm, launch, kernel, arguments).await,
            Start::Load { .. } => {
                let overrides = launch.tap.iter();
                let load = api::SnapshotLoad {
                    snapshot_path: name::DEVICE,
                    mem_backend: api::MemoryBackend { backend_type: "File", backend_path: name::MEMORY },
                    track_dirty_pages: true,
                    resume_vm: false,
                    clock_realtime: false,
                    network_overrides: overrides
                        .map(|tap| api::NetworkOverride { iface_id: CARD, host_dev_name: &tap.name })
                        .collect(),
                };
                vm.put_within("/snapshot/load", &load, LOAD_LIMIT).await?;
                self.limit(vm, launch).await
            }
        }
    }

    /// The present limits upon a machine that was saved with others; a bucket of no size is no limit.
    async fn limit(&self, vm: &mut Setup<'_>, launch: &Launch) -> Result<(), Error> {
        let now = |bytes: Option<u64>| limiter(bytes).unwrap_or(api::RateLimiter { bandwidth: TokenBucket::NONE });
        let rate_limiter = now(self.options.disk_bytes_per_second);
        vm.patch("/drives/disk", &json!({ "drive_id": name::DISK, "rate_limiter": rate_limiter })).await?;
        if launch.tap.is_some() {
            let limiter = now(self.options.network_bytes_per_second);
            let card = json!({ "iface_id": CARD, "rx_rate_limiter": limiter, "tx_rate_limiter": limiter });
            vm.patch("/network-interfaces/eth0", &card).await?;
        }
        Ok(())
    }

    async fn boot(
        &self,
        vm: &mut Setup<'_>,
        launch: &Launch,
        kernel: &KernelImage,
        arguments: &str,
    ) -> Result<(), Error> {
        let Shape { vcpus, memory_mib } = launch.shape;
        let machine = api::MachineConfig {
            vcpu_count: vcpus,
            mem_size_mib: memory_mib,
            smt: false,
            // So that a save costs what was changed.
            track_dirty_pages: true,
            // They come in pairs of MiB.
            huge_pages: if memory_mib.is_multiple_of(2) { self.options.huge_pages } else { HugePages::None },
        };
        vm.put("/machine-config", &machine).await?;
        let source = api::BootSource {
            kernel_image_path: name::KERNEL,
            boot_args: &kernel_line(arguments),
            initrd_path: kernel.initramfs.as_ref().map(|_| name::INITRAMFS),
        };
        vm.put("/boot-source", &source).await?;
        let drive = api::Drive {
            drive_id: name::DISK,
            path_on_host: name::DISK,
            is_root_device: false,
            is_read_only: false,
            cache_type: "Writeback",
            io_engine: "Sync",
            rate_limiter: limiter(self.options.disk_bytes_per_second),
        };
        vm.put("/drives/disk", &drive).await?;
        if let Some(tap) = &launch.tap {
            let limiter = limiter(self.options.network_bytes_per_second);
            let card = api::NetworkInterface {
                iface_id: CARD,
                guest_mac: GUEST_MAC,
                host_dev_name: &tap.name,
                rx_rate_limiter: limiter,
                tx_rate_limiter: limiter,
            };
            vm.put("/network-interfaces/eth0", &card).await?;
            vm.put("/mmds/config", &api::MmdsConfig { version: "V2", network_interfaces: &[CARD] }).await?;
        }
        vm.put("/entropy", &json!({})).await?;
        let balloon = api::Balloon {
            amount_mib: 0,
            deflate_on_oom: true,
            stats_polling_interval_s: BALLOON_STATS_SEC,
            free_page_reporting: !self.options.keeps_freed_memory,
        };
        vm.put("/balloon", &balloon).await?;
        vm.put_within("/actions", &api::Action { action_type: "InstanceStart" }, LOAD_LIMIT).await
    }
}

fn limiter(bytes_per_second: Option<u64>) -> Option<api::RateLimiter> {
    bytes_per_second.map(|bytes| api::RateLimiter { bandwidth: TokenBucket::per_second(bytes) })
}

/// The console is the first serial port; without `pci=off` the kernel looks for a bus that is not there.
fn kernel_line(more: &str) -> String {
    let common = "console=ttyS0 reboot=k panic=-1 pci=off root=/dev/vda rw rootfstype=ext4 random.trust_cpu=on 8250.nr_uarts=1 quiet";
    format!("{common} {more}").trim_end().to_owned()
}

struct Vm {
    control: Arc<Control>,
    console: Tail,
    counters: Tail,
    /// One request at a time; and while a save has it, nobody can make the vCPUs run on.
    turn: Arc<Mutex<()>>,
}

/// What it takes to speak with a VMM.
struct Control {
    record: ProcessRecord,
    process: Process,
}

impl Control {
    fn root(&self) -> PathBuf {
        jail::root(&self.record.dir)
    }

    async fn wait_ready(&self) -> Result<Setup<'_>, Error> {
        let call = Call { path: "/", limit: COMMAND_LIMIT };
        let deadline = Instant::now() + START_LIMIT;
        let ask = async || {
            let mut line = Line::open(&self.root(), self.record.pid, call).await?;
            let instance = line.get::<api::Instance>(call).await?;
            Ok::<_, Error>((line, instance))
        };
        loop {
            match ask().await {
                Ok((line, api::Instance { state, vmm_version })) => {
                    if (state.as_str(), &vmm_version) == ("Not started", &self.record.vmm_version) {
                        return Ok(Setup { control: self, line });
                    }
                    let reason = format!("it is {vmm_version} ({state}) and not {}", self.record.vmm_version);
                    return Err(Error::Refused { command: "/", reason });
                }
                Err(Error::Control { .. }) if Instant::now() < deadline => tokio::time::sleep(LOOK_AGAIN).await,
                Err(Error::Control { .. }) => return Err(Error::Silent { command: "/", limit: START_LIMIT }),
                Err(other) => return Err(other),
            }
        }
    }

    async fn put(&self, path: &'static str, body: &impl serde::Serialize) -> Result<(), Error> {
        self.put_within(path, body, COMMAND_LIMIT).await
    }

    async fn put_within(&self, path: &'static str, body: &impl serde::Serialize, limit: Duration) -> Result<(), Error> {
        let done = api::put(&self.root(), self.record.pid, Call { path, limit }, body).await;
        self.told(done)
    }

    async fn set_state(&self, state: &'static str) -> Result<(), Error> {
        let call = Call { path: "/vm", limit: COMMAND_LIMIT };
        self.told(api::patch(&self.root(), self.record.pid, call, &api::VmState { state }).await)
    }

    /// A VMM that has ended is not one that does not answer.
    fn told<T>(&self, outcome: Result<T, Error>) -> Result<T, Error> {
        match outcome {
            Err(Error::Control { .. }) if self.process.has_ended() => Err(Error::Gone),
            other => other,
        }
    }
}

/// A VMM that is told what it is to be, over one connection.
struct Setup<'a> {
    control: &'a Control,
    line: Line,
}

impl Setup<'_> {
    async fn put(&mut self, path: &'static str, body: &impl serde::Serialize) -> Result<(), Error> {
        self.put_within(path, body, COMMAND_LIMIT).await
    }

    async fn put_within(
        &mut self,
        path: &'static str,
        body: &impl serde::Serialize,
        limit: Duration,
    ) -> Result<(), Error> {
        let done = self.line.put(Call { path, limit }, body).await;
        self.control.told(done)
    }

    async fn patch(&mut self, path: &'static str, body: &impl serde::Serialize) -> Result<(), Error> {
        let done = self.line.patch(Call { path, limit: COMMAND_LIMIT }, body).await;
        self.control.told(done)
    }
}

impl Vm {
    async fn my_turn(&self, command: &'static str) -> Result<OwnedMutexGuard<()>, Error> {
        if self.control.process.has_ended() {
            return Err(Error::Gone);
        }
        let turn = tokio::time::timeout(COMMAND_LIMIT, self.turn.clone().lock_owned()).await;
        turn.map_err(|_| Error::Silent { command, limit: COMMAND_LIMIT })
    }
}

#[async_trait]
impl Microvm for Vm {
    fn record(&self) -> &ProcessRecord {
        &self.control.record
    }

    async fn stop_vcpus(&self) -> Result<(), Error> {
        let _turn = self.my_turn("/vm").await?;
        self.control.set_state("Paused").await
    }

    async fn continue_vcpus(&self) -> Result<(), Error> {
        let _turn = self.my_turn("/vm").await?;
        self.control.set_state("Resumed").await
    }

    async fn save(&self, target: &SaveTarget) -> Result<Saved, Error> {
        target.refuse_existing().await?;
        let turn = self.my_turn("/snapshot/create").await?;
        let (vm, target) = (self.control.clone(), target.clone());
        // A task: whoever gives this up must not leave half a save behind into which the next one is made.
        let saving = tokio::spawn(async move {
            let _turn = turn;
            let began = Instant::now();
            vm.set_state("Paused").await?;
            let saved = memory::save(&vm, &target).await;
            if saved.is_err() {
                target.remove().await;
            }
            Ok(Saved { copied_bytes: saved?, stopped: began.elapsed() })
        });
        saving.await.map_err(|e| Error::io("save")(std::io::Error::other(e)))?
    }

    async fn kill(&self) -> Result<(), Error> {
        self.control.process.kill().await
    }

    async fn stats(&self) -> Result<Stats, Error> {
        self.control.process.stats()
    }

    async fn console_tail(&self, bytes: usize) -> Result<Vec<u8>, Error> {
        Ok(self.console.last(bytes))
    }

    async fn exited(&self) -> ExitCause {
        self.control.process.exited().await
    }

    fn writes_into_its_file(&self) -> bool {
        false
    }

    async fn set_metadata(&self, metadata: &Value) -> Result<(), Error> {
        let _turn = self.my_turn("/mmds").await?;
        self.control.put("/mmds", metadata).await
    }

    async fn counters(&self) -> Result<Option<Value>, Error> {
        let before = self.counters.count();
        {
            let _turn = self.my_turn("/actions").await?;
            self.control.put("/actions", &api::Action { action_type: "FlushMetrics" }).await?;
        }
        let deadline = Instant::now() + COUNTERS_LIMIT;
        while Instant::now() < deadline {
            if self.counters.count() > before
                && let Some(counters) = last_line(&self.counters.last(usize::MAX))
            {
                return Ok(Some(counters));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Err(Error::Silent { command: "FlushMetrics", limit: COUNTERS_LIMIT })
    }
}

/// The last whole line.
fn last_line(text: &[u8]) -> Option<Value> {
    let text = text.strip_suffix(b"\n")?;
    let begin = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    serde_json::from_slice(&text[begin..]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_the_last_whole_line() {
        assert_eq!(last_line(b"{\"a\":1}\n{\"a\":2}\n").unwrap()["a"], 2);
        assert_eq!(last_line(b"{\"a\":1}\n{\"a\":"), None);
        assert_eq!(last_line(b"\"a\":1}\n{\"a\":3}\n").unwrap()["a"], 3, "the beginning may be cut");
        assert_eq!(last_line(b""), None);
    }
}
