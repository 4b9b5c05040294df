//! Root file systems of guests: the minimal one from a Debian tree (slow to make, kept apart), others from a tree that somebody gives.
//!
//! An image is written from a directory by `mkfs.ext4 -d`, and the same inputs give the same bytes; only one that is derived from another by
//! copy-on-write ([`derive`]) is mounted for it.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

use crate::artifact::{self, Key};
use crate::run;

const SUITE: &str = "bookworm";
/// Raised when the making of the Debian tree changes.
const BASE_RECIPE: &str = "rootfs-5";
/// Raised when the making of an image from a tree changes.
const IMAGE_RECIPE: &str = "image-7";
/// Raised when the making of a derived image changes.
const DERIVE_RECIPE: &str = "derive-1";
const PACKAGES: [&str; 17] = [
    "adduser",
    "bash",
    "ca-certificates",
    "chrony",
    "curl",
    "e2fsprogs",
    "git",
    "iproute2",
    "netbase",
    "openssh-client",
    "procps",
    "python3",
    "socat",
    "sudo",
    "tini",
    "unzip",
    "wget",
];
/// Virtual size: what a published client gets by default. The file is sparse.
pub const SIZE_MIB: u32 = 5120;
/// One fixed identity for one fixed content.
const UUID: &str = "8c7a5ef2-0e1c-4c57-9a3a-77656e6e0001";
/// 2025-01-01: the time of everything that is put into an image.
const EPOCH: &str = "1735689600";

/// Directory with `rootfs.ext4` and `digest`.
pub fn build(envd: &Path) -> Result<PathBuf> {
    let base = base()?;
    let name = base.file_name().context("the base has a name")?.to_string_lossy().into_owned();
    let key = Key::default()
        .text(IMAGE_RECIPE)
        .text(&name)
        .text(&SIZE_MIB.to_string())
        .file(envd)?
        .file(&wrenn_init())?
        .file(&inject())?;
    artifact::get("rootfs", key, |dir| {
        let scratch = tempfile::tempdir_in(dir)?;
        let tree = scratch.path().join("tree");
        fs::create_dir(&tree)?;
        fs::set_permissions(&tree, fs::Permissions::from_mode(0o755))?;
        run::output(
            Command::new("tar").arg("-C").arg(&tree).arg("--numeric-owner").arg("-xf").arg(base.join("base.tar")),
        )?;
        image(&tree, envd, None, dir, SIZE_MIB)
    })
}

/// Directory with `rootfs.ext4` and `digest`: a copy of the minimal image, which shares with it what does not change where the file system
/// can, with the recipe `images/NAME` done in it. Unlike the others it is not the same to the byte each time.
pub fn derive(minimal: &Path, name: &str) -> Result<PathBuf> {
    let (script, recipe) = (run::root().join("images/derive.sh"), run::root().join("images").join(name));
    let mut key = Key::default().text(DERIVE_RECIPE).file(&minimal.join("digest"))?.file(&script)?;
    for file in ["packages", "setup.sh"].map(|file| recipe.join(file)) {
        key = if file.exists() { key.file(&file)? } else { key.text("") };
    }
    artifact::get(name, key, |dir| {
        ensure_root()?;
        let to = dir.join("rootfs.ext4");
        let copy = ["--reflink=auto", "--sparse=always", "--"];
        run::output(Command::new("cp").args(copy).arg(minimal.join("rootfs.ext4")).arg(&to))?;
        run::output(Command::new(script).arg(&to).arg(recipe)).with_context(|| format!("make the image {name}"))?;
        fs::File::open(&to)?.sync_all()?;
        artifact::write(&dir.join("digest"), digest(&to)?.as_bytes())
    })
}

/// Makes a tree that came from elsewhere the image `folder/rootfs.ext4` with its digest. The tree is changed by that.
pub fn from_tree(tree: &Path, envd: &Path, folder: &Path, size_mib: u32) -> Result<()> {
    ensure_root()?;
    ensure!(
        ["bin/sh", "usr/bin/sh"].iter().any(|shell| tree.join(shell).symlink_metadata().is_ok()),
        "the tree has no shell (/bin/sh), which the start of a sandbox and its commands need"
    );
    let scratch = tempfile::tempdir_in(folder)?;
    let tini = "./usr/bin/tini-static";
    run::output(Command::new("tar").arg("-C").arg(scratch.path()).arg("-xf").arg(base()?.join("base.tar")).arg(tini))?;
    image(tree, envd, Some(&scratch.path().join(tini)), folder, size_mib)
}

