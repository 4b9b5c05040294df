//! A saved state of one sandbox: memory, device state and disk as flat files, and a manifest that says what they are. Valid as a whole or
//! not at all: it is made beside its place and renamed into it.
//!
//! ```text
//!  <sandbox>/gen-00007.tmp/   being made, or left by a pause that did not come about
//!  <sandbox>/gen-00007/       manifest, memory, device, disk: never written to again; and digests, which come later (`digests`)
//!                             of the disk alone: no memory and no device
//! ```

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use microvm::{SaveTarget, Stamp};
use model::sandbox::Kept;
use serde::{Deserialize, Serialize};

use super::state::{Generation, Spec};
use crate::durable;
use crate::sealed::{self, Broken};

/// The version of the manifest that is written, and the only one that is read.
const FORMAT: u32 = 1;
const MANIFEST_BYTES_MAX: u64 = 64 * 1024;
/// A device state has some hundred KiB.
const DEVICE_BYTES_MAX: u64 = 64 * 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    #[error("make the saved state")]
    Make(#[source] io::Error),
    #[error("read the saved state")]
    Read(#[source] io::Error),
    #[error("the saved state is damaged: {0}")]
    Damaged(String),
    /// It is whole, and untouched.
    #[error("the saved state does not fit this host: {0}")]
    Incompatible(String),
}

impl GenerationError {
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Make(cause) if matches!(cause.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub generation: Generation,
    /// The one that its run had begun with.
    pub parent: Option<Generation>,
    pub made_at: DateTime<Utc>,
    pub vmm: Stamp,
    pub vcpus: u8,
    pub memory_mib: u32,
    pub disk_mib: u32,
    pub template: String,
    pub envd_version: String,
    /// By what the guest in it knows its host. Resumed, it learns another one.
    pub control_token: String,
    /// Bytes, and BLAKE3 of all of them. It is read before every load. None, and no memory either, of the disk alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<Content>,
    /// What they hold is known by digests of their own, which are made later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    pub disk_bytes: u64,
    /// Of the disk alone: what tells it, and copies of it, from every other state. With memory its device state does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_id: Option<String>,
    /// Users' processes stand still in it, until an `/init` lets them go on. Not known of what was saved before this was noted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_quiet: bool,
}

impl Manifest {
    fn kept(&self) -> Result<Kept, GenerationError> {
        match (&self.device, self.memory_bytes, &self.disk_id) {
            (Some(_), Some(_), None) => Ok(Kept::Memory),
            (None, None, Some(_)) => Ok(Kept::Disk),
            _ => Err(GenerationError::Damaged("its manifest names half of a memory".to_owned())),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    pub bytes: u64,
    pub blake3: String,
}

/// What a manifest says beside what its files say themselves.
pub struct About<'a> {
    pub kept: Kept,
    pub is_quiet: bool,
    pub parent: Option<Generation>,
    pub vmm: Stamp,
    pub spec: &'a Spec,
    pub envd_version: &'a str,
    pub control_token: &'a str,
}

/// The files of one generation, wherever they lie.
#[derive(Debug, Clone)]
pub struct Files {
    directory: PathBuf,
}

impl Files {
    pub fn memory(&self) -> PathBuf {
        self.directory.join("memory")
    }

    pub fn device(&self) -> PathBuf {
        self.directory.join("device")
    }

    /// What the guest had said, where that is kept.
    pub fn console(&self) -> PathBuf {
        self.directory.join("console")
    }

    pub fn disk(&self) -> PathBuf {
        self.directory.join("disk")
    }

    /// Made after the rest, or not at all: [`super::digests`].
    pub(super) fn digests(&self) -> PathBuf {
        self.directory.join("digests")
    }

    fn manifest(&self) -> PathBuf {
        self.directory.join("manifest")
    }

    pub fn save_target(&self) -> SaveTarget {
        SaveTarget { memory: self.memory(), device: self.device() }
    }
}

pub fn sealed_files(sandbox: &Path, generation: Generation) -> Files {
    Files { directory: sandbox.join(name(generation)) }
}

/// Of one that is being made.
pub fn begun_files(sandbox: &Path, generation: Generation) -> Files {
    Files { directory: making(sandbox, generation) }
}

fn name(generation: Generation) -> String {
    format!("gen-{:05}", generation.0)
}

fn making(sandbox: &Path, generation: Generation) -> PathBuf {
    sandbox.join(format!("{}{}", name(generation), durable::TEMPORARY_SUFFIX))
}

/// An empty place for a generation; what an earlier attempt left there goes.
pub fn begin(sandbox: &Path, generation: Generation) -> Result<Files, GenerationError> {
    let directory = making(sandbox, generation);
    let made = durable::remove_tree(&directory).and_then(|()| fs::DirBuilder::new().mode(0o700).create(&directory));
    made.map_err(GenerationError::Make)?;
    Ok(Files { directory })
}

/// Removes what was being made, also if it became valid. Repeatable.
pub fn discard(sandbox: &Path, generation: Generation) -> io::Result<()> {
    let (sealed, making) = (sandbox.join(name(generation)), making(sandbox, generation));
    if sealed.try_exists()? {
        // Not valid from one instant to the next: half a generation must never bear its name.
        durable::remove_tree(&making)?;
        fs::rename(&sealed, &making)?;
        durable::sync_directory(sandbox)?;
    }
    durable::remove_tree(&making)
}

/// Whether the generation is valid: its name is there. What is in it is looked at when it is loaded.
pub fn is_sealed(sandbox: &Path, generation: Generation) -> io::Result<bool> {
    sandbox.join(name(generation)).try_exists()
}

/// Makes the generation valid, and everything of it is on the disk when this returns.
pub fn seal(sandbox: &Path, generation: Generation, about: &About<'_>) -> Result<(), GenerationError> {
    let files = begun_files(sandbox, generation);
    let sealed = || -> io::Result<()> {
        let size = |path: &Path| fs::metadata(path).map(|meta| meta.len());
        let has_memory = about.kept == Kept::Memory;
        let manifest = Manifest {
            generation,
            parent: about.parent,
            made_at: Utc::now(),
            vmm: about.vmm.clone(),
            vcpus: about.spec.vcpus,
            memory_mib: about.spec.memory_mib,
            disk_mib: about.spec.disk_mib,
            template: about.spec.template.to_string(),
            envd_version: about.envd_version.to_owned(),
            control_token: about.control_token.to_owned(),
            device: has_memory.then(|| content(&files.device())).transpose()?,
            memory_bytes: has_memory.then(|| size(&files.memory())).transpose()?,
            disk_bytes: size(&files.disk())?,
            disk_id: (!has_memory).then(|| format!("{:032x}", rand::random::<u128>())),
            is_quiet: about.is_quiet,
        };
        seal_with(sandbox, generation, &manifest)
    };
    sealed().map_err(GenerationError::Make)
}

fn seal_with(sandbox: &Path, generation: Generation, manifest: &Manifest) -> io::Result<()> {
    let files = begun_files(sandbox, generation);
    for (file, is_there) in [
        (files.memory(), manifest.memory_bytes.is_some()),
        (files.device(), manifest.device.is_some()),
        (files.disk(), true),
    ] {
        if is_there {
            File::open(file)?.sync_all()?;
        }
    }
    durable::write(&files.manifest(), &sealed::encode(FORMAT, manifest), 0o600)?;
    fs::rename(&files.directory, sandbox.join(name(generation)))?;
    durable::sync_directory(sandbox)
}

/// Makes a copy of a valid generation valid: the same state under another number. The copy is checked when it is loaded.
pub fn seal_copy(place: &Path, generation: Generation, from: &Files) -> Result<(), GenerationError> {
    let manifest = Manifest { generation, parent: None, ..read_manifest(from)? };
    match fs::copy(from.digests(), begun_files(place, generation).digests()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        copied => {
            let synced = copied.and_then(|_| File::open(begun_files(place, generation).digests())?.sync_all());
            synced.map_err(GenerationError::Make)?;
        }
    }
    seal_with(place, generation, &manifest).map_err(GenerationError::Make)
}

/// The files of a generation that can be loaded here, as far as that is known before it is tried.
pub fn verified(
    sandbox: &Path,
    generation: Generation,
    spec: &Spec,
    loads: &dyn Fn(&Stamp) -> Result<(), String>,
) -> Result<(Files, Manifest), GenerationError> {
    let files = sealed_files(sandbox, generation);
    let manifest = read_manifest(&files)?;
    if manifest.kept()? == Kept::Memory {
        loads(&manifest.vmm).map_err(GenerationError::Incompatible)?;
    }
    if (manifest.vcpus, manifest.memory_mib, manifest.disk_mib) != (spec.vcpus, spec.memory_mib, spec.disk_mib) {
        return Err(GenerationError::Incompatible("it is of a machine of another shape".to_owned()));
    }
    if manifest.generation != generation {
        return Err(GenerationError::Damaged("its manifest is of another one".to_owned()));
    }
    for (what, path, bytes) in
        [("memory", files.memory(), manifest.memory_bytes), ("disk", files.disk(), Some(manifest.disk_bytes))]
    {
        let Some(bytes) = bytes else { continue };
        let found = fs::metadata(path).map_err(GenerationError::Read)?.len();
        if found != bytes {
            return Err(GenerationError::Damaged(format!("its {what} has {found} bytes instead of {bytes}")));
        }
    }
    if let Some(device) = &manifest.device
        && content(&files.device()).map_err(GenerationError::Read)? != *device
    {
        return Err(GenerationError::Damaged("its device state differs from its digest".to_owned()));
    }
    Ok((files, manifest))
}

/// What there is of a valid generation, as its manifest says.
pub fn kept(files: &Files) -> Result<Kept, GenerationError> {
    read_manifest(files)?.kept()
}

/// Whether it has memory, in which users' processes stand still: no matter how long before the `/init` it is continued, they do not run.
pub fn stands_still(files: &Files) -> Result<bool, GenerationError> {
    let manifest = read_manifest(files)?;
    Ok(manifest.kept()? == Kept::Memory && manifest.is_quiet)
}

fn read_manifest(files: &Files) -> Result<Manifest, GenerationError> {
    let bytes = durable::read(&files.manifest(), MANIFEST_BYTES_MAX).map_err(GenerationError::Read)?;
    sealed::decode(FORMAT, &bytes).map_err(|broken| match broken {
        Broken::Format(_) => GenerationError::Incompatible(format!("its manifest says: {broken}")),
        Broken::Damaged(_) => GenerationError::Damaged(format!("its manifest: {broken}")),
    })
}

/// Bytes that a generation takes, also those that it shares.
pub fn size(files: &Files) -> io::Result<u64> {
    let taken = |path: PathBuf| fs::metadata(path).map(|meta| meta.blocks() * 512);
    let of_memory = |path: PathBuf| match taken(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        other => other,
    };
    Ok(of_memory(files.memory())? + of_memory(files.device())? + taken(files.disk())?)
}

/// Removes every other generation than this one, or all of them, whole or not.
pub fn keep_only(sandbox: &Path, generation: Option<Generation>) -> io::Result<()> {
    let kept = generation.map(name);
    let entries = match fs::read_dir(sandbox) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with("gen-") && Some(name) != kept.as_deref()) {
            durable::remove_tree(&entry.path())?;
        }
    }
    Ok(())
}

/// What tells this valid state, and copies of it, from every other.
pub(super) fn identity(files: &Files) -> io::Result<String> {
    match content(&files.device()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let manifest = read_manifest(files).map_err(|error| match error {
                GenerationError::Read(error) => error,
                other => io::Error::other(other),
            })?;
            manifest.disk_id.ok_or_else(|| io::Error::other("it has no device state"))
        }
        other => other.map(|content| content.blake3),
    }
}

