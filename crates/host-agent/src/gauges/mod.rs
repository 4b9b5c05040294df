//! What each sandbox takes of this host: processor, memory and disk, looked at every five seconds while it runs, and kept for a day in rings
//! ([`rings`]).
//!
//! They outlive pauses and the agent: each has a small file in `WRENN_DIR/metrics`, written once a minute and when the sandbox stops running,
//! without a word to the disk, because nobody acts on it. It lies beside the sandboxes' directories and not in them: whoever removes those
//! must not meet a file that comes back. With the sandbox its points go, at the next look.
//!
//! A look at a thousand sandboxes takes a thread some twenty milliseconds; the points of each take ten kilobytes.

mod reading;
mod rings;

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use microvm::ProcessRecord;
use model::ids::SandboxId;
use model::sandbox::Observed;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::durable;
use crate::sandbox::Sandboxes;
use crate::sandbox::steps::blocking;
use reading::{Reading, TICKS_PER_SECOND};
pub use rings::Point;
use rings::{FILE_BYTES_MAX, LOOK_SECONDS, Rings};

const LOOK_EVERY: Duration = Duration::from_secs(LOOK_SECONDS as u64);
/// What an agent that is killed forgets.
const WRITE_EVERY: Duration = Duration::from_secs(60);
/// In WRENN_DIR.
const DIRECTORY: &str = "metrics";

pub struct Gauges {
    directory: PathBuf,
    known: Mutex<HashMap<SandboxId, Known>>,
}

/// Of one sandbox.
struct Known {
    rings: Rings,
    /// The last look at the process that it has now.
    last: Option<Last>,
    /// What is in the file is older.
    is_unwritten: bool,
    written_at: Instant,
}

#[derive(Clone, Copy)]
struct Last {
    start_ticks: u64,
    at: Instant,
    cpu_ticks: u64,
}

/// One that runs.
struct Running {
    id: SandboxId,
    vcpus: u8,
    process: ProcessRecord,
    disk: PathBuf,
}

impl Gauges {
    pub fn new(dir: &Path) -> Arc<Self> {
        Arc::new(Self { directory: dir.join(DIRECTORY), known: Mutex::default() })
    }

    /// All that was kept of any sandbox. For when none is left.
    pub fn remove_all(dir: &Path) -> io::Result<()> {
        match std::fs::remove_dir_all(dir.join(DIRECTORY)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// Looks at what runs, for ever.
    pub async fn watch(self: Arc<Self>, sandboxes: Arc<Sandboxes>, stop: CancellationToken) {
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = ticks.tick() => {}
            }
            // Read first: before the scan at the start has ended, one that is missing may be there.
            let is_complete = sandboxes.is_complete();
            let (mut all, mut running) = (HashSet::new(), Vec::new());
            for view in sandboxes.list() {
                all.insert(view.id.clone());
                if let (Observed::Running, Some(process)) = (view.observed, view.process) {
                    let disk = sandboxes.context().journal.directory(&view.id).join("disk");
                    running.push(Running { id: view.id, vcpus: view.vcpus, process, disk });
                }
            }
            let gauges = self.clone();
            blocking(move || {
                gauges.look(&running);
                if is_complete {
                    gauges.forget_but(&all);
                }
            })
            .await;
        }
        let gauges = self.clone();
        blocking(move || gauges.write(|_| true)).await;
    }

    /// The last `range_sec` of a sandbox: up to now while it runs, else up to when it last ran.
    pub async fn points(&self, id: &SandboxId, range_sec: u32, is_running: bool) -> Vec<Point> {
        let of = |rings: &Rings| {
            let until = if is_running { Some(now_unix()) } else { rings.last_at() };
            until.map(|until| rings.points(range_sec, until)).unwrap_or_default()
        };
        if let Some(known) = self.lock().get(id) {
            return of(&known.rings);
        }
        // Paused since before this start of the agent.
        let file = self.file(id);
        blocking(move || load(&file)).await.as_ref().map(of).unwrap_or_default()
    }

    /// Blocks. The lock is held for sums alone, not for what is read and written.
    fn look(&self, running: &[Running]) {
        for sandbox in running {
            let is_new = !self.lock().contains_key(&sandbox.id);
            if is_new {
                let known = Known {
                    rings: load(&self.file(&sandbox.id)).unwrap_or_default(),
                    last: None,
                    is_unwritten: false,
                    written_at: Instant::now(),
                };
                self.lock().insert(sandbox.id.clone(), known);
            }
            let Some(reading) = reading::read(&sandbox.process, &sandbox.disk) else { continue };
            if let Some(known) = self.lock().get_mut(&sandbox.id) {
                known.take(sandbox, reading, Instant::now(), now_unix());
            }
        }
        let runs: HashSet<&SandboxId> = running.iter().map(|sandbox| &sandbox.id).collect();
        let now = Instant::now();
        self.write(|(id, known)| !runs.contains(id) || now - known.written_at >= WRITE_EVERY);
    }

    /// Writes what has changed of those that are due.
    fn write(&self, is_due: impl Fn((&SandboxId, &Known)) -> bool) {
        let mut files = Vec::new();
        for (id, known) in self.lock().iter_mut() {
            if known.is_unwritten && is_due((id, known)) {
                files.push((self.file(id), known.rings.to_bytes()));
                known.is_unwritten = false;
                known.written_at = Instant::now();
            }
        }
        if files.is_empty() {
            return;
        }
        let mut failed = std::fs::create_dir_all(&self.directory).err();
        for (file, bytes) in files {
            failed = durable::note(&file, &bytes, 0o600).err().or(failed);
        }
        if let Some(error) = failed {
            warn!("what sandboxes take could not be written down: {error}");
        }
    }

