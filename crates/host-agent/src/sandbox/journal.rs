//! `state.json` of a sandbox and the tombstones of killed ones: written whole, checked whole.
//!
//! What is damaged is moved to quarantine with the reason beside it and stops nobody else. What could not be read now, or was written by a
//! newer agent, is neither: it may be whole, and its microVM may run. Nothing here removes customer data.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use model::ids::{SandboxId, SnapshotId};
use tracing::{error, warn};

use super::mark;
use super::state::{Record, Tombstone};
use crate::durable;
use crate::sealed::{self, Broken};

/// The version of the format that is written, and the only one that is read.
const FORMAT: u32 = 1;
/// Envs are at most 32 KiB; ten times that for everything is generous.
const FILE_BYTES_MAX: u64 = 512 * 1024;
/// A wish that is a month late is refused by its epoch and revision in the control plane; the tombstone needs no longer life.
const TOMBSTONE_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("write the state of sandbox {id}")]
    Write {
        id: SandboxId,
        #[source]
        cause: io::Error,
    },
    #[error("remove the files of sandbox {id}")]
    Remove {
        id: SandboxId,
        #[source]
        cause: io::Error,
    },
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error(
        "{path} has format {format} and this agent knows formats up to {FORMAT}: a newer wrenn-agent wrote it; start that one"
    )]
    Newer { path: PathBuf, format: u32 },
    #[error("move {path} to quarantine")]
    Quarantine {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
}

impl JournalError {
    /// The pool has no room: a kill goes on without its note, because it is the kill that makes room.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Write { cause, .. } => {
                matches!(cause.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            _ => false,
        }
    }

    /// Starting again does not help: somebody has to change something first.
    pub fn is_config(&self) -> bool {
        matches!(self, Self::Newer { .. })
    }
}

/// Why a file is not a state file of this agent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    #[error("state.json is not whole: {0}")]
    Damaged(String),
    #[error("state.json has format {0}, which no agent ever wrote")]
    Format(u32),
    #[error("state.json belongs to another sandbox or agent")]
    Foreign,
    #[error("there are files but no state.json")]
    Missing,
}

/// The directory of a pool that holds one directory per sandbox.
pub const SANDBOXES: &str = "sandboxes";
pub(super) const STATE_FILE: &str = "state.json";

/// The directories of all sandboxes of one pool.
#[derive(Debug, Clone)]
pub struct Journal {
    pub sandboxes: PathBuf,
    pub tombstones: PathBuf,
    pub quarantine: PathBuf,
    pub tag: String,
}

/// What one directory of the pool turned out to be.
#[derive(Debug)]
pub enum Found {
    Sandbox(Box<Record>),
    /// Whatever it was, it cannot be acted on. A scan has moved it away.
    Quarantined {
        name: String,
        why: Unreadable,
        /// Whose its files are: the user of its VMM, which may live.
        uids: BTreeSet<u32>,
    },
}

enum Read {
    Record(Box<Record>),
    Nothing,
    Unreadable(Unreadable),
}

impl Journal {
    /// Makes the directories below the pool.
    pub fn open(pool: &Path, tag: &str) -> io::Result<Self> {
        let journal = Self {
            sandboxes: pool.join(SANDBOXES),
            tombstones: pool.join("tombstones"),
            quarantine: pool.join("quarantine"),
            tag: tag.to_owned(),
        };
        for directory in [&journal.sandboxes, &journal.tombstones, &journal.quarantine] {
            fs::create_dir_all(directory)?;
            // A VMM opens what it has through descriptors, so nobody but root passes here.
            fs::set_permissions(directory, fs::Permissions::from_mode(0o700))?;
        }
        durable::sync_directory(pool)?;
        Ok(journal)
    }

    pub fn directory(&self, id: &SandboxId) -> PathBuf {
        self.sandboxes.join(id.as_str())
    }

