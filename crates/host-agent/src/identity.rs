//! Who this agent is on this machine: the lock that makes it the only one of its WRENN_DIR, and the tag that marks every kernel object
//! it makes.
//!
//! The machine id stands beside the tag: a WRENN_DIR that came with a cloned disk would make two machines fight over one host record
//! and its sandboxes, so it is refused.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::TryRngCore as _;

use crate::durable;

/// Eight hex digits in the name of every kernel object of this agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag(String);

impl Tag {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The user and group of a sandbox's VMM: above every id that people, packages or containers are given, 16 bits of the tag, then
    /// the slot (below 32768), so that two agents on one machine hardly ever share one.
    pub fn uid(&self, slot: u16) -> u32 {
        let tag = u32::from_str_radix(&self.0[..4], 16).expect("a tag is eight hex digits");
        0x4000_0000 + (tag << 15) + (u32::from(slot) & 0x7fff)
    }

    /// Of every slot there may be.
    pub fn uids(&self) -> std::ops::RangeInclusive<u32> {
        self.uid(1)..=self.uid(0x7fff)
    }

    /// The slot whose user this is; none of a user that is not this agent's.
    pub fn slot(&self, uid: u32) -> Option<u16> {
        self.uids().contains(&uid).then(|| u16::try_from(uid & 0x7fff).expect("fifteen bits"))
    }

    #[cfg(test)]
    pub fn for_test(text: &str) -> Self {
        parse_tag(text).unwrap()
    }
}

impl std::fmt::Display for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Holds WRENN_DIR until it is dropped.
#[derive(Debug)]
pub struct Lock {
    // The descriptor is the lock; it is close-on-exec, so that no VMM inherits it.
    _file: File,
}

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("another wrenn-agent uses {dir}; stop it first (its lock is {dir}/agent.lock)")]
    Locked { dir: PathBuf },
    #[error("open the lock {path}")]
    OpenLock {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error(
        "{path} was made on another machine (a cloned disk?); on a copy, remove agent-id, host-token, host-key.pem and the directory pool/sandboxes, then register the host anew"
    )]
    OtherMachine { path: PathBuf },
    #[error("{path} is damaged; restore it, or, when no sandbox runs on this host, remove it")]
    Damaged { path: PathBuf },
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("write {path}")]
    Write {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("ask the kernel for random bytes")]
    Random,
}

/// How long the lock of an agent that was killed may stay with a child of it that was forked and has not yet become the
/// VMM: a VMM's start ends in a moment, or with the agent.
const LAST_CHILDREN: Duration = Duration::from_secs(2);

impl Lock {
    /// Waits up to two seconds for what a dead agent left to let go of it.
    pub async fn take(dir: &Path) -> Result<Self, IdentityError> {
        let path = dir.join("agent.lock");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC)
            .open(&path)
            .map_err(|cause| IdentityError::OpenLock { path: path.clone(), cause })?;
        let end = Instant::now() + LAST_CHILDREN;
        loop {
            match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self { _file: file }),
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < end => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(IdentityError::Locked { dir: dir.to_owned() }),
                Err(errno) => return Err(IdentityError::OpenLock { path, cause: errno.into() }),
            }
        }
    }
}

/// Reads `agent-id` or makes it on the first start.
pub fn load_or_make(dir: &Path, machine_id: &str) -> Result<Tag, IdentityError> {
    let path = dir.join("agent-id");
    match durable::read(&path, 1024) {
        Ok(bytes) => {
            let text = String::from_utf8(bytes).map_err(|_| IdentityError::Damaged { path: path.clone() })?;
            let mut words = text.split_whitespace();
            let tag = words.next().and_then(parse_tag).ok_or_else(|| IdentityError::Damaged { path: path.clone() })?;
            match words.next() {
                Some(machine) if machine == machine_id => Ok(tag),
                Some(_) => Err(IdentityError::OtherMachine { path }),
                None => Err(IdentityError::Damaged { path }),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let random = rand::rngs::OsRng.try_next_u32().map_err(|_| IdentityError::Random)?;
            let tag = Tag(format!("{random:08x}"));
            durable::write(&path, format!("{tag} {machine_id}\n").as_bytes(), 0o644)
                .map_err(|cause| IdentityError::Write { path, cause })?;
            Ok(tag)
        }
        Err(cause) => Err(IdentityError::Read { path, cause }),
    }
}

/// What tells this machine from a copy of its disk that runs elsewhere.
pub fn machine_id() -> Result<String, IdentityError> {
    // The firmware's id differs between clones of a virtual machine, whose /etc/machine-id is often the same.
    for path in ["/sys/class/dmi/id/product_uuid", "/etc/machine-id"] {
        if let Ok(bytes) = durable::read(Path::new(path), 1024) {
            let text: String = String::from_utf8_lossy(&bytes).trim().chars().filter(|c| !c.is_whitespace()).collect();
            if !text.is_empty() {
                // Hashed: the id itself is nobody's business.
                return Ok(blake3::hash(text.as_bytes()).to_hex()[..32].to_owned());
            }
        }
    }
    Ok("unknown".to_owned())
}

fn parse_tag(text: &str) -> Option<Tag> {
    let hex = text.len() == 8 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    hex.then(|| Tag(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tag_stays_and_a_clone_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let tag = load_or_make(dir.path(), "m1").unwrap();
        assert_eq!(load_or_make(dir.path(), "m1").unwrap(), tag);
        assert!(matches!(load_or_make(dir.path(), "m2"), Err(IdentityError::OtherMachine { .. })));
        std::fs::write(dir.path().join("agent-id"), "zz").unwrap();
        assert!(matches!(load_or_make(dir.path(), "m1"), Err(IdentityError::Damaged { .. })));
    }

    #[tokio::test]
    async fn one_agent_per_directory() {
        let dir = tempfile::tempdir().unwrap();
        let lock = Lock::take(dir.path()).await.unwrap();
        assert!(matches!(Lock::take(dir.path()).await, Err(IdentityError::Locked { .. })));
        // Whoever comes while the last one is on its way out gets it then.
        let leave = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            drop(lock);
        };
        assert!(tokio::join!(Lock::take(dir.path()), leave).0.is_ok());
    }

    #[test]
    fn uids_stay_apart_and_in_range() {
        let tag = parse_tag("ffffabcd").unwrap();
        assert_eq!(tag.uid(0x7fff), 0xbfff_ffff);
        assert_ne!(tag.uid(1), tag.uid(2));
        assert_eq!((tag.slot(tag.uid(7)), tag.slot(tag.uid(0)), tag.slot(1000)), (Some(7), None, None));
        assert_eq!(parse_tag("00000000").unwrap().uid(1), 0x4000_0001);
    }
}
