//! The booted state of each template, in each shape: what a create is restored from instead of booting once more.
//!
//! ```text
//!  <pool>/templates/<key>/gen-00001/     a generation like a sandbox's, of a guest that has no identity yet
//! ```
//!
//! The first create of its kind boots, and leaves the state behind before the guest learns who it is. The key is a digest of everything
//! that the state follows from: the template's edition, the kernel, the machine's shape. Nothing here is anybody's: it can be removed at any
//! time, and the next create boots.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use microvm::{Microvm, Stamp};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use tracing::{info, warn};

use super::fence::Wish;
use super::generation::{self, About, Files, GenerationError};
use super::state::{Generation, Run, Spec};
use super::steps::{Body, StepError, blocking};
use crate::durable;
use crate::machines::MachineError;
use crate::template;

const FOLDER: &str = "templates";
/// Each key has one.
pub const GENERATION: Generation = Generation(1);
/// Kept at once, the ones that were used last.
const KEPT_MAX: usize = 8;
/// One that was used so lately may be what a create is restored from right now.
const IN_USE: Duration = Duration::from_secs(600);
/// Pool that must be left when one is made, beside its own size: it is worth less than a sandbox.
const POOL_LEFT_MIB: u64 = 1024;

#[derive(Debug)]
pub struct TemplateGenerations {
    folder: PathBuf,
    /// WRENN_DIR, where kernels lie.
    dir: PathBuf,
    making: Arc<Mutex<HashSet<String>>>,
}

/// The place of one that is being made; nobody else makes it meanwhile.
struct Making {
    key: String,
    place: PathBuf,
    all: Arc<Mutex<HashSet<String>>>,
}

impl Drop for Making {
    fn drop(&mut self) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

impl TemplateGenerations {
    /// Removes what an earlier agent had half made.
    pub fn open(pool: &Path, dir: &Path) -> io::Result<Self> {
        let folder = pool.join(FOLDER);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        for entry in fs::read_dir(&folder)? {
            let place = entry?.path();
            if !generation::is_sealed(&place, GENERATION)? {
                durable::remove_tree(&place)?;
            }
        }
        Ok(Self { folder, dir: dir.to_owned(), making: Arc::default() })
    }

    /// `edition`: of the template, as its digest says it.
    fn key(&self, edition: &str, spec: &Spec) -> String {
        let mut digest = blake3::Hasher::new();
        let kernel = template::newest_kernel(&self.dir);
        let files = kernel.iter().flat_map(|kernel| [Some(&kernel.image), kernel.initramfs.as_ref()]);
        for file in files.flatten() {
            // Published under the name of a version; another build of it is another file.
            let meta = fs::metadata(file).map(|meta| (meta.len(), meta.mtime(), meta.mtime_nsec())).ok();
            digest.update(format!("{} {meta:?}\n", file.display()).as_bytes());
        }
        let Spec { template, vcpus, memory_mib, disk_mib, .. } = spec;
        digest.update(format!("{template} {edition} {vcpus} {memory_mib} {disk_mib}").as_bytes());
        digest.finalize().to_hex()[..32].to_owned()
    }

    pub fn place(&self, key: &str) -> PathBuf {
        self.folder.join(key)
    }

    /// Whether a create can be restored from it, as far as that is known before it is tried. One that cannot is removed.
    fn find(&self, key: &str, spec: &Spec, vmm: &Stamp) -> bool {
        let place = self.place(key);
        if !generation::is_sealed(&place, GENERATION).unwrap_or(false) {
            return false;
        }
        match generation::verified(&place, GENERATION, spec, vmm) {
            Ok(_) => {
                // It is in use, which keeps it.
                let touched = File::open(&place).and_then(|place| place.set_modified(SystemTime::now()));
                if let Err(error) = touched {
                    warn!("mark a template's generation as used: {error}");
                }
                true
            }
            Err(error) => {
                warn!("a template's booted state is of no use any more and is removed: {error}");
                self.remove(key);
                false
            }
        }
    }

    /// The next create of this kind boots.
    pub fn remove(&self, key: &str) {
        let place = self.place(key);
        if let Err(error) = generation::discard(&place, GENERATION).and_then(|()| durable::remove_tree(&place)) {
            warn!("remove a template's generation: {error}");
        }
    }

    /// `None` while somebody else makes it.
    fn begin(&self, key: &str) -> Option<Making> {
        let is_first = self.making.lock().unwrap_or_else(PoisonError::into_inner).insert(key.to_owned());
        is_first.then(|| Making { key: key.to_owned(), place: self.place(key), all: self.making.clone() })
    }

    /// Makes room for others of the kind.
    fn prune(&self) -> io::Result<()> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            all.push((entry.metadata()?.modified()?, entry.file_name()));
        }
        all.sort();
        let spare = all.len().saturating_sub(KEPT_MAX);
        for (used, key) in all.into_iter().take(spare) {
            if used.elapsed().is_ok_and(|unused| unused > IN_USE) {
                self.remove(&key.to_string_lossy());
            }
        }
        Ok(())
    }
}

