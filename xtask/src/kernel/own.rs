//! A guest kernel of our own: Debian's kernel source, compiled as `images/kernel/config` asks, to one ELF without modules.
//!
//! That takes ten to twenty minutes, so nothing makes it but `xtask kernel`; `xtask images` takes it where it is made and is content with
//! Debian's own kernel where it is not. Nothing in it comes from the machine that compiles it but what the compiler is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use super::package::{self, Meta, Package, find};
use crate::artifact::{self, Key};
use crate::{initramfs, run};

const META: Meta = Meta { name: "linux-source", prefix: "linux-source-", kind: "guest-kernel" };
/// Raised when the recipe below changes what comes out.
const RECIPE: &str = "guest-kernel-1";
/// What the kernel would say of the machine it was compiled on, were it not told: the same inputs shall give the same bytes.
const NOWHERE: [(&str, &str); 5] = [
    ("KBUILD_BUILD_USER", "wrenn"),
    ("KBUILD_BUILD_HOST", "wrenn"),
    ("KBUILD_BUILD_TIMESTAMP", "1970-01-01"),
    ("KBUILD_BUILD_VERSION", "1"),
    ("LC_ALL", "C"),
];

#[derive(clap::Args)]
pub struct Arguments {}

pub fn run(_: &Arguments) -> Result<()> {
    let wanted = Wanted::read()?;
    let folder = package::with(META, |package| {
        artifact::get(META.kind, wanted.key(package), |dir| make(package, &wanted, dir))
    })?;
    for entry in fs::read_dir(folder)? {
        println!("{}", entry?.path().display());
    }
    Ok(())
}

/// Directory with `initramfs-<semver>-<more>`: our static init alone, for whom there is nothing to load.
pub fn initramfs(kernel: &Path) -> Result<PathBuf> {
    let name = kernel.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix("vmlinux-"));
    let release = name.with_context(|| format!("{} is not named vmlinux-...", kernel.display()))?;
    let init = super::build_init()?;
    let key = Key::default().text(RECIPE).text(release).file(&init)?;
    artifact::get("guest-initramfs", key, |dir| {
        let archive = initramfs::archive(&fs::read(&init)?, &[])?;
        Ok(fs::write(dir.join(format!("initramfs-{release}")), archive)?)
    })
}

/// Directory with `vmlinux-<semver>-<more>`, when it is made for the source and configuration of now. `out` is where it will be published:
/// what lies there of an earlier configuration stays, and is told of.
pub fn made(out: &Path) -> Result<Option<PathBuf>> {
    // Whoever has never made one is asked for no second package.
    if !artifact::cache()?.join(META.kind).exists() {
        return Ok(None);
    }
    let wanted = Wanted::read()?;
    let package = package::resolve(META)?;
    let made = artifact::made(META.kind, wanted.key(&package))?;
    let published = out.join("kernels").join(format!("vmlinux-{}", wanted.release(&package)?));
    if made.is_none() && published.exists() {
        eprintln!(
            "{} is not of the present images/kernel/config and {} {}: `make kernel` makes one that is",
            published.display(),
            package.name,
            package.file_version
        );
    }
    Ok(made)
}

/// The configuration that is asked for.
struct Wanted {
    path: PathBuf,
    text: String,
    /// What comes after the version: `-wrenn`. Sandboxes take the newest kernel, and of the same numbers the one with more after them.
    suffix: String,
}

impl Wanted {
    fn read() -> Result<Self> {
        let path = run::root().join("images/kernel/config");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let suffix = suffix(&text).with_context(|| {
            format!("{} needs CONFIG_LOCALVERSION=\"-...\", small letters, digits and '-'", path.display())
        })?;
        Ok(Self { suffix: suffix.to_owned(), path, text })
    }

    fn key(&self, package: &Package) -> Key {
        Key::default().text(RECIPE).text(&package.name).text(&package.file_version).text(&self.text)
    }

    /// As the kernel calls itself and its file is called.
    fn release(&self, package: &Package) -> Result<String> {
        Ok(format!("{}{}", package.semver()?, self.suffix))
    }
}

fn suffix(config: &str) -> Option<&str> {
    let quoted = config.lines().find_map(|line| line.strip_prefix("CONFIG_LOCALVERSION=\""))?;
    let suffix = quoted.strip_suffix('"')?;
    let rest = suffix.strip_prefix('-')?;
    let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (!rest.is_empty() && rest.bytes().all(good)).then_some(suffix)
}