fn content(path: &Path) -> io::Result<Content> {
    let bytes = durable::read(path, DEVICE_BYTES_MAX)?;
    Ok(Content { bytes: bytes.len() as u64, blake3: blake3::hash(&bytes).to_hex().to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEVEN: Generation = Generation(7);

    fn spec() -> Spec {
        Spec { vcpus: 1, memory_mib: 256, disk_mib: 1024, ..Spec::unknown() }
    }

    fn stamp() -> Stamp {
        Stamp {
            driver: "qemu".to_owned(),
            version: "7.2".to_owned(),
            isolation: "emulation".to_owned(),
            tsc_khz: 0,
            cpu: String::new(),
        }
    }

    fn made(sandbox: &Path) {
        made_of(Kept::Memory, sandbox);
    }

    fn made_of(kept: Kept, sandbox: &Path) {
        let files = begin(sandbox, SEVEN).unwrap();
        let all = [(files.disk(), "disk"), (files.memory(), "memory"), (files.device(), "device")];
        for (path, text) in all.into_iter().take(if kept == Kept::Disk { 1 } else { 3 }) {
            fs::write(path, text).unwrap();
        }
        let (parent, spec) = (Some(Generation(6)), &spec());
        let about = About { kept, is_quiet: true, parent, vmm: stamp(), spec, envd_version: "1", control_token: "c" };
        seal(sandbox, SEVEN, &about).unwrap();
    }

    #[test]
    fn a_generation_is_whole_or_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let sandbox = dir.path();
        assert!(!is_sealed(sandbox, SEVEN).unwrap());
        begin(sandbox, SEVEN).unwrap();
        assert!(!is_sealed(sandbox, SEVEN).unwrap());
        discard(sandbox, SEVEN).unwrap();
        discard(sandbox, SEVEN).unwrap();
        made(sandbox);
        discard(sandbox, SEVEN).unwrap();
        assert_eq!(fs::read_dir(sandbox).unwrap().count(), 0);
        made(sandbox);
        assert!(is_sealed(sandbox, SEVEN).unwrap());
        let (_, manifest) = verified(sandbox, SEVEN, &spec(), &|saved| stamp().loads(saved)).unwrap();
        assert_eq!((manifest.parent, manifest.memory_bytes), (Some(Generation(6)), Some(6)));
        begin(sandbox, Generation(8)).unwrap();
        fs::create_dir(sandbox.join("gen-00006")).unwrap();
        keep_only(sandbox, Some(SEVEN)).unwrap();
        assert_eq!(fs::read_dir(sandbox).unwrap().count(), 1);
        keep_only(sandbox, None).unwrap();
        assert_eq!(fs::read_dir(sandbox).unwrap().count(), 0);
        keep_only(&sandbox.join("none"), None).unwrap();
    }

    #[test]
    fn of_the_disk_alone_no_memory_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        made_of(Kept::Disk, dir.path());
        // Another VMM boots it as well.
        let (files, manifest) =
            verified(dir.path(), SEVEN, &spec(), &|saved| Stamp { version: "8".to_owned(), ..stamp() }.loads(saved))
                .unwrap();
        assert_eq!((manifest.memory_bytes, kept(&files).unwrap()), (None, Kept::Disk));
        assert!(!stands_still(&files).unwrap());
        // A copy is the same state, under whichever number.
        let copy = tempfile::tempdir().unwrap();
        let to = begin(copy.path(), Generation(1)).unwrap();
        fs::copy(files.disk(), to.disk()).unwrap();
        seal_copy(copy.path(), Generation(1), &files).unwrap();
        assert_eq!(identity(&sealed_files(copy.path(), Generation(1))).unwrap(), identity(&files).unwrap());
        assert!(kept(&sealed_files(copy.path(), Generation(1))).unwrap() == Kept::Disk);
        assert!(size(&files).unwrap() > 0);
        let other = tempfile::tempdir().unwrap();
        made(other.path());
        assert_eq!(kept(&sealed_files(other.path(), SEVEN)).unwrap(), Kept::Memory);
        assert!(stands_still(&sealed_files(other.path(), SEVEN)).unwrap());
        fs::write(dir.path().join("gen-00007/disk"), "x").unwrap();
        assert!(matches!(
            verified(dir.path(), SEVEN, &spec(), &|saved| stamp().loads(saved)),
            Err(GenerationError::Damaged(_))
        ));
    }

    /// By agents that know of no others.
    #[test]
    fn a_state_with_memory_can_be_read_as_ever() {
        let dir = tempfile::tempdir().unwrap();
        made(dir.path());
        let text = fs::read_to_string(dir.path().join("gen-00007/manifest")).unwrap();
        assert!(text.contains("\"memory_bytes\":6") && text.contains("\"device\":{"), "{text}");
    }

    #[test]
    fn what_is_damaged_or_of_another_machine_is_not_loaded() {
        let refusal = |harm: &dyn Fn(&Path), spec: &Spec, stamp: &Stamp| {
            let dir = tempfile::tempdir().unwrap();
            made(dir.path());
            harm(&dir.path().join("gen-00007"));
            match verified(dir.path(), SEVEN, spec, &|saved| stamp.loads(saved)).err().unwrap() {
                GenerationError::Damaged(_) => "damaged",
                GenerationError::Incompatible(_) => "incompatible",
                GenerationError::Read(_) => "unreadable",
                GenerationError::Make(_) => "unmade",
            }
        };
        let nothing = |_: &Path| {};
        let flip = |file: &'static str| {
            move |at: &Path| {
                let mut bytes = fs::read(at.join(file)).unwrap();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                fs::write(at.join(file), bytes).unwrap();
            }
        };
        let cut = |file: &'static str| move |at: &Path| fs::write(at.join(file), "x").unwrap();
        let gone = |file: &'static str| move |at: &Path| fs::remove_file(at.join(file)).unwrap();
        assert_eq!(refusal(&flip("manifest"), &spec(), &stamp()), "damaged");
        assert_eq!(refusal(&cut("manifest"), &spec(), &stamp()), "damaged");
        assert_eq!(refusal(&flip("device"), &spec(), &stamp()), "damaged");
        assert_eq!(refusal(&cut("memory"), &spec(), &stamp()), "damaged");
        assert_eq!(refusal(&cut("disk"), &spec(), &stamp()), "damaged");
        for file in ["manifest", "device", "memory", "disk"] {
            assert_eq!(refusal(&gone(file), &spec(), &stamp()), "unreadable", "{file}");
        }
        assert_eq!(refusal(&nothing, &Spec { vcpus: 2, ..spec() }, &stamp()), "incompatible");
        assert_eq!(refusal(&nothing, &spec(), &Stamp { version: "8".to_owned(), ..stamp() }), "incompatible");
        let newer = |at: &Path| {
            let text = fs::read_to_string(at.join("manifest")).unwrap();
            fs::write(at.join("manifest"), text.replacen("\"format\":1", "\"format\":2", 1)).unwrap();
        };
        assert_eq!(refusal(&newer, &spec(), &stamp()), "incompatible");
    }
}