    /// When this returns, a power loss cannot take it back: but for what a new sandbox begins with, of which nobody is told before
    /// something else is written.
    pub fn write(&self, record: &Record) -> Result<(), JournalError> {
        let failed = |cause| JournalError::Write { id: record.id.clone(), cause };
        let directory = self.directory(&record.id);
        let is_new = match fs::create_dir(&directory) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(failed(error)),
        };
        let state = directory.join(STATE_FILE);
        let is_begun = record.phase.is_begun();
        if is_new && is_begun {
            mark::put(&directory).map_err(failed)?;
        }
        let is_unsettled = is_new || mark::is_there(&directory).map_err(failed)?;
        if is_unsettled && is_begun {
            return durable::note(&state, &encode(record), 0o600).map_err(failed);
        }
        durable::write(&state, &encode(record), 0o600).map_err(failed)?;
        if is_unsettled {
            // Last: the journal of the file system has it with the file by then, and there is hardly anything left to wait for.
            durable::sync_directory(&self.sandboxes).map_err(failed)?;
            if let Err(error) = mark::remove(&directory) {
                warn!(sandbox.id = %record.id, "the mark of a sandbox that was begun stays: {error}");
            }
        }
        Ok(())
    }

    /// Removes what is left of a sandbox's directory, the state file last, so that a crash in between leaves a readable state.
    pub fn remove(&self, id: &SandboxId) -> Result<(), JournalError> {
        let failed = |cause| JournalError::Remove { id: id.clone(), cause };
        let directory = self.directory(id);
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(failed)?,
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            if entry.file_name() == STATE_FILE {
                continue;
            }
            let kind = entry.file_type().map_err(failed)?;
            let removed =
                if kind.is_dir() { durable::remove_tree(&entry.path()) } else { durable::remove(&entry.path()) };
            removed.map_err(failed)?;
        }
        durable::remove(&directory.join(STATE_FILE)).map_err(failed)?;
        fs::remove_dir(&directory).map_err(failed)?;
        durable::sync_directory(&self.sandboxes).map_err(failed)
    }

    pub fn bury(&self, tombstone: &Tombstone) -> Result<(), JournalError> {
        let bytes = serde_json::to_vec(tombstone).expect("a tombstone has only text and numbers");
        durable::write(&self.tombstones.join(tombstone.id.as_str()), &bytes, 0o600)
            .map_err(|cause| JournalError::Write { id: tombstone.id.clone(), cause })
    }

    /// The tombstone of a killed sandbox. A damaged one still says that it was killed.
    pub fn tombstone(&self, id: &SandboxId) -> Result<Option<Tombstone>, JournalError> {
        let path = self.tombstones.join(id.as_str());
        match durable::read(&path, FILE_BYTES_MAX) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes).unwrap_or_else(|_| Tombstone {
                id: id.clone(),
                fence: super::state::Fence { epoch: u64::MAX, revision: u64::MAX, operation: String::new() },
            }))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(JournalError::Read { path, cause }),
        }
    }

    /// No late call makes that snapshot again.
    pub fn bury_snapshot(&self, id: SnapshotId) -> io::Result<()> {
        durable::write(&self.tombstones.join(id.to_string()), b"", 0o600)
    }

    pub fn is_buried(&self, id: SnapshotId) -> io::Result<bool> {
        self.tombstones.join(id.to_string()).try_exists()
    }

    /// Removes tombstones whose time is over. Best effort: what stays only takes room.
    pub fn prune_tombstones(&self, now: SystemTime) -> usize {
        let Ok(entries) = fs::read_dir(&self.tombstones) else { return 0 };
        entries
            .flatten()
            .filter(|entry| {
                let age =
                    entry.metadata().and_then(|meta| meta.modified()).ok().and_then(|at| now.duration_since(at).ok());
                age.is_some_and(|age| age > TOMBSTONE_LIFE) && durable::remove(&entry.path()).is_ok()
            })
            .count()
    }

    /// Reads every sandbox of the pool. One that is damaged goes to quarantine.
    pub fn scan(&self) -> Result<Vec<Found>, JournalError> {
        let found = self.look()?;
        for one in &found {
            if let Found::Quarantined { name, why, .. } = one {
                // Where it cannot be moved it stays in the way of nobody: only its own id is affected.
                if let Err(error) = self.put_aside(&self.sandboxes.join(name), name, why) {
                    error!("{error}: {:?}", std::error::Error::source(&error).map(ToString::to_string));
                }
            }
        }
        Ok(found)
    }

    /// The same, and everything stays where it is; only directories with nothing in them go.
    pub fn look(&self) -> Result<Vec<Found>, JournalError> {
        let failed = |cause| JournalError::Read { path: self.sandboxes.clone(), cause };
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.sandboxes).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            match self.read(&path, &name)? {
                Read::Record(record) => found.push(Found::Sandbox(record)),
                // Made or emptied, but its state was not there yet or any more: nothing of it can exist.
                Read::Nothing => {
                    let removed = durable::remove_tree(&path);
                    if let Err(error) = removed {
                        warn!("an empty directory stays: {}: {error}", path.display());
                    }
                }
                Read::Unreadable(Unreadable::Missing | Unreadable::Damaged(_))
                    if mark::is_of_an_earlier_boot(&path) =>
                {
                    if let Err(error) = durable::remove_tree(&path) {
                        warn!("what was to become a sandbox stays: {}: {error}", path.display());
                    }
                }
                Read::Unreadable(why) => {
                    let uids = owners(&path);
                    found.push(Found::Quarantined { name, why, uids });
                }
            }
        }
        Ok(found)
    }

    /// The users of VMMs of what lies in quarantine. They may live, and nobody knows any more what they are.
    pub fn quarantined_uids(&self) -> Result<BTreeSet<u32>, JournalError> {
        let failed = |cause| JournalError::Read { path: self.quarantine.clone(), cause };
        let mut uids = BTreeSet::new();
        for entry in fs::read_dir(&self.quarantine).map_err(failed)? {
            uids.extend(owners(&entry.map_err(failed)?.path()));
        }
        Ok(uids)
    }

    /// How many directories lie in quarantine.
    pub fn quarantined(&self) -> Result<usize, JournalError> {
        let failed = |cause| JournalError::Read { path: self.quarantine.clone(), cause };
        Ok(fs::read_dir(&self.quarantine).map_err(failed)?.count())
    }

    /// The state of one sandbox; None when there is none or it is no state any more, which is moved to quarantine.
    pub fn read_one(&self, id: &SandboxId) -> Result<Option<Found>, JournalError> {
        let path = self.directory(id);
        if !path.try_exists().map_err(|cause| JournalError::Read { path: path.clone(), cause })? {
            return Ok(None);
        }
        match self.read(&path, id.as_str())? {
            Read::Record(record) => Ok(Some(Found::Sandbox(record))),
            Read::Nothing => Ok(None),
            Read::Unreadable(why) => {
                let uids = owners(&path);
                self.put_aside(&path, id.as_str(), &why)?;
                Ok(Some(Found::Quarantined { name: id.to_string(), why, uids }))
            }
        }
    }

    fn read(&self, path: &Path, name: &str) -> Result<Read, JournalError> {
        let file = path.join(STATE_FILE);
        let bytes = match durable::read(&file, FILE_BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let failed = |cause| JournalError::Read { path: path.to_owned(), cause };
                let mut is_nothing = true;
                for entry in fs::read_dir(path).map_err(failed)? {
                    let name = entry.map_err(failed)?.file_name();
                    is_nothing &= name == "state.json.tmp" || mark::is_one(&name);
                }
                return Ok(if is_nothing { Read::Nothing } else { Read::Unreadable(Unreadable::Missing) });
            }
            // It can be read, but it is no state: too large, or no file at all.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::InvalidData | io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory
                ) =>
            {
                return Ok(Read::Unreadable(Unreadable::Damaged(error.to_string())));
            }
            // Of a disk that fails now nothing is known: a state that is taken for damaged would cost a living sandbox.
            Err(cause) => return Err(JournalError::Read { path: file, cause }),
        };
        match decode(&bytes) {
            Ok(record) if record.id.as_str() == name && record.tag == self.tag => Ok(Read::Record(Box::new(record))),
            Ok(_) => Ok(Read::Unreadable(Unreadable::Foreign)),
            Err(Unreadable::Format(format)) if format > FORMAT => Err(JournalError::Newer { path: file, format }),
            Err(why) => Ok(Read::Unreadable(why)),
        }
    }

    /// Moves a directory to quarantine, with the reason beside its files.
    pub fn put_aside(&self, path: &Path, name: &str, why: &Unreadable) -> Result<(), JournalError> {
        let failed = |cause| JournalError::Quarantine { path: path.to_owned(), cause };
        let stamp = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
        let target = self.quarantine.join(format!("{name}-{stamp}"));
        fs::rename(path, &target).map_err(failed)?;
        // The move is what matters; a pool without room for the note has it in the log.
        let _ = durable::write(&target.join("REASON"), format!("{why}\n").as_bytes(), 0o600);
        durable::sync_directory(&self.quarantine).map_err(failed)?;
        durable::sync_directory(&self.sandboxes).map_err(failed)
    }
}