fn make(package: &Package, wanted: &Wanted, out: &Path) -> Result<()> {
    // Source and objects take two gigabytes, and are gone when the kernel is there.
    let scratch = tempfile::tempdir_in(out)?;
    let packed = find(&package.fetch(scratch.path())?.join("usr/src"), |name| name.ends_with(".tar.xz"))?
        .context("the package holds no source")?;
    let below = scratch.path().join("source");
    fs::create_dir(&below)?;
    run::output(Command::new("tar").arg("-xf").arg(packed).arg("-C").arg(&below))?;
    let source = find(&below, |name| name.starts_with("linux-"))?.context("the package holds no source")?;

    // As it was read, not as somebody may have edited it since.
    let config = scratch.path().join("config");
    fs::write(&config, &wanted.text)?;
    run::output(kbuild(&source).env("KCONFIG_ALLCONFIG", config).arg("allnoconfig"))?;
    let refused = unfulfilled(&wanted.text, &fs::read_to_string(source.join(".config"))?);
    if !refused.is_empty() {
        bail!("{}: the kernel does not do what these lines say:\n{}", wanted.path.display(), refused.join("\n"));
    }
    let release = wanted.release(package)?;
    let named = run::text(kbuild(&source).args(["--silent", "kernelrelease"]))?;
    ensure!(named == release, "the kernel calls itself {named} instead of {release}");

    let jobs = std::thread::available_parallelism()?;
    run::output(kbuild(&source).arg(format!("--jobs={jobs}")).arg("vmlinux"))?;
    let kernel = out.join(format!("vmlinux-{release}"));
    run::output(Command::new("strip").arg("--strip-debug").arg("-o").arg(kernel).arg(source.join("vmlinux")))?;
    Ok(())
}

/// The kernel's build, which listens to very many variables: to none of the caller's.
fn kbuild(source: &Path) -> Command {
    let mut command = Command::new("make");
    command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path))).envs(NOWHERE);
    command.arg("-C").arg(source);
    command
}

/// The lines of the configuration that is wanted which the one that came out does not say: an option that is not in this kernel, or one that
/// needs another. Lines that are neither comments nor options are among them.
fn unfulfilled<'a>(wanted: &'a str, got: &str) -> Vec<&'a str> {
    let has = |line: &str| got.lines().any(|it| it == line);
    let is_set = |option: &str| got.lines().any(|it| it.split_once('=').is_some_and(|(name, _)| name == option));
    wanted
        .lines()
        .map(str::trim_end)
        .filter(|line| {
            let off = line.strip_prefix("# CONFIG_").and_then(|rest| rest.strip_suffix(" is not set"));
            match off {
                Some(name) => is_set(&format!("CONFIG_{name}")),
                None => !line.is_empty() && !line.starts_with('#') && !has(line),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_every_line_that_was_not_carried_out() {
        let got = "CONFIG_NET=y\n# CONFIG_SMP is not set\nCONFIG_NR_CPUS=32\nCONFIG_EXTRA=y\n";
        for (wanted, refused) in [
            ("# Why.\n\nCONFIG_NET=y\nCONFIG_NR_CPUS=32\n", &[][..]),
            ("CONFIG_NET=y   \n", &[]),
            ("# CONFIG_SMP is not set\n# CONFIG_NOT_IN_THIS_KERNEL is not set\n", &[]),
            ("CONFIG_SMP=y\nCONFIG_NET=y\n", &["CONFIG_SMP=y"]),
            ("CONFIG_NR_CPUS=3\n", &["CONFIG_NR_CPUS=3"]),
            ("# CONFIG_EXTRA is not set\n", &["# CONFIG_EXTRA is not set"]),
            ("CONFIG_EXTR=y\nNET=y\n", &["CONFIG_EXTR=y", "NET=y"]),
        ] {
            assert_eq!(unfulfilled(wanted, got), refused, "{wanted}");
        }
    }

    #[test]
    fn our_kernel_is_newer_than_debians_of_the_same_version() {
        let wanted = Wanted::read().unwrap();
        let package = Package { name: "linux-source-6.1".into(), file_version: "6.1.192-2".into() };
        assert_eq!(wanted.release(&package).unwrap(), "6.1.192-wrenn");
        for bad in ["", "CONFIG_LOCALVERSION=\"\"", "CONFIG_LOCALVERSION=\"wrenn\"", "CONFIG_LOCALVERSION=\"-a/b\""] {
            assert_eq!(suffix(bad), None, "{bad}");
        }
    }
}
