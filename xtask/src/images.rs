//! All that a host needs to boot guests, put into one directory as the host agent expects it: `kernels/` and `images/`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{artifact, kernel, rootfs, run};

/// The templates that this repository makes by itself; an image from elsewhere must not take their places.
const MINIMAL: &str = "minimal";
/// From the minimal one, each by its recipe in `images/`.
const DERIVED: [&str; 2] = ["python", "node"];

#[derive(clap::Args)]
pub struct Arguments {
    /// Where to put `kernels/` and `images/`; `current` in the cache when absent.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Which images; all of them when absent.
    #[arg(long = "image", value_name = "NAME", conflicts_with = "rootfs_only", value_parser = [MINIMAL, DERIVED[0], DERIVED[1]])]
    images: Vec<String>,
    /// Only envd and the minimal rootfs, as `scripts/update-minimal-rootfs.sh` asks for.
    #[arg(long)]
    rootfs_only: bool,
    /// The static envd to put in; built when absent.
    #[arg(long)]
    envd: Option<PathBuf>,
}

#[derive(clap::Args)]
pub struct FromTree {
    /// A directory with the root file system of a container; it is changed.
    #[arg(long)]
    tree: PathBuf,
    /// Name of the template.
    #[arg(long)]
    name: String,
    /// Where to put `images/NAME`.
    #[arg(long)]
    out: PathBuf,
    /// Size of the disk that a sandbox sees. The file is sparse: it takes what its content takes.
    #[arg(long, default_value_t = rootfs::SIZE_MIB, value_parser = clap::value_parser!(u32).range(64..=1 << 20))]
    size_mib: u32,
    /// The static envd to put in; built when absent.
    #[arg(long)]
    envd: Option<PathBuf>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let out = match &arguments.out {
        Some(out) => out.clone(),
        None => artifact::cache()?.join("current"),
    };
    if !arguments.rootfs_only {
        let publish = |folder: &Path| -> Result<Vec<PathBuf>> {
            let mut published = Vec::new();
            for entry in std::fs::read_dir(folder)? {
                let entry = entry?;
                let to = out.join("kernels").join(entry.file_name());
                artifact::publish(&entry.path(), &to)?;
                published.push(to);
            }
            Ok(published)
        };
        publish(&kernel::build()?)?;
        if let Some(own) = kernel::own::made(&out)? {
            // What belongs to a kernel first: whoever sees the kernel boots with what there is.
            for entry in std::fs::read_dir(&own)? {
                publish(&kernel::own::initramfs(&entry?.path())?)?;
            }
            publish(&own)?;
        }
    }
    let is_wanted = |name: &str| arguments.images.is_empty() || arguments.images.iter().any(|image| image == name);
    let minimal = rootfs::build(&envd(arguments.envd.as_deref())?)?;
    if is_wanted(MINIMAL) || arguments.rootfs_only {
        publish(&minimal, &out, MINIMAL)?;
    }
    for name in DERIVED.into_iter().filter(|name| is_wanted(name) && !arguments.rootfs_only) {
        publish(&rootfs::derive(&minimal, name)?, &out, name)?;
    }
    Ok(())
}

pub fn from_tree(arguments: &FromTree) -> Result<()> {
    check_name(&arguments.name)?;
    ensure!(arguments.tree.is_dir(), "{} is no directory", arguments.tree.display());
    let envd = envd(arguments.envd.as_deref())?;
    std::fs::create_dir_all(&arguments.out).with_context(|| format!("make {}", arguments.out.display()))?;
    // Beside the tree, where whoever gave it tidies up also after a kill.
    let tree = arguments.tree.canonicalize()?;
    let scratch = tempfile::tempdir_in(tree.parent().context("a tree lies in a folder")?)?;
    rootfs::from_tree(&tree, &envd, scratch.path(), arguments.size_mib)?;
    publish(scratch.path(), &arguments.out, &arguments.name)
}

/// As the control plane and the host agent read the names of templates.
fn check_name(name: &str) -> Result<()> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    ensure!(
        name.len() <= 64 && name.bytes().all(good) && name.starts_with(|first: char| first.is_ascii_alphanumeric()),
        "{name:?} is no name of a template: 1 to 64 letters, digits, '.', '-' and '_', a letter or digit first"
    );
    ensure!(name != MINIMAL && !DERIVED.contains(&name), "`{name}` is made by `make images` only: choose another name");
    Ok(())
}