    /// Those of sandboxes that have ended go, also of such as have not run since this agent's start. Blocks.
    fn forget_but(&self, all: &HashSet<SandboxId>) {
        self.lock().retain(|id, _| all.contains(id));
        for entry in std::fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let id = entry.file_name().to_str().and_then(|name| name.parse::<SandboxId>().ok());
            if !id.is_some_and(|id| all.contains(&id))
                && let Err(error) = durable::remove(&entry.path())
            {
                warn!("the metrics of a sandbox that has ended stay: {error}");
            }
        }
    }

    fn file(&self, id: &SandboxId) -> PathBuf {
        self.directory.join(id.as_str())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SandboxId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// The first look at a process says how much it has worked, and not since when the sandbox has been its own: a rate needs a second one.
    fn take(&mut self, sandbox: &Running, reading: Reading, now: Instant, unix: u32) {
        let start_ticks = sandbox.process.start_ticks;
        let last = self.last.replace(Last { start_ticks, at: now, cpu_ticks: reading.cpu_ticks });
        let Some(last) = last.filter(|last| last.start_ticks == start_ticks) else { return };
        let ticks = reading.cpu_ticks.saturating_sub(last.cpu_ticks) as f64;
        let seconds = (now - last.at).as_secs_f64().max(0.001);
        let cpus = f64::from(sandbox.vcpus.max(1));
        let kib = |kib: u64| u32::try_from(kib).unwrap_or(u32::MAX);
        self.rings.push(Point {
            at: unix,
            // The VMM's own threads may take more than the guest may.
            cpu_pct: (ticks / TICKS_PER_SECOND / seconds / cpus * 100.0).clamp(0.0, 100.0) as f32,
            memory_kib: kib(reading.memory_kib),
            disk_kib: kib(reading.disk_kib),
        });
        self.is_unwritten = true;
    }
}

fn load(file: &Path) -> Option<Rings> {
    Rings::of_bytes(&durable::read(file, FILE_BYTES_MAX).ok()?)
}

fn now_unix() -> u32 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u32::try_from(now.as_secs()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(n: u128, disk: &Path) -> Running {
        let pid = std::process::id() as i32;
        let process = ProcessRecord {
            driver: "fake".to_owned(),
            vmm_version: String::new(),
            pid,
            start_ticks: microvm::process::start_ticks(pid).unwrap(),
            boot_id: String::new(),
            dir: PathBuf::new(),
            memory: PathBuf::new(),
            memory_private: false,
            memory_mib: 1,
            made_by: None,
        };
        Running { id: SandboxId::from_random(n), vcpus: 1, process, disk: disk.to_owned() }
    }

    #[tokio::test]
    async fn points_outlive_pauses_and_agents_and_end_with_the_sandbox() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        std::fs::write(&disk, vec![1; 1 << 20]).unwrap();
        let sandbox = running(1, &disk);
        let id = sandbox.id.clone();
        let gauges = Gauges::new(dir.path());
        gauges.look(std::slice::from_ref(&sandbox));
        assert!(gauges.points(&id, 600, true).await.is_empty(), "one look gives no rate");
        gauges.look(std::slice::from_ref(&sandbox));
        let points = gauges.points(&id, 600, true).await;
        assert_eq!(points.len(), 1);
        assert!(points[0].memory_kib > 100 && points[0].disk_kib >= 1024, "{points:?}");
        assert!((0.0..=100.0).contains(&points[0].cpu_pct), "{points:?}");
        assert!(!gauges.file(&id).exists(), "it is not written at every look");

        // Paused: it is written, and another agent knows it.
        gauges.look(&[]);
        let other = Gauges::new(dir.path());
        assert_eq!(other.points(&id, 86_400, false).await.len(), 1);
        // It runs again, as another process: the first look at that gives no point, and takes none away.
        let mut resumed = running(1, &disk);
        resumed.process.start_ticks += 1;
        other.look(std::slice::from_ref(&resumed));
        other.look(std::slice::from_ref(&sandbox));
        assert_eq!(other.points(&id, 600, false).await.len(), 1);
        other.look(std::slice::from_ref(&sandbox));
        assert_eq!(other.points(&id, 600, false).await.len(), 2);

        let all = HashSet::from([id.clone()]);
        other.forget_but(&all);
        assert!(other.file(&id).exists());
        other.forget_but(&HashSet::new());
        assert!(!other.file(&id).exists() && other.points(&id, 86_400, false).await.is_empty());
        // Also where this agent has never looked at it.
        std::fs::write(other.file(&id), "x").unwrap();
        std::fs::write(other.directory.join("stray.tmp"), "x").unwrap();
        other.forget_but(&HashSet::new());
        assert_eq!(std::fs::read_dir(&other.directory).unwrap().count(), 0);
        Gauges::remove_all(dir.path()).unwrap();
        Gauges::remove_all(dir.path()).unwrap();
    }

    #[test]
    fn a_thousand_sandboxes_are_looked_at_in_a_part_of_a_second() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        std::fs::write(&disk, "x").unwrap();
        let all: Vec<Running> = (0..1000).map(|n| running(n, &disk)).collect();
        let gauges = Gauges::new(dir.path());
        gauges.look(&all);
        let began = Instant::now();
        gauges.look(&all);
        let took = began.elapsed();
        println!("a look at a thousand: {took:?}");
        let began = Instant::now();
        gauges.write(|_| true);
        println!("writing a thousand: {:?}", began.elapsed());
        assert!(took < Duration::from_secs(2), "{took:?}");
    }
}
