//! Packages of Debian's archive that kernels come from: which version the machine's package index names, and what is in it.
//!
//! A package is named by the dependency of a meta package, so that one version is fetched and not all that are in the archive.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fmt, fs};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{artifact, run};

#[derive(Debug, PartialEq, Eq)]
pub struct Package {
    /// `linux-image-6.1.0-56-cloud-amd64`
    pub name: String,
    /// `6.1.192-2`
    pub file_version: String,
}

/// A meta package, and where the cache remembers what it named last.
#[derive(Clone, Copy)]
pub struct Meta {
    pub name: &'static str,
    /// How what it names begins.
    pub prefix: &'static str,
    pub kind: &'static str,
}

/// Of an error: the archive did not give this package.
#[derive(Debug)]
struct NotFetched(String);

impl fmt::Display for NotFetched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fetch {}", self.0)
    }
}

/// Does `make` with the package of now. The archive drops a version soon after the next one is there: where the index is missing, or
/// names what is gone, it is refreshed, and the next version is tried.
pub fn with<T>(meta: Meta, make: impl Fn(&Package) -> Result<T>) -> Result<T> {
    let package = resolve(meta).or_else(|error| {
        refresh_index(&error)?;
        resolve(meta)
    })?;
    make(&package).or_else(|error| {
        if !error.is::<NotFetched>() {
            return Err(error);
        }
        refresh_index(&error)?;
        let newer = resolve(meta)?;
        if newer == package { Err(error) } else { make(&newer) }
    })
}

/// What the machine's package index names; it asks nobody. Without an index, what it named last: once made, a kernel needs no archive.
pub fn resolve(meta: Meta) -> Result<Package> {
    let memo = artifact::cache()?.join(meta.kind).join("meta-package");
    match run::text(Command::new("apt-cache").args(["show", "--no-all-versions", meta.name])) {
        Ok(shown) => {
            let package = meta
                .parse(&shown)
                .with_context(|| format!("{} has no dependency that names a {}", meta.name, meta.kind))?;
            fs::create_dir_all(memo.parent().context("the memo lies in a folder")?)?;
            if fs::read_to_string(&memo).ok().as_deref() != Some(&shown) {
                artifact::write(&memo, shown.as_bytes())?;
            }
            Ok(package)
        }
        Err(error) => fs::read_to_string(&memo)
            .ok()
            .and_then(|shown| meta.parse(&shown))
            .ok_or(error)
            .context("look up the kernel package"),
    }
}

impl Meta {
    /// From `Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)`.
    fn parse(self, shown: &str) -> Option<Package> {
        let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: "))?;
        let (name, rest) = depends.split(',').next()?.trim().split_once(" (= ")?;
        let file_version = rest.strip_suffix(')')?;
        name.starts_with(self.prefix).then(|| Package { name: name.to_owned(), file_version: file_version.to_owned() })
    }
}

impl Package {
    /// `6.1.192`: what stands in the file names, of which the newest semver wins.
    pub fn semver(&self) -> Result<String> {
        let upstream = self.file_version.split(['-', '+', '~']).next().unwrap_or_default();
        let parts: Vec<&str> = upstream.split('.').collect();
        ensure!(
            parts.len() == 3 && parts.iter().all(|part| part.parse::<u32>().is_ok()),
            "no semver in {}",
            self.file_version
        );
        Ok(upstream.to_owned())
    }

    /// Downloads the package and gives the folder with what it holds, in `scratch`.
    pub fn fetch(&self, scratch: &Path) -> Result<PathBuf> {
        // apt drops to a user of its own for the download, who must be able to write here.
        run::output(Command::new("chmod").arg("777").arg(scratch))?;
        let wanted = format!("{}={}", self.name, self.file_version);
        run::output(Command::new("apt-get").args(["-q", "download"]).arg(&wanted).current_dir(scratch))
            .context(NotFetched(wanted))?;
        let deb = find(scratch, |name| name.ends_with(".deb"))?.context("apt-get left no package")?;
        let tree = scratch.join("tree");
        run::output(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&tree))?;
        fs::remove_file(deb)?;
        Ok(tree)
    }
}

/// The first thing in a folder whose name is wanted.
pub fn find(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<Option<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    Ok(entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(&wanted)))
}

fn refresh_index(why: &anyhow::Error) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("{why:#}\n(a package index that is missing or old is a usual cause: run `apt-get update` as root)");
    }
    eprintln!("{why:#}\nrefreshing the package index ...");
    run::output(Command::new("apt-get").args(["-q", "update"]).env("LC_ALL", "C")).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_meta_package() {
        let meta = Meta { name: "linux-image-cloud-amd64", prefix: "linux-image-", kind: "kernel" };
        let package = meta.parse("Package: x\nDepends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n").unwrap();
        assert_eq!(
            (package.name.as_str(), package.semver().unwrap().as_str()),
            ("linux-image-6.1.0-56-cloud-amd64", "6.1.192")
        );
        assert!(meta.parse("Package: x\nDepends: other\n").is_none());
        assert!(meta.parse("Package: x\nDepends: linux-source-6.1 (= 6.1.192-2)\n").is_none());
    }

    #[test]
    fn only_what_was_not_fetched_is_worth_another_index() {
        let not_fetched = anyhow::anyhow!("404").context(NotFetched("x=1".into())).context("make it");
        assert!(not_fetched.is::<NotFetched>());
        assert!(!anyhow::anyhow!("it does not compile").is::<NotFetched>());
    }
}