fn inject() -> PathBuf {
    run::root().join("images/inject.sh")
}

fn wrenn_init() -> PathBuf {
    run::root().join("images/wrenn-init.sh")
}

fn base() -> Result<PathBuf> {
    let key = Key::default().text(BASE_RECIPE).text(SUITE).text(&PACKAGES.join(","));
    artifact::get("base", key, |dir| {
        ensure_root()?;
        let exclude =
            ["doc", "man", "locale", "info"].map(|name| format!("--dpkgopt=path-exclude=/usr/share/{name}/*"));
        run::output(
            Command::new("mmdebstrap")
                .args(["--quiet", "--variant=minbase"])
                .arg(format!("--include={}", PACKAGES.join(",")))
                .args(exclude)
                .arg(SUITE)
                .arg(dir.join("base.tar"))
                .env("SOURCE_DATE_EPOCH", EPOCH),
        )
        .context("make the Debian tree")?;
        Ok(())
    })
}

fn ensure_root() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "a root file system is made as root, because its files belong to many users: run this as root"
    );
    Ok(())
}

/// With a journal a guest that was killed needs no check at its next boot; 16 MiB of it are enough for a disk of this size. The file is
/// new and therefore zero: said so, or each guest would write zeros over its inode tables (80 MiB) after its boot.
fn image(tree: &Path, envd: &Path, tini: Option<&Path>, folder: &Path, size_mib: u32) -> Result<()> {
    ensure_root()?;
    run::output(Command::new(inject()).arg(tree).arg(envd).arg(wrenn_init()).args(tini))
        .context("put envd and its surroundings into the tree")?;
    // What has just been put in bears the time of now, from which the image's bytes must not depend.
    run::output(Command::new("find").arg(tree).args(["-xdev", "-newermt", &format!("@{EPOCH}")]).args([
        "-exec",
        "touch",
        "-h",
        "-d",
        &format!("@{EPOCH}"),
        "{}",
        "+",
    ]))?;
    let to = folder.join("rootfs.ext4");
    fs::File::create(&to)?.set_len(u64::from(size_mib) << 20)?;
    run::output(
        Command::new("mkfs.ext4")
            .args(["-q", "-F", "-b", "4096", "-L", "root", "-m", "0", "-U", UUID, "-J", "size=16"])
            .arg("-E")
            .arg(format!("hash_seed={UUID},assume_storage_prezeroed=1,root_owner=0:0"))
            .arg("-d")
            .arg(tree)
            .arg(&to)
            .env("E2FSPROGS_FAKE_TIME", EPOCH),
    )
    .with_context(|| format!("write an image of {size_mib} MiB, into which the content must fit"))?;
    forget_times(&to, folder)?;
    fs::File::open(&to)?.sync_all()?;
    artifact::write(&folder.join("digest"), digest(&to)?.as_bytes())
}

/// What `sha256sum` prints. Debian's does not use the processor's instructions for it: 12 s instead of 3 s for 5 GiB.
fn digest(image: &Path) -> Result<String> {
    let mut file = fs::File::open(image)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).with_context(|| format!("read {}", image.display()))? {
            0 => return Ok(hex::encode(hash.finalize())),
            length => hash.update(&buffer[..length]),
        }
    }
}

/// Sets the times of access and change of every file, which `mkfs.ext4` takes from the tree and `touch` cannot set all of.
fn forget_times(image: &Path, folder: &Path) -> Result<()> {
    let said = run::text(Command::new("dumpe2fs").arg("-h").arg(image))?;
    let last = last_inode(&said).context("dumpe2fs does not tell how many inodes are in use")?;
    let script = tempfile::NamedTempFile::new_in(folder)?;
    let commands: String =
        (2..=last).map(|inode| format!("sif <{inode}> ctime @{EPOCH}\nsif <{inode}> atime @{EPOCH}\n")).collect();
    fs::write(script.path(), commands)?;
    run::output(
        Command::new("debugfs").args(["-w", "-f"]).arg(script.path()).arg(image).env("E2FSPROGS_FAKE_TIME", EPOCH),
    )?;
    Ok(())
}

