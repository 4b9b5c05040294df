//! Things that are slow to make, kept outside the checkout under a hash of everything that went into them.
//!
//! An entry is a directory `<cache>/<kind>/<key>/`. It is built beside its place and renamed when it is whole, under a lock, so that a
//! build that was killed leaves nothing that looks finished and two builders do not make the same thing twice.

use std::fs;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest as _, Sha256};

/// Entries of one kind that are kept; the least recently used go. A rootfs is 200 to 300 MiB.
const KEPT: usize = 3;

/// `WRENN_CACHE`, else below the user's cache directory.
pub fn cache() -> Result<PathBuf> {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("WRENN_CACHE")
        .or_else(|| from("XDG_CACHE_HOME").map(|path| path.join("wrenn")))
        .or_else(|| from("HOME").map(|path| path.join(".cache/wrenn")))
        .context("neither WRENN_CACHE, XDG_CACHE_HOME nor HOME is set")
}

/// A hash over everything that an artifact is made of.
#[derive(Default)]
pub struct Key(Sha256);

impl Key {
    #[must_use]
    pub fn text(mut self, text: &str) -> Self {
        self.0.update((text.len() as u64).to_le_bytes());
        self.0.update(text.as_bytes());
        self
    }

    pub fn file(self, path: &Path) -> Result<Self> {
        let content = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        Ok(self.text(&hex::encode(Sha256::digest(&content))))
    }

    /// 32 hex digits: 128 bits name an artifact well enough.
    fn finish(self) -> String {
        hex::encode(self.0.finalize())[..32].to_owned()
    }
}

/// The directory of the artifact; `build` fills an empty one when there is none yet.
pub fn get(kind: &str, key: Key, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let kind_dir = cache()?.join(kind);
    fs::create_dir_all(&kind_dir).with_context(|| format!("make {}", kind_dir.display()))?;
    let key = key.finish();
    let place = kind_dir.join(&key);
    if !place.exists() {
        let lock = fs::File::create(kind_dir.join("lock"))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e).context("lock the cache")?;
        if !place.exists() {
            let unfinished = kind_dir.join(format!("{key}.tmp"));
            let _ = fs::remove_dir_all(&unfinished);
            fs::create_dir_all(&unfinished)?;
            progress(&format!("making {kind}"), || build(&unfinished))?;
            sync_tree(&unfinished)?;
            fs::rename(&unfinished, &place)?;
            fs::File::open(&kind_dir)?.sync_all()?;
            prune(&kind_dir, &place)?;
        }
    }
    used(&place)?;
    Ok(place)
}

/// The directory of the artifact, where it is made already.
pub fn made(kind: &str, key: Key) -> Result<Option<PathBuf>> {
    let place = cache()?.join(kind).join(key.finish());
    if !place.exists() {
        return Ok(None);
    }
    used(&place)?;
    Ok(Some(place))
}

/// The time of the last use decides what is pruned.
fn used(place: &Path) -> Result<()> {
    let now = nix::sys::time::TimeSpec::UTIME_NOW;
    let _ = nix::sys::stat::futimens(fs::File::open(place)?.as_fd(), &now, &now);
    Ok(())
}

/// Says what is under way and how long it has taken, once in a while, so that a slow step is not taken for a hang.
fn progress<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let began = Instant::now();
    eprintln!("{what} ...");
    let (done, ended) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while ended.recv_timeout(Duration::from_secs(15)) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("{what} ... {} s", began.elapsed().as_secs());
            }
        });
        let result = work();
        drop(done);
        if result.is_ok() {
            eprintln!("{what}: done in {:.1} s", began.elapsed().as_secs_f64());
        }
        result
    })
}

fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        } else if entry.file_type()?.is_file() {
            fs::File::open(entry.path())?.sync_all()?;
        }
    }
    Ok(fs::File::open(dir)?.sync_all()?)
}

/// Under the lock of the kind, so whatever is unfinished was left by a build that was killed.
fn prune(kind_dir: &Path, keep: &Path) -> Result<()> {
    let mut entries: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(kind_dir)?.flatten() {
        let path = entry.path();
        if !path.is_dir() || path == keep {
            continue;
        }
        if path.extension().is_some_and(|extension| extension == "tmp") {
            fs::remove_dir_all(path)?;
        } else {
            entries.push((entry.metadata()?.modified()?, path));
        }
    }
    entries.sort_by(|a, b| b.cmp(a));
    for (_, path) in entries.into_iter().skip(KEPT - 1) {
        fs::remove_dir_all(path)?;
    }
    Ok(())
}

/// Puts a file into its place as a whole: never an edit of what is there.
pub fn publish(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().context("a file lies in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    if same_file(from, to) {
        // A rename over another link of the same file does nothing, and would leave the unfinished one behind.
        return Ok(());
    }
    let _lock = lock(folder)?;
    let unfinished = beside(to)?;
    place(from, &unfinished)?;
    fs::rename(&unfinished, to).with_context(|| format!("publish {}", to.display()))?;
    Ok(fs::File::open(folder)?.sync_all()?)
}

