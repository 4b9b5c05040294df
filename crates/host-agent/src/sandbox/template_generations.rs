//! The booted state of each template, in each shape: what a create is restored from instead of booting once more.
//!
//! ```text
//!  <pool>/templates/<key>/gen-00001/     a generation like a sandbox's, of a guest that has no identity yet
//! ```
//!
//! The first create of its kind boots, and leaves the state behind before the guest learns who it is. The key is a digest of everything
//! that the state follows from: the template's edition, the kernel, the machine's shape. Nothing here is anybody's: what no create is
//! being restored from can be removed at any time, and the next create boots.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use microvm::{Driver, Microvm, Stamp};
use model::sandbox::Kept;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use tracing::{info, warn};

use super::console::BYTES_MAX;
use super::digests::Before;
use super::fence::Wish;
use super::generation::{self, About, Files, GenerationError};
use super::shelf::{GENERATION, Lease, Making, Shelf};
use super::state::{Run, Spec};
use super::steps::{Body, StepError, blocking};
use crate::durable;
use crate::machines::MachineError;
use crate::template;

const FOLDER: &str = "templates";
/// Kept at once, the ones that were used last.
const KEPT_MAX: usize = 8;
/// Pool that must be left when one is made, beside its own size: it is worth less than a sandbox.
const POOL_LEFT_MIB: u64 = 1024;

#[derive(Debug)]
pub struct TemplateGenerations {
    shelf: Shelf,
    /// WRENN_DIR, where kernels lie.
    dir: PathBuf,
}

impl TemplateGenerations {
    /// Removes what an earlier agent had half made.
    pub fn open(pool: &Path, dir: &Path) -> io::Result<Self> {
        // Of two that are made at once each would take the other's room.
        let shelf = Shelf::open(pool.join(FOLDER), 1, |_| true)?;
        let all = Self { shelf, dir: dir.to_owned() };
        all.prune(KEPT_MAX)?;
        Ok(all)
    }

    /// For an agent whose creates boot.
    pub fn clear(pool: &Path) -> io::Result<()> {
        durable::remove_tree(&pool.join(FOLDER))
    }

    /// `edition`: of the template, as its digest says it.
    fn key(&self, edition: &str, spec: &Spec) -> String {
        let mut digest = blake3::Hasher::new();
        let kernel = template::newest_kernel(&self.dir);
        let files = kernel.iter().flat_map(|kernel| [Some(&kernel.image), kernel.initramfs.as_ref()]);
        // This program decides which devices the machine has and what its kernel is told.
        let own = PathBuf::from("/proc/self/exe");
        for file in files.flatten().chain([&own]) {
            // Published under the name of a version; another build of it is another file.
            let meta = fs::metadata(file).map(|meta| (meta.len(), meta.mtime(), meta.mtime_nsec())).ok();
            digest.update(format!("{} {meta:?}\n", file.display()).as_bytes());
        }
        let Spec { template, vcpus, memory_mib, disk_mib, .. } = spec;
        digest.update(format!("{template} {edition} {vcpus} {memory_mib} {disk_mib}").as_bytes());
        digest.finalize().to_hex()[..32].to_owned()
    }

    pub fn place(&self, key: &str) -> PathBuf {
        self.shelf.place(key)
    }

    pub fn lease(&self, key: &str) -> Option<Lease> {
        self.shelf.lease(key)
    }

    /// One that a create can be restored from, as far as that is known before it is tried. One that cannot is removed.
    fn find(&self, key: &str, spec: &Spec, vmm: &dyn Driver) -> Option<Lease> {
        let lease = self.shelf.lease(key)?;
        if let Err(error) = generation::verified(lease.place(), GENERATION, spec, &|saved| makes(vmm, saved)) {
            warn!("a template's booted state is of no use any more and is removed: {error}");
            self.remove(key);
            return None;
        }
        // It is in use, which keeps it.
        let touched = File::open(lease.place()).and_then(|place| place.set_modified(SystemTime::now()));
        if let Err(error) = touched {
            warn!("mark a template's generation as used: {error}");
        }
        Some(lease)
    }

    /// The next create of this kind boots. What is being restored from it is not disturbed.
    pub fn remove(&self, key: &str) {
        self.shelf.remove(key);
    }

    /// Room for what is worth more: removes all that nobody is being restored from.
    pub fn make_room(&self) {
        if let Err(error) = self.prune(0) {
            warn!("remove templates' generations to make room: {error}");
        }
    }

    /// Leaves so many, the ones that were used last, and those that are in use.
    fn prune(&self, kept: usize) -> io::Result<()> {
        let mut all = Vec::new();
        for entry in fs::read_dir(self.shelf.folder())? {
            let entry = entry?;
            match entry.metadata() {
                // Somebody else was faster.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                meta => all.push((meta?.modified()?, entry.file_name().to_string_lossy().into_owned())),
            }
        }
        all.sort();
        let spare = all.len().saturating_sub(kept);
        for (_, key) in all.into_iter().take(spare) {
            if !self.shelf.is_in_use(&key) {
                self.remove(&key);
            }
        }
        Ok(())
    }
}