/// An image that is there already is left alone, so that its file keeps its identity.
fn publish(from: &Path, out: &Path, name: &str) -> Result<()> {
    let place = out.join("images").join(name);
    let digest = |folder: &Path| std::fs::read_to_string(folder.join("digest")).unwrap_or_default();
    let (new, old) = (digest(from), digest(&place));
    ensure!(!new.is_empty(), "an image has no digest");
    if new != old || !place.join("rootfs.ext4").is_file() {
        artifact::publish_folder(from, &place)?;
        println!("published {} {}", place.display(), &new[..16.min(new.len())]);
    }
    Ok(())
}

fn envd(given: Option<&Path>) -> Result<PathBuf> {
    match given {
        Some(program) => {
            ensure!(program.is_file(), "{} is no file: `make build-envd` makes one", program.display());
            ensure_static(program)?;
            Ok(program.canonicalize()?)
        }
        None => static_build("envd", "envd"),
    }
}

/// Builds one static program for guests and gives its path. Its target directory is the workspace's own, below the target triple.
pub fn static_build(package: &str, binary: &str) -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--package", package, "--profile", "guest", "--target", TARGET])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .current_dir(run::root())
        .stdin(Stdio::null())
        .status()
        .context("start cargo")?;
    if !status.success() {
        bail!("building {package} failed");
    }
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| run::root().join("target"), |dir| run::root().join(dir));
    let program = target.join(TARGET).join("guest").join(binary);
    ensure_static(&program)?;
    Ok(program)
}

/// An ELF program that names no dynamic loader: in the guest there may be none, or another one.
fn ensure_static(program: &Path) -> Result<()> {
    let image = std::fs::read(program).with_context(|| format!("read {}", program.display()))?;
    match wants_loader(&image) {
        Some(false) => Ok(()),
        Some(true) => bail!("{} is not static", program.display()),
        None => bail!("{} is no 64-bit ELF program", program.display()),
    }
}

/// Whether there is a program header of type PT_INTERP (ELF-64, little endian).
fn wants_loader(image: &[u8]) -> Option<bool> {
    const PT_INTERP: u32 = 3;
    let number = |at: usize, bytes: usize| -> Option<usize> {
        let slice = image.get(at..at.checked_add(bytes)?)?;
        Some(slice.iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte)))
    };
    if image.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (offset, size, count) = (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?);
    for index in 0..count {
        if number(offset.checked_add(index * size)?, 4)? == PT_INTERP as usize {
            return Some(true);
        }
    }
    Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_templates_cannot_leave_their_folder() {
        for good in ["python-3", "a", "node-20_x.1"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", ".tmp", "-x", "a/b", "a b", "minimal", "python", "node", "ä", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn tells_static_programs_from_others() {
        let mut elf = vec![0; 64 + 2 * 56];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[0x20] = 64;
        elf[0x36] = 56;
        elf[0x38] = 2;
        assert_eq!(wants_loader(&elf), Some(false));
        elf[64 + 56] = 3;
        assert_eq!(wants_loader(&elf), Some(true));
        assert_eq!(wants_loader(b"#!/bin/sh\n"), None);
        for cut in 0..elf.len() - 56 {
            assert_eq!(wants_loader(&elf[..cut]), None, "cut at {cut}");
        }
        let ours = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(wants_loader(&ours), Some(true), "a test program is dynamic");
    }

    #[test]
    fn an_image_that_is_there_is_left_alone() {
        let (from, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert!(publish(from.path(), out.path(), "x").is_err(), "no digest, no image");
        std::fs::write(from.path().join("rootfs.ext4"), "one").unwrap();
        std::fs::write(from.path().join("digest"), "1".repeat(64)).unwrap();
        publish(from.path(), out.path(), "x").unwrap();
        std::fs::remove_file(from.path().join("rootfs.ext4")).unwrap();
        std::fs::write(from.path().join("rootfs.ext4"), "two").unwrap();
        publish(from.path(), out.path(), "x").unwrap();
        assert_eq!(std::fs::read_to_string(out.path().join("images/x/rootfs.ext4")).unwrap(), "one");
    }
}