/// A sandbox's disk and memory are its VMM's own, so they tell its user where the state no longer does. One that was not handed over yet is
/// root's, which is no VMM's.
fn owners(directory: &Path) -> BTreeSet<u32> {
    let files = ["disk", "memory"].map(|name| directory.join(name));
    let owners = files.iter().filter_map(|file| fs::symlink_metadata(file).ok()).map(|meta| meta.uid());
    owners.filter(|uid| *uid != 0).collect()
}

pub(super) fn encode(record: &Record) -> Vec<u8> {
    sealed::encode(FORMAT, record)
}

fn decode(bytes: &[u8]) -> Result<Record, Unreadable> {
    sealed::decode(FORMAT, bytes).map_err(|broken| match broken {
        Broken::Damaged(why) => Unreadable::Damaged(why),
        Broken::Format(format) => Unreadable::Format(format),
    })
}

#[cfg(test)]
mod tests {
    use super::super::state::{Fence, Phase, Run, Spec};
    use super::*;

    fn record(id: &SandboxId) -> Record {
        Record {
            id: id.clone(),
            tag: "0a1b2c3d".to_owned(),
            fence: Fence { epoch: 1, revision: 2, operation: "op".to_owned() },
            spec: Spec {
                template: "minimal".parse().unwrap(),
                vcpus: 1,
                memory_mib: 256,
                disk_mib: 1024,
                envs: [("A".to_owned(), "ä\n".to_owned())].into(),
                default_user: String::new(),
                team: String::new(),
                snapshot: None,
            },
            phase: Phase::Making {
                run: Run {
                    incarnation: model::ids::Incarnation::from_random(9),
                    slot: 3,
                    uid: 0x4000_0003,
                    access_token: "t".to_owned(),
                    control_token: "c".to_owned(),
                    process: None,
                    generation: None,
                    snapshot: None,
                    template_generation: None,
                    envd_version: String::new(),
                    from_disk: false,
                    standby: None,
                },
            },
        }
    }