impl Body {
    /// The booted state that this create can be restored from, or could leave behind: the key, and whether it is there.
    pub(super) async fn look_for_booted(&self, wish: &Wish) -> Option<(String, bool)> {
        let generations = self.context().template_generations.clone()?;
        let edition = self.context().ground.edition(&wish.spec.template).await.ok().flatten()?;
        let vmm = self.context().machines.stamp().await.ok()?;
        let spec = wish.spec.clone();
        let looked = blocking(move || {
            let key = generations.key(&edition, &spec);
            let is_there = generations.find(&key, &spec, &vmm);
            (key, is_there)
        });
        Some(looked.await)
    }

    /// Leaves the booted state behind for the creates that follow. Nothing of it that fails is a failure of this create, but that the
    /// microVM does not go on.
    pub(super) async fn keep_booted(&self, wish: &Wish, run: &Run) -> Result<(), StepError> {
        let (Some(generations), Some(wanted)) = (self.context().template_generations.clone(), self.wanted()) else {
            return Ok(());
        };
        // The template may have been published anew while this one booted.
        let is_same = self.look_for_booted(wish).await.is_some_and(|(key, is_there)| key == wanted && !is_there);
        let room = (self.context().room)().await;
        if !is_same || room.disk_free_mib < u64::from(wish.spec.memory_mib) + POOL_LEFT_MIB {
            return Ok(());
        }
        let Some(making) = generations.begin(wanted) else { return Ok(()) };
        let microvm = self.microvm().cloned().ok_or(StepError::NoRun)?;
        let saved = self.save_booted(&making, microvm.as_ref(), run).await;
        microvm.continue_vcpus().await.map_err(MachineError::Continue)?;
        let vmm = match saved {
            Ok(vmm) => vmm,
            Err(error) => {
                warn!(sandbox.id = %self.id(), cause = error.causes(), "the booted state of template {} is not kept: {error}", wish.spec.template);
                return Ok(());
            }
        };
        let spec = wish.spec.clone();
        // The create goes on meanwhile. An agent that ends before leaves half of it, which the next one removes.
        tokio::task::spawn_blocking(move || {
            if let Err(error) = seal(&making, &spec, vmm) {
                warn!("the booted state of template {} is not kept: {error}", spec.template);
                generations.remove(&making.key);
            } else {
                info!(
                    "creates of template {} with {} vCPUs, {} MiB and {} MiB of disk are restored from now on",
                    spec.template, spec.vcpus, spec.memory_mib, spec.disk_mib
                );
            }
            if let Err(error) = generations.prune() {
                warn!("remove templates' generations that nobody uses: {error}");
            }
        });
        Ok(())
    }

    async fn save_booted(&self, making: &Making, microvm: &dyn Microvm, run: &Run) -> Result<Stamp, StepError> {
        let place = making.place.clone();
        let files = blocking(move || -> Result<Files, GenerationError> {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&place);
            made.map_err(GenerationError::Make)?;
            generation::begin(&place, GENERATION)
        })
        .await?;
        let saved = microvm.save(&files.save_target()).await.map_err(MachineError::Save)?;
        self.context().ground.clone_file(&self.places(run).disk, &files.disk(), 0).await?;
        info!(sandbox.id = %self.id(), stopped_ms = saved.stopped.as_millis(), "saved the booted state of a template");
        let version = microvm.record().vmm_version.clone();
        Ok(Stamp { version, ..self.context().machines.stamp().await? })
    }
}

fn seal(making: &Making, spec: &Spec, vmm: Stamp) -> Result<(), GenerationError> {
    let about = About { parent: None, vmm, spec, envd_version: "", control_token: "" };
    dig(&generation::begun_files(&making.place, GENERATION).memory()).map_err(GenerationError::Make)?;
    generation::seal(&making.place, GENERATION, &about)
}

/// Gives back what was reserved for a file and never written: most of the memory of a guest that has just booted.
fn dig(path: &Path) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let length = file.metadata()?.len();
    let mut at = 0;
    while at < length {
        let hole = seek(&file, SeekFrom::Hole(at))?;
        if hole >= length {
            break;
        }
        let data = match seek(&file, SeekFrom::Data(hole)) {
            Err(rustix::io::Errno::NXIO) => length,
            other => other?,
        };
        match fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, hole, data - hole) {
            // A file system that cannot do it keeps it.
            Err(rustix::io::Errno::OPNOTSUPP) => return Ok(()),
            done => done?,
        }
        at = data;
    }
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, Write as _};

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
    fn half_made_ones_go_and_the_least_used_of_too_many() {
        let dir = tempfile::tempdir().unwrap();
        let place = |key: &str| dir.path().join(FOLDER).join(key);
        fs::create_dir_all(place("half").join("gen-00001.tmp")).unwrap();
        for n in 0..KEPT_MAX + 3 {
            let place = place(&format!("key-{n:02}"));
            fs::create_dir_all(place.join("gen-00001")).unwrap();
            let age = Duration::from_secs(if n == 0 { 0 } else { 3600 - n as u64 });
            File::open(&place).unwrap().set_modified(SystemTime::now() - age).unwrap();
        }
        let generations = TemplateGenerations::open(dir.path(), dir.path()).unwrap();
        assert!(!place("half").exists());
        generations.prune().unwrap();
        let left = fs::read_dir(dir.path().join(FOLDER)).unwrap().flatten().count();
        assert!(left == KEPT_MAX && place("key-00").exists() && !place("key-01").exists(), "{left}");
        let making = generations.begin("x").unwrap();
        assert!(generations.begin("x").is_none());
        drop(making);
        assert!(generations.begin("x").is_some());
    }
}
