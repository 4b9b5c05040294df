//! Puts guest kernels and images into `WRENN_DIR`, from where `make images` left them. What is published is never edited: a new digest
//! takes the place of the old one by a rename, and hosts keep what they have imported.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use crate::failure::{Doing as _, Failure};

/// A copy of a rootfs of some hundred MiB, on a busy disk.
const COPY_MAX: Duration = Duration::from_secs(300);

/// `--artifacts`, else `current` in the cache of `make images`.
pub fn place(given: Option<&Path>) -> Option<PathBuf> {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    given.map(Path::to_owned).or_else(|| {
        let cache = from("WRENN_CACHE")
            .or_else(|| from("XDG_CACHE_HOME").map(|path| path.join("wrenn")))
            .or_else(|| from("HOME").map(|path| path.join(".cache/wrenn")))?;
        Some(cache.join("current"))
    })
}

/// Fills `dir` when there is something newer; fails when afterwards a kernel or the minimal image is missing.
pub async fn publish(given: Option<&Path>, dir: &Path) -> Result<(), Failure> {
    let from = place(given);
    if let Some(from) = &from
        && from.is_dir()
    {
        for file in files(&from.join("kernels"))? {
            if is_unfinished(&file) {
                continue;
            }
            let name = file.file_name().expect("a listed file has a name");
            put(&file, &dir.join("kernels").join(name)).await?;
        }
        for image in files(&from.join("images"))?.into_iter().filter(|path| path.is_dir() && !is_unfinished(path)) {
            let to = dir.join("images").join(image.file_name().expect("a listed folder has a name"));
            put_image(&image, &to).await?;
        }
    } else if let Some(given) = given {
        return Err(Failure::new(format!("{} is no directory", given.display())));
    }
    check(dir, from.as_deref())
}

fn check(dir: &Path, from: Option<&Path>) -> Result<(), Failure> {
    let has_kernel = files(&dir.join("kernels"))?
        .iter()
        .any(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinux")));
    let missing = match (has_kernel, dir.join("images/minimal/rootfs.ext4").is_file()) {
        (true, true) => return Ok(()),
        (false, true) => "no guest kernel (kernels/vmlinux-<version>)",
        (true, false) => "no minimal image (images/minimal/rootfs.ext4)",
        (false, false) => {
            "neither a guest kernel (kernels/vmlinux-<version>) nor the minimal image (images/minimal/rootfs.ext4)"
        }
    };
    let looked = from.map(|from| format!(" and none in {}", from.display())).unwrap_or_default();
    Err(Failure::new(format!(
        "there is {missing} in {}{looked}: run `make images`, or give --artifacts",
        dir.display()
    )))
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    match std::fs::read_dir(folder) {
        Ok(entries) => Ok(entries.flatten().map(|entry| entry.path()).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).doing(|| format!("list {}", folder.display())),
    }
}

/// What another builder is just writing.
fn is_unfinished(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "tmp")
}

/// As one folder, exchanged with the old one: who holds it open sees an image and the digest that belongs to it.
async fn put_image(from: &Path, to: &Path) -> Result<(), Failure> {
    let digest = |folder: &Path| std::fs::read_to_string(folder.join("digest")).unwrap_or_default();
    if to.join("rootfs.ext4").is_file() && !digest(from).is_empty() && digest(from) == digest(to) {
        return Ok(());
    }
    let doing = || format!("publish {}", to.display());
    let folder = to.parent().expect("an image lies in a folder");
    std::fs::create_dir_all(folder).doing(doing)?;
    let name = to.file_name().expect("an image has a name").to_string_lossy();
    let unfinished = to.with_file_name(format!(".{name}.tmp"));
    if unfinished.exists() {
        std::fs::remove_dir_all(&unfinished).doing(doing)?;
    }
    std::fs::create_dir(&unfinished).doing(doing)?;
    for file in files(from)?.into_iter().filter(|path| path.is_file() && !is_unfinished(path)) {
        put(&file, &unfinished.join(file.file_name().expect("a listed file has a name"))).await?;
    }
    if to.exists() {
        let here = nix::fcntl::AT_FDCWD;
        nix::fcntl::renameat2(here, &unfinished, here, to, nix::fcntl::RenameFlags::RENAME_EXCHANGE).doing(doing)?;
        std::fs::remove_dir_all(&unfinished).doing(doing)?;
    } else {
        std::fs::rename(&unfinished, to).doing(doing)?;
    }
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).doing(doing)
}

/// A hard link where that is possible, else a sparse copy; whole in either case. What has the same name, size and time is left alone.
async fn put(from: &Path, to: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::MetadataExt as _;
    let doing = || format!("put {} into its place", to.display());
    let source = std::fs::metadata(from).doing(|| format!("read {}", from.display()))?;
    if let Ok(there) = std::fs::metadata(to)
        && ((there.dev(), there.ino()) == (source.dev(), source.ino())
            || (there.len() == source.len() && there.mtime() == source.mtime()))
    {
        return Ok(());
    }
    let folder = to.parent().expect("a file lies in a folder");
    std::fs::create_dir_all(folder).doing(doing)?;
    let unfinished = to.with_extension("up.tmp");
    let _ = std::fs::remove_file(&unfinished);
    if std::fs::hard_link(from, &unfinished).is_err() {
        let mut copy = tokio::process::Command::new("cp");
        copy.args(["--sparse=always", "--reflink=auto", "--preserve=timestamps", "--"])
            .arg(from)
            .arg(&unfinished)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let copied = tokio::time::timeout(COPY_MAX, copy.output())
            .await
            .map_err(|_| Failure::new(format!("copying {} takes too long", from.display())))?
            .doing(|| "start cp".to_owned())?;
        if !copied.status.success() {
            let _ = std::fs::remove_file(&unfinished);
            return Err(Failure::new(format!(
                "copy {}: {}",
                from.display(),
                String::from_utf8_lossy(&copied.stderr).trim()
            )));
        }
        std::fs::File::open(&unfinished).and_then(|file| file.sync_all()).doing(doing)?;
    }
    std::fs::rename(&unfinished, to).doing(doing)?;
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).doing(doing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_new_digest_replaces_the_old_one_and_missing_things_are_named() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let failure = publish(Some(from.path()), to.path()).await.unwrap_err();
        assert!(failure.message().contains("neither a guest kernel"), "{}", failure.message());
        std::fs::create_dir_all(from.path().join("kernels")).unwrap();
        std::fs::create_dir_all(from.path().join("images/minimal")).unwrap();
        std::fs::write(from.path().join("kernels/vmlinux-6.1.0"), "kernel").unwrap();
        std::fs::write(from.path().join("images/minimal/rootfs.ext4"), "one").unwrap();
        std::fs::write(from.path().join("images/minimal/digest"), "1").unwrap();
        publish(Some(from.path()), to.path()).await.unwrap();
        // As `make images` does it: by renames.
        for (name, content) in [("rootfs.ext4", "the second"), ("digest", "22")] {
            let place = from.path().join("images/minimal").join(name);
            std::fs::write(place.with_extension("x"), content).unwrap();
            std::fs::rename(place.with_extension("x"), &place).unwrap();
        }
        publish(Some(from.path()), to.path()).await.unwrap();
        assert_eq!(std::fs::read_to_string(to.path().join("images/minimal/rootfs.ext4")).unwrap(), "the second");
        assert_eq!(std::fs::read_to_string(to.path().join("images/minimal/digest")).unwrap(), "22");
    }
}