/// Nothing was ever removed from the image, so the inodes in use are the first ones.
fn last_inode(said: &str) -> Option<u32> {
    let field = |name| said.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u32>().ok());
    field("Inode count:")?.checked_sub(field("Free inodes:")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_the_inodes_in_use() {
        assert_eq!(last_inode("Inode count:              327680\nFree inodes:              319636\n"), Some(8044));
        assert_eq!(last_inode("Inode count: 1\n"), None);
        assert_eq!(last_inode("Inode count: 1\nFree inodes: 2\n"), None);
    }

    /// A tree as small as `inject.sh` takes it, with a file beside it that stands for the rest of the machine.
    struct Stage {
        dir: tempfile::TempDir,
    }

    impl Stage {
        fn new() -> Self {
            let stage = Self { dir: tempfile::tempdir().unwrap() };
            for path in ["tree/etc/skel", "tree/bin", "outside"] {
                fs::create_dir_all(stage.at(path)).unwrap();
            }
            for path in ["envd", "init", "tini", "outside/file", "tree/bin/sh", "tree/etc/skel/.profile"] {
                fs::write(stage.at(path), path).unwrap();
            }
            fs::write(
                stage.at("tree/etc/passwd"),
                "root:x:0:0:root:/root:/bin/sh\nnode:x:1000:1000::/home/node:/bin/sh\n",
            )
            .unwrap();
            stage
        }

        fn at(&self, path: &str) -> PathBuf {
            self.dir.path().join(path)
        }

        fn read(&self, path: &str) -> String {
            fs::read_to_string(self.at(path)).unwrap()
        }

        fn link(&self, to: &str, path: &str) {
            fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(self.at(to), self.at(path)).unwrap();
        }

        fn inject(&self) -> Result<Vec<u8>> {
            let arguments = ["tree", "envd", "init", "tini"].map(|path| self.at(path));
            run::output(Command::new(inject()).args(arguments))
        }

        fn outside_is_untouched(&self) -> bool {
            fs::read_dir(self.at("outside")).unwrap().count() == 1 && self.read("outside/file") == "outside/file"
        }
    }

    /// Giving files to other users takes root, as making an image does.
    fn is_root() -> bool {
        nix::unistd::geteuid().is_root()
    }

    #[test]
    fn any_tree_becomes_a_sandbox_and_stays_one() {
        if !is_root() {
            return;
        }
        let stage = Stage::new();
        stage.inject().unwrap();
        let once = (stage.read("tree/etc/passwd"), stage.read("tree/etc/group"));
        let names: Vec<&str> = once.0.lines().map(|line| line.split(':').next().unwrap()).collect();
        assert_eq!(names, ["root", "user", "node", "wrenn-user"], "1000 reads as `user`, and `node` goes on to exist");
        assert_eq!(stage.read("tree/usr/local/bin/envd"), "envd");
        assert_eq!(stage.read("tree/home/user/.profile"), "tree/etc/skel/.profile");
        assert_eq!(fs::read_link(stage.at("tree/sbin/wrenn-init")).unwrap(), Path::new("/usr/local/bin/wrenn-init"));
        let mode = |path| fs::metadata(stage.at(path)).unwrap().permissions().mode() & 0o7777;
        assert_eq!(
            (mode("tree/tmp"), mode("tree/etc/sudoers.d/wrenn"), mode("tree/usr/bin/tini")),
            (0o1777, 0o440, 0o755)
        );
        stage.inject().unwrap();
        assert_eq!(
            (stage.read("tree/etc/passwd"), stage.read("tree/etc/group")),
            once,
            "a second time changes nothing"
        );
    }

    #[test]
    fn a_tree_cannot_make_us_write_outside_of_it() {
        if !is_root() {
            return;
        }
        for path in
            ["etc/hosts", "etc/resolv.conf", "etc/machine-id", "usr/local/bin/envd", "usr/bin/tini", "sbin/wrenn-init"]
        {
            let stage = Stage::new();
            stage.link("outside/file", &format!("tree/{path}"));
            stage.inject().unwrap();
            assert!(stage.outside_is_untouched(), "{path}");
        }
        for path in ["usr/local/bin", "usr", "home", "tmp", "etc/sudoers.d", "etc/chrony", "etc/group"] {
            let stage = Stage::new();
            stage.link("outside", &format!("tree/{path}"));
            let refused = stage.inject().unwrap_err().to_string();
            assert!(refused.contains("is a link"), "{path}: {refused}");
            assert!(stage.outside_is_untouched(), "{path}");
        }
        for path in ["home/user", "var/cache", "var", "etc/skel/more"] {
            let stage = Stage::new();
            stage.link("outside", &format!("tree/{path}"));
            stage.inject().unwrap();
            assert!(stage.outside_is_untouched(), "{path}");
        }
    }
}
