//! Saves. Firecracker writes the pages that were dirtied since its last save (or boot, or load) into a file of the full size, in place. So
//! it is given a file that holds what was saved then, and afterwards that file is complete: no chains, and the cost is what was dirtied.
//!
//! ```text
//!   base      the whole memory as of the last save; not there before the first
//!   saving    the same, while a save writes into it: a save that did not come about leaves it, and with it the certainty of what it holds
//! ```
//!
//! Both lie in the jail and stay there: what is handed out is a clone, which no VMM, taken over or not, has open.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, fchown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::OFlags;

use super::{Control, api};
use crate::{Error, SaveTarget, reflink, socket};

const BASE: &str = "base";
const SAVING: &str = "saving";
const BEGIN: &str = "begin";
const DEVICE_OUT: &str = "device-out";
/// Of a save, beside what its memory takes.
const SAVE_LIMIT: Duration = Duration::from_secs(30);
/// A full save of a large guest onto a slow disk.
const MIB_PER_SECOND_MIN: u32 = 20;
/// No device state is near this.
const DEVICE_BYTES_MAX: u64 = 64 << 20;

/// Bytes that had to be written. The vCPUs stand still, and nobody else saves.
pub async fn save(vm: &Control, target: &SaveTarget) -> Result<u64, Error> {
    let plan = Plan { root: vm.root(), memory: vm.record.memory.clone(), is_loaded: vm.record.memory_private };
    let bytes = u64::from(vm.record.memory_mib) << 20;
    let (plan, kind) = blocking(move || plan.prepare(bytes).map(|kind| (plan, kind))).await?;
    let limit = SAVE_LIMIT + Duration::from_secs(u64::from(vm.record.memory_mib / MIB_PER_SECOND_MIN));
    let create = api::SnapshotCreate { snapshot_type: kind, snapshot_path: DEVICE_OUT, mem_file_path: SAVING };
    let before = bytes_written(vm.record.pid);
    vm.put_within("/snapshot/create", &create, limit).await.map_err(by_its_cause)?;
    // The vCPUs stand still, so it has written nothing else.
    let written = bytes_written(vm.record.pid).saturating_sub(before);
    let target = target.clone();
    blocking(move || plan.hand_out(&target, bytes)).await?;
    Ok(written)
}

struct Plan {
    root: PathBuf,
    memory: PathBuf,
    is_loaded: bool,
}

impl Plan {
    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Leaves `saving` as the VMM is to find it, and tells which kind of save it is for.
    fn prepare(&self, bytes: u64) -> Result<&'static str, Error> {
        let failed = Error::io("prepare the saved memory");
        let prepare = || {
            // The jail's root is not the VMM's to make files in.
            remove(&self.path(DEVICE_OUT))?;
            self.hand_over(DEVICE_OUT)?;
            if exists(&self.path(SAVING))? {
                // What it holds is not certain, and neither is which pages the VMM still counts as dirty. It stays until it is whole, or a
                // save that is given up now would be forgotten.
                remove(&self.path(BASE))?;
                return Ok("Full");
            }
            if exists(&self.path(BASE))? {
                fs::rename(self.path(BASE), self.path(SAVING))?;
            } else {
                self.begin(bytes)?;
            }
            Ok("Diff")
        };
        prepare().map_err(failed)
    }

    /// Before the first save: what it was loaded from; of a boot nothing, because all that is not zero was dirtied.
    fn begin(&self, bytes: u64) -> io::Result<()> {
        // Under another name until it is whole.
        remove(&self.path(BEGIN))?;
        let file = self.hand_over(BEGIN)?;
        if self.is_loaded {
            reflink::clone(&File::open(&self.memory)?, &file)?;
        } else {
            file.set_len(bytes)?;
        }
        fs::rename(self.path(BEGIN), self.path(SAVING))
    }

    /// A new file that is the VMM's to write.
    fn hand_over(&self, name: &str) -> io::Result<File> {
        let owner = fs::metadata(&self.memory)?;
        let file = create(&self.path(name))?;
        fchown(&file, Some(owner.uid()), Some(owner.gid()))?;
        Ok(file)
    }

    fn hand_out(&self, target: &SaveTarget, bytes: u64) -> Result<(), Error> {
        let source = within(&self.root, SAVING).map_err(Error::io("open the saved memory"))?;
        let now = source.metadata().map_err(Error::io("look at the saved memory"))?;
        if now.len() != bytes {
            let cause = io::Error::new(io::ErrorKind::InvalidData, "the VMM saved a memory of another size");
            return Err(Error::io("look at the saved memory")(cause));
        }
        // The pages are counted as clean now, so this is the base, whatever becomes of the clone.
        fs::rename(self.path(SAVING), self.path(BASE)).map_err(Error::io("keep the saved memory"))?;
        let memory = create(&target.memory).map_err(Error::io("create the saved memory"))?;
        reflink::clone(&source, &memory).map_err(Error::io("clone the memory file"))?;
        let device = within(&self.root, DEVICE_OUT).map_err(Error::io("open the device state"))?;
        let mut out = create(&target.device).map_err(Error::io("create the device state file"))?;
        let copied = io::copy(&mut io::Read::take(&device, DEVICE_BYTES_MAX), &mut out);
        copied.map_err(Error::io("write the device state"))?;
        remove(&self.path(DEVICE_OUT)).map_err(Error::io("remove the VMM's device state"))?;
        Ok(())
    }
}

/// The VMM says in words what the kernel told it by a number; a full disk must be known as one.
fn by_its_cause(error: Error) -> Error {
    let number = match &error {
        Error::Refused { reason, .. } => reason.split_once("(os error ").and_then(|(_, rest)| rest.split_once(')')),
        _ => None,
    };
    match number.and_then(|(number, _)| number.parse().ok()) {
        Some(number) => Error::io("the VMM writes the saved state")(io::Error::from_raw_os_error(number)),
        None => error,
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Error::io("save")(io::Error::other(e)))?
}

/// A regular file of the jail, which the VMM may have put anything in place of.
fn within(root: &Path, name: &str) -> io::Result<File> {
    let file = File::from(socket::within(root, name, OFlags::RDONLY | OFlags::NONBLOCK)?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidData.into()) }
}

fn create(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// 0 where the kernel does not tell.
fn bytes_written(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("wchar: ")?.parse().ok()).unwrap_or(0)
}

fn exists(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_known_by_the_words_of_the_vmm() {
        let refused = |reason: &str| Error::Refused { command: "/snapshot/create", reason: reason.to_owned() };
        assert!(by_its_cause(refused("Cannot dump memory: No space left on device (os error 28)")).is_full());
        assert!(!by_its_cause(refused("Cannot open: Permission denied (os error 13)")).is_full());
        let other = by_its_cause(refused("save/restore unavailable while running"));
        assert!(matches!(other, Error::Refused { .. }), "{other}");
    }
}