/// What is there of the booted state that a create would be restored from.
pub(super) enum Booted {
    There(Lease),
    /// It could be left behind under this key.
    Missing(String),
}

impl Body {
    /// Of the booted state that a create begins with. None where every create boots, and where that cannot be told.
    pub(super) async fn booted_key(&self, wish: &Wish) -> Option<String> {
        let generations = self.context.template_generations.clone()?;
        let edition = self.context.ground.edition(&wish.spec.template).await.ok().flatten()?;
        // What is left behind has a disk of this driver's.
        let edition = format!("{edition} {}", self.context.ground.disk_driver());
        let spec = wish.spec.clone();
        Some(blocking(move || generations.key(&edition, &spec)).await)
    }

    pub(super) async fn look_for_booted(&self, key: String, wish: &Wish) -> Option<Booted> {
        let generations = self.context.template_generations.clone()?;
        let vmm = self.context.machines.driver().await.ok()?;
        let spec = wish.spec.clone();
        let looked =
            blocking(move || generations.find(&key, &spec, vmm.as_ref()).map_or(Booted::Missing(key), Booted::There));
        Some(looked.await)
    }

    /// Leaves the booted state behind for the creates that follow. Nothing of it that fails is a failure of this create, but that the
    /// microVM does not go on.
    pub(super) async fn keep_booted(&self, wish: &Wish, run: &Run) -> Result<(), StepError> {
        let generations = self.context.template_generations.clone();
        let (Some(generations), Some(wanted)) = (generations, self.wanted.clone()) else {
            return Ok(());
        };
        // The template may have been published anew while this one booted.
        if self.booted_key(wish).await.as_deref() != Some(wanted.as_str())
            || !matches!(self.look_for_booted(wanted.clone(), wish).await, Some(Booted::Missing(_)))
        {
            return Ok(());
        }
        let Some(making) = generations.shelf.begin(&wanted).unwrap_or_default() else { return Ok(()) };
        let making_room = generations.clone();
        if let Err(error) = blocking(move || making_room.prune(KEPT_MAX - 1)).await {
            warn!("remove templates' generations that others take the place of: {error}");
        }
        // Its memory is written once more, because none of it may be shared with the sandbox's.
        let room = (self.context.room)().await;
        if room.disk_free_mib < 2 * u64::from(wish.spec.memory_mib) + POOL_LEFT_MIB {
            return Ok(());
        }
        let microvm = self.microvm().cloned().ok_or(StepError::NoRun)?;
        let saved = self.save_booted(&making, &microvm, wish, run).await;
        microvm.continue_vcpus().await.map_err(MachineError::Continue)?;
        let spec = wish.spec.clone();
        let before = Before::of_base(self.context.ground.open_base(&spec).await);
        let queue = self.context.digests.clone();
        let is_shared = microvm.writes_into_its_file();
        // The create goes on meanwhile. An agent that ends before leaves half of it, which the next one removes.
        tokio::task::spawn_blocking(move || {
            let sealed = saved.and_then(|vmm| Ok(seal(&making, &spec, vmm, is_shared)?));
            if let Err(error) = sealed {
                warn!("the booted state of template {} is not kept: {error}: {}", spec.template, error.causes());
                making.abandon();
                return;
            }
            let (files, key) = (generation::sealed_files(making.place(), GENERATION), making.key().to_owned());
            // It is there for those who come next.
            drop(making);
            info!(
                "creates of template {} with {} vCPUs, {} MiB and {} MiB of disk are restored from now on",
                spec.template, spec.vcpus, spec.memory_mib, spec.disk_mib
            );
            // Held meanwhile: another of the same key must not get the digests of this one.
            if let Some(lease) = generations.lease(&key) {
                queue.push(files, before, format!("the booted state of template {}", spec.template), lease);
            }
        });
        Ok(())
    }

    async fn save_booted(
        &self,
        making: &Making,
        microvm: &Arc<dyn Microvm>,
        wish: &Wish,
        run: &Run,
    ) -> Result<Stamp, StepError> {
        let place = making.place().to_owned();
        let files: Files = blocking(move || generation::begin(&place, GENERATION)).await?;
        // Neither synced nor needed.
        let said = self.console().tail(Some(microvm), BYTES_MAX).await.unwrap_or_default();
        let console = files.console();
        blocking(move || fs::write(console, said)).await.map_err(StepError::Files)?;
        let saved = microvm.save(&files.save_target()).await.map_err(MachineError::Save)?;
        self.context.ground.save_disk(run.slot, &wish.spec, &self.places(run).disk, &files.disk()).await?;
        info!(sandbox.id = %self.id(), stopped_ms = saved.stopped.as_millis(), "saved the booted state of a template");
        Ok(self.context.machines.stamp_of(microvm.as_ref()).await?)
    }
}