    fn journal() -> (tempfile::TempDir, Journal) {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path(), "0a1b2c3d").unwrap();
        (dir, journal)
    }

    #[test]
    fn comes_back_as_written_and_is_readable_by_its_owner_only() {
        let (_dir, journal) = journal();
        let id = SandboxId::from_random(1);
        journal.write(&record(&id)).unwrap();
        journal.write(&record(&id)).unwrap();
        let found = journal.scan().unwrap();
        assert!(matches!(&found[..], [Found::Sandbox(read)] if **read == record(&id)), "{found:?}");
        let mode = fs::metadata(journal.directory(&id).join("state.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        for directory in [&journal.sandboxes, &journal.tombstones, &journal.quarantine] {
            assert_eq!(fs::metadata(directory).unwrap().permissions().mode() & 0o777, 0o700);
        }
        journal.remove(&id).unwrap();
        journal.remove(&id).unwrap();
        assert!(journal.scan().unwrap().is_empty());
    }

    #[test]
    fn what_was_begun_is_marked_until_something_else_is_written() {
        let (_dir, journal) = journal();
        let id = SandboxId::from_random(1);
        let begun = record(&id);
        let running = match begun.phase.clone() {
            Phase::Making { run } => Record { phase: Phase::Running { run }, ..begun.clone() },
            other => panic!("{other:?}"),
        };
        let (directory, mark) = (journal.directory(&id), journal.directory(&id).join("unsettled"));
        // The agent dies between the mark and the state: there is nothing.
        fs::create_dir(&directory).unwrap();
        mark::put(&directory).unwrap();
        fs::write(directory.join("state.json.tmp"), "half").unwrap();
        assert!(journal.scan().unwrap().is_empty() && !directory.exists());

        journal.write(&begun).unwrap();
        assert!(mark.exists());
        assert!(matches!(&journal.scan().unwrap()[..], [Found::Sandbox(read)] if **read == begun));
        // The host went down, and what was written is lost or torn: of another boot it is nothing, of this one somebody must look.
        for content in ["", "{\"format\""] {
            fs::write(directory.join(STATE_FILE), content).unwrap();
            assert!(matches!(&journal.look().unwrap()[..], [Found::Quarantined { .. }]));
            fs::write(&mark, "another boot").unwrap();
            assert!(journal.scan().unwrap().is_empty() && !directory.exists());
            journal.write(&begun).unwrap();
        }
        journal.write(&running).unwrap();
        assert!(!mark.exists());
        // Begun anew, as after a failure, it is somebody's.
        journal.write(&begun).unwrap();
        assert!(!mark.exists());
        fs::write(directory.join(STATE_FILE), "").unwrap();
        assert!(matches!(&journal.look().unwrap()[..], [Found::Quarantined { .. }]));
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_noticed() {
        let whole = encode(&record(&SandboxId::from_random(1)));
        for length in 0..whole.len() {
            assert!(decode(&whole[..length]).is_err(), "cut at {length}");
        }
        for position in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[position] ^= 1 << bit;
                assert!(decode(&bytes).is_err(), "byte {position} bit {bit}");
            }
        }
    }

    #[test]
    fn the_unreadable_is_put_aside_and_stops_nobody() {
        let (_dir, journal) = journal();
        let good = SandboxId::from_random(1);
        let torn = SandboxId::from_random(2);
        let foreign = SandboxId::from_random(3);
        journal.write(&record(&good)).unwrap();
        journal.write(&record(&torn)).unwrap();
        let path = journal.directory(&torn).join("state.json");
        fs::write(&path, &fs::read(&path).unwrap()[..20]).unwrap();
        fs::write(journal.directory(&torn).join("disk"), b"customer data").unwrap();
        journal.write(&Record { tag: "ffffffff".to_owned(), ..record(&foreign) }).unwrap();
        fs::create_dir(journal.sandboxes.join("stray")).unwrap();
        fs::write(journal.sandboxes.join("stray/disk"), b"x").unwrap();
        fs::create_dir(journal.sandboxes.join("empty")).unwrap();

        let found = journal.scan().unwrap();

        assert_eq!(found.iter().filter(|one| matches!(one, Found::Sandbox(_))).count(), 1);
        assert_eq!(found.len(), 4);
        let kept: Vec<_> = fs::read_dir(&journal.quarantine).unwrap().flatten().collect();
        assert_eq!(kept.len(), 3);
        assert!(kept.iter().all(|entry| entry.path().join("REASON").exists()));
        let torn_kept = kept.iter().find(|e| e.file_name().to_string_lossy().starts_with(torn.as_str())).unwrap();
        assert_eq!(fs::read(torn_kept.path().join("disk")).unwrap(), b"customer data");
        assert_eq!(fs::read_dir(&journal.sandboxes).unwrap().count(), 1);
    }

    #[test]
    fn looking_moves_nothing() {
        let (_dir, journal) = journal();
        let torn = SandboxId::from_random(2);
        journal.write(&record(&torn)).unwrap();
        fs::write(journal.directory(&torn).join("state.json"), "{").unwrap();
        fs::write(journal.directory(&torn).join("disk"), "customer data").unwrap();
        let disk = journal.directory(&torn).join("disk");
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&disk, Some(0x4000_0003), None).unwrap();
        }
        let owner = fs::metadata(&disk).unwrap().uid();
        for _ in 0..2 {
            let found = journal.look().unwrap();
            assert!(matches!(&found[..], [Found::Quarantined { uids, .. }] if *uids == [owner].into()), "{found:?}");
            assert!(journal.directory(&torn).join("disk").exists());
        }
        assert!(journal.quarantined_uids().unwrap().is_empty());
        journal.scan().unwrap();
        assert_eq!(journal.quarantined_uids().unwrap(), [owner].into());
    }

    #[test]
    fn what_a_newer_agent_wrote_is_refused_and_left_alone() {
        let (_dir, journal) = journal();
        let id = SandboxId::from_random(1);
        journal.write(&record(&id)).unwrap();
        let path = journal.directory(&id).join("state.json");
        for newer in ["{\"format\":2,\"sum\":\"x\"}", "{\"format\":2,\"checksum\":\"x\",\"record\":{}}"] {
            fs::write(&path, newer).unwrap();
            let refused = journal.scan().unwrap_err();
            assert!(refused.is_config() && refused.to_string().contains("format 2"), "{refused}");
            assert_eq!(fs::read_to_string(&path).unwrap(), newer);
        }
    }

    #[test]
    fn what_cannot_be_read_now_is_not_taken_for_damaged() {
        let (_dir, journal) = journal();
        let id = SandboxId::from_random(1);
        journal.write(&record(&id)).unwrap();
        let path = journal.directory(&id).join("state.json");
        fs::remove_file(&path).unwrap();
        // Reading it is an error of the kernel's, also for root.
        std::os::unix::fs::symlink(&path, &path).unwrap();
        let refused = journal.scan().unwrap_err();
        assert!(matches!(&refused, JournalError::Read { path: named, .. } if *named == path), "{refused}");
        assert!(journal.directory(&id).exists());
    }

    #[test]
    fn tombstones_last_a_month() {
        let (_dir, journal) = journal();
        let id = SandboxId::from_random(1);
        let tombstone =
            Tombstone { id: id.clone(), fence: Fence { epoch: 1, revision: 4, operation: "op".to_owned() } };
        journal.bury(&tombstone).unwrap();
        assert_eq!(journal.tombstone(&id).unwrap(), Some(tombstone));
        let later = |days: u64| SystemTime::now() + Duration::from_secs(days * 24 * 3600);
        assert_eq!(journal.prune_tombstones(later(29)), 0);
        assert_eq!(journal.prune_tombstones(later(31)), 1);
        assert_eq!(journal.tombstone(&id).unwrap(), None);
        fs::write(journal.tombstones.join(id.as_str()), b"torn").unwrap();
        assert_eq!(journal.tombstone(&id).unwrap().unwrap().fence.revision, u64::MAX);
    }
}