/// Puts a finished folder into the place of another in one step: who holds the folder open sees files that belong together, either
/// the old ones or the new ones.
pub fn publish_folder(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().context("a folder lies in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let _lock = lock(folder)?;
    let unfinished = beside(to)?;
    fs::create_dir(&unfinished)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        place(&entry.path(), &unfinished.join(entry.file_name()))?;
    }
    fs::File::open(&unfinished)?.sync_all()?;
    if to.exists() {
        nix::fcntl::renameat2(
            nix::fcntl::AT_FDCWD,
            &unfinished,
            nix::fcntl::AT_FDCWD,
            to,
            nix::fcntl::RenameFlags::RENAME_EXCHANGE,
        )
        .with_context(|| format!("publish {}", to.display()))?;
        fs::File::open(folder)?.sync_all()?;
        fs::remove_dir_all(&unfinished)?;
    } else {
        fs::rename(&unfinished, to).with_context(|| format!("publish {}", to.display()))?;
    }
    Ok(fs::File::open(folder)?.sync_all()?)
}

/// One publisher at a time in a folder; ends with the process at the latest.
fn lock(folder: &Path) -> Result<Flock<fs::File>> {
    let file = fs::File::open(folder)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e).with_context(|| format!("lock {}", folder.display()))
}

/// Where something is made that is to go to `to`; what a killed publisher left there is removed.
fn beside(to: &Path) -> Result<PathBuf> {
    let name = to.file_name().context("a place has a name")?.to_string_lossy();
    let unfinished = to.with_file_name(format!(".{name}.tmp"));
    if unfinished.is_dir() {
        fs::remove_dir_all(&unfinished)?;
    } else if unfinished.exists() {
        fs::remove_file(&unfinished)?;
    }
    Ok(unfinished)
}

fn same_file(one: &Path, other: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

/// A hard link where that is possible, else a sparse copy.
fn place(from: &Path, to: &Path) -> Result<()> {
    if fs::hard_link(from, to).is_err() {
        let mut copy = std::process::Command::new("cp");
        copy.args(["--sparse=always", "--reflink=auto", "--preserve=timestamps", "--"]).arg(from).arg(to);
        crate::run::output(&mut copy)?;
        fs::File::open(to)?.sync_all()?;
    }
    Ok(())
}

/// Writes a small file as a whole.
pub fn write(path: &Path, content: &[u8]) -> Result<()> {
    let unfinished = path.with_extension("write.tmp");
    let mut file = fs::File::create(&unfinished)?;
    file.write_all(content)?;
    file.sync_all()?;
    Ok(fs::rename(&unfinished, path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_what_was_put_together_how() {
        let key = |parts: &[&str]| parts.iter().fold(Key::default(), |key, part| key.text(part)).finish();
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_ne!(key(&["a", "b"]), key(&["ab"]));
        assert_ne!(key(&["a", "b"]), key(&["b", "a"]));
        assert_eq!(key(&[]).len(), 32);
    }

    #[test]
    fn published_files_are_whole_and_replaceable() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two, to) = (dir.path().join("one"), dir.path().join("two"), dir.path().join("deep/place-6.1.2"));
        fs::write(&one, "one").unwrap();
        fs::write(&two, "two").unwrap();
        for from in [&one, &two, &two] {
            publish(from, &to).unwrap();
        }
        assert_eq!(fs::read_to_string(&to).unwrap(), "two");
        assert_eq!(fs::read_to_string(&one).unwrap(), "one", "the source is not touched");
        assert_eq!(visible(&dir.path().join("deep")), ["place-6.1.2"], "nothing unfinished is left");
    }

    #[test]
    fn a_published_folder_replaces_the_old_one_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two, to) = (dir.path().join("one"), dir.path().join("two"), dir.path().join("images/minimal"));
        for (from, files) in [(&one, &["digest", "old"][..]), (&two, &["digest"])] {
            fs::create_dir(from).unwrap();
            for file in files {
                fs::write(from.join(file), from.file_name().unwrap().to_str().unwrap()).unwrap();
            }
        }
        publish_folder(&one, &to).unwrap();
        let held = fs::File::open(to.join("digest")).unwrap();
        // What a publisher that was killed has left is in nobody's way.
        fs::create_dir(dir.path().join("images/.minimal.tmp")).unwrap();
        publish_folder(&two, &to).unwrap();
        assert_eq!(visible(&to), ["digest"]);
        assert_eq!(fs::read_to_string(to.join("digest")).unwrap(), "two");
        assert_eq!(std::io::read_to_string(held).unwrap(), "one", "who reads the old one goes on reading it");
        assert_eq!(visible(&dir.path().join("images")), ["minimal"]);
    }

    #[test]
    fn pruning_keeps_the_last_used_and_removes_what_is_unfinished() {
        let dir = tempfile::tempdir().unwrap();
        for (age, name) in ["keep", "d", "c", "b", "a", "half.tmp"].into_iter().enumerate() {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            let time = SystemTime::now() - Duration::from_secs(60 * age as u64);
            fs::File::open(&path).unwrap().set_modified(time).unwrap();
        }
        fs::write(dir.path().join("lock"), "").unwrap();
        prune(dir.path(), &dir.path().join("keep")).unwrap();
        assert_eq!(visible(dir.path()), ["c", "d", "keep", "lock"]);
    }

    fn visible(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}