/// Whether new sandboxes may begin with it: made by what makes new ones, not by something older that is still there for what it has saved.
pub fn makes(vmm: &dyn Driver, saved: &Stamp) -> Result<(), String> {
    vmm.stamp().loads(saved)
}

fn seal(making: &Making, spec: &Spec, vmm: Stamp, is_shared: bool) -> Result<(), GenerationError> {
    let about =
        About { kept: Kept::Memory, is_quiet: false, parent: None, vmm, spec, envd_version: "", control_token: "" };
    if is_shared {
        dig(&generation::begun_files(making.place(), GENERATION).memory()).map_err(GenerationError::Make)?;
    }
    generation::seal(making.place(), GENERATION, &about)
}

/// Gives back what was reserved for a file and never written: most of the memory of a guest that has just booted. What was written becomes
/// the file's own: else the sandbox that it is shared with needs new blocks for each page that it writes to, and a full pool ends it.
pub(super) fn dig(path: &Path) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let length = file.metadata()?.len();
    let mut at = 0;
    while at < length {
        let data = match seek(&file, SeekFrom::Data(at)) {
            Err(rustix::io::Errno::NXIO) => length,
            other => other?,
        };
        if data > at {
            change(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at..data)?;
        }
        if data == length {
            break;
        }
        let hole = seek(&file, SeekFrom::Hole(data))?;
        change(&file, FallocateFlags::UNSHARE_RANGE, data..hole)?;
        at = hole;
    }
    file.sync_all()
}

/// A file system that cannot do it shares nothing, and keeps what was reserved.
fn change(file: &File, how: FallocateFlags, range: Range<u64>) -> io::Result<()> {
    match fallocate(file, how, range.start, range.end - range.start) {
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        done => Ok(done?),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::io::{Seek as _, Write as _};
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_was_never_written_takes_no_room_and_the_content_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let mut file = File::options().write(true).create_new(true).open(&path).unwrap();
        fallocate(&file, FallocateFlags::empty(), 0, 8 << 20).unwrap();
        let mut content = vec![0; 8 << 20];
        for at in [1 << 20, 5 << 20] {
            file.seek(io::SeekFrom::Start(at)).unwrap();
            file.write_all(&[7; 4096]).unwrap();
            content[usize::try_from(at).unwrap()..][..4096].fill(7);
        }
        file.sync_all().unwrap();
        dig(&path).unwrap();
        assert!(fs::read(&path).unwrap() == content);
        assert!(fs::metadata(&path).unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn the_key_follows_from_all_that_the_state_follows_from() {
        let dir = tempfile::tempdir().unwrap();
        let kernels = dir.path().join("kernels");
        fs::create_dir(&kernels).unwrap();
        fs::write(kernels.join("vmlinux-6.1.1"), "one").unwrap();
        let generations = TemplateGenerations::open(dir.path(), dir.path()).unwrap();
        let spec = Spec { template: "minimal".parse().unwrap(), vcpus: 1, memory_mib: 256, ..Spec::unknown() };
        let key = generations.key("edition", &spec);
        let user_s = Spec { envs: [("A".to_owned(), "b".to_owned())].into(), team: "t".to_owned(), ..spec.clone() };
        assert_eq!(generations.key("edition", &user_s), key);
        let mut keys = vec![key, generations.key("another", &spec)];
        for other in [
            Spec { vcpus: 2, ..spec.clone() },
            Spec { memory_mib: 512, ..spec.clone() },
            Spec { disk_mib: 1024, ..spec.clone() },
            Spec { template: "other".parse().unwrap(), ..spec.clone() },
        ] {
            keys.push(generations.key("edition", &other));
        }
        fs::write(kernels.join("vmlinux-6.1.1"), "another build").unwrap();
        keys.push(generations.key("edition", &spec));
        assert_eq!(keys.iter().collect::<HashSet<_>>().len(), keys.len());
    }

    #[test]
    fn half_made_ones_go_and_the_least_used_of_too_many_but_not_what_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let place = |key: &str| dir.path().join(FOLDER).join(key);
        fs::create_dir_all(place("half").join("gen-00001.tmp")).unwrap();
        let make = |n: u64| {
            let place = place(&format!("key-{n:02}"));
            fs::create_dir_all(place.join("gen-00001")).unwrap();
            File::open(&place).unwrap().set_modified(SystemTime::now() - Duration::from_secs(3600 - n)).unwrap();
        };
        (0..KEPT_MAX as u64 + 3).for_each(make);
        let left = || fs::read_dir(dir.path().join(FOLDER)).unwrap().flatten().count();
        let generations = TemplateGenerations::open(dir.path(), dir.path()).unwrap();
        assert!(left() == KEPT_MAX && !place("half").exists() && !place("key-02").exists());
        let lease = generations.shelf.lease("key-03").unwrap();
        generations.make_room();
        assert!(left() == 1 && place("key-03").exists());
        drop(lease);
        generations.make_room();
        assert_eq!(left(), 0);
    }
}
