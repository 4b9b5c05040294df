//! What a sandbox stands on: network slot, cgroup, disk, memory file. One trait, so that the steps can be tested without a kernel's help;
//! the real one puts the folders `network`, `disk` and `cgroup` together.
//!
//! Every `ensure` may be repeated, every `release` too, also of what was never made. Names follow from slot, sandbox and tag.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use microvm::Tap;
use model::ids::Incarnation;
use model::shape::TemplateName;

use crate::disk::DiskChoice;
use crate::guest::Dial;
use crate::sandbox::state::Spec;
use crate::sandbox::steps::blocking;

/// A step on the ground failed. `public` is fit for the sandbox's owner: no host paths, no addresses.
#[derive(Debug, thiserror::Error)]
#[error("{public}")]
pub struct GroundError {
    pub public: &'static str,
    #[source]
    pub cause: Box<dyn std::error::Error + Send + Sync>,
}

impl GroundError {
    pub fn new(public: &'static str, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { public, cause: cause.into() }
    }

    /// The pool has no room for it.
    pub fn is_full(&self) -> bool {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(self.cause.as_ref());
        while let Some(present) = cause {
            let io = present.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
            if matches!(io, Some(std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)) {
                return true;
            }
            cause = present.source();
        }
        false
    }
}

/// Files of one sandbox.
#[derive(Debug, Clone)]
pub struct Places {
    pub directory: PathBuf,
    pub disk: PathBuf,
    pub memory: PathBuf,
    /// Of this incarnation alone: sockets, console.
    pub run: PathBuf,
}

impl Places {
    pub fn new(directory: &Path, incarnation: &Incarnation) -> Self {
        Self {
            directory: directory.to_owned(),
            disk: directory.join("disk"),
            memory: directory.join("memory"),
            run: directory.join("run").join(incarnation.as_str()),
        }
    }
}

#[async_trait]
pub trait Ground: Send + Sync + 'static {
    /// Takes a free slot, in memory only.
    fn reserve_slot(&self) -> Result<u16, GroundError>;
    /// Takes a slot that a journal names; false when another sandbox has it already.
    fn claim_slot(&self, slot: u16) -> bool;
    /// Gives a slot back, when no journal names it any more: until then whoever takes up what is half done, or begins anew to take it down,
    /// ends what it finds in the slot.
    fn free_slot(&self, slot: u16);

    async fn ensure_network(&self, slot: u16) -> Result<(), GroundError>;
    /// The slot stays the caller's.
    async fn release_network(&self, slot: u16) -> Result<(), GroundError>;
    /// The same for whom somebody waits: when it returns nothing can use the network any more, and what is left of it goes by itself.
    async fn release_network_soon(&self, slot: u16) -> Result<(), GroundError> {
        self.release_network(slot).await
    }
    /// The slot's tap, for one VMM; none on a stage without one.
    fn tap(&self, slot: u16) -> Option<Tap>;
    fn dial(&self, slot: u16) -> Arc<dyn Dial>;
    /// The address by which this host reaches the guest.
    fn host_ip(&self, slot: u16) -> String;

    async fn ensure_cgroup(&self, group: &str, spec: &Spec) -> Result<(), GroundError>;
    /// The files by which a VMM enters the group.
    fn cgroup_files(&self, group: &str) -> Vec<PathBuf>;
    async fn release_cgroup(&self, group: &str) -> Result<(), GroundError>;

    /// What tells this edition of a template from every other; none when there is no such template.
    async fn edition(&self, template: &TemplateName) -> Result<Option<String>, GroundError>;
    /// Makes what disks of this kind are cloned from, if it is not there: once for all who wait. It may take minutes, and goes on when
    /// nobody waits any more.
    async fn ensure_base(&self, spec: &Spec) -> Result<(), GroundError>;
    /// What a disk of this kind is cloned from; none where that is gone or cannot be told.
    async fn open_base(&self, _spec: &Spec) -> Option<File> {
        None
    }
    async fn make_disk(&self, spec: &Spec, places: &Places, uid: u32) -> Result<(), GroundError>;
    /// `is_filled`: the guest writes into it, so that all its room is taken at once.
    async fn make_memory(&self, spec: &Spec, places: &Places, uid: u32, is_filled: bool) -> Result<(), GroundError>;

    /// The driver of new disks.
    fn disk_driver(&self) -> &'static str {
        DiskChoice::Reflink.name()
    }
    /// What a VMM opens as the disk of a sandbox in this slot: the file, or a device that shows it.
    async fn attach_disk(&self, _slot: u16, places: &Places, _uid: u32) -> Result<PathBuf, GroundError> {
        Ok(places.disk.clone())
    }
    /// After the VMM's end.
    async fn detach_disk(&self, _slot: u16) -> Result<(), GroundError> {
        Ok(())
    }
    /// Begins to bring to the disk what the guest has written.
    async fn flush_disk(&self, _slot: u16, disk: &Path) -> Result<(), GroundError> {
        let disk = disk.to_owned();
        let flushed = blocking(move || File::open(disk)?.sync_data()).await;
        flushed.map_err(|error| GroundError::new("the host could not write the sandbox's disk", error))
    }
    /// Copies the disk of a guest that stands still.
    async fn save_disk(&self, _slot: u16, _spec: &Spec, disk: &Path, to: &Path) -> Result<(), GroundError> {
        self.clone_file(disk, to, 0).await
    }
    /// A disk with the content of a saved one, the user's own.
    async fn restore_disk(&self, from: &Path, disk: &Path, uid: u32) -> Result<(), GroundError> {
        self.clone_file(from, disk, uid).await
    }

    /// A new file with the same content, at no cost where the file system can share it, for this user alone.
    async fn clone_file(&self, from: &Path, to: &Path, uid: u32) -> Result<(), GroundError>;

    /// Kills whatever process has this uid: a VMM that was started just before a crash is in no journal.
    async fn sweep(&self, uid: u32) -> Result<(), GroundError>;
}
