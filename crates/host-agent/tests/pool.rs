//! The storage pool on real parts: files, loop devices, XFS, ext4. Needs root; without it it says so and does nothing.

use std::io::BufRead as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use host_agent::disk::{DiskError, Makings, Pool, PoolError, Reflink, all_loops, all_mounts};
use model::shape::TemplateName;
use rustix::fs::FallocateFlags;

const PREFIX: &str = "wrenn-pool-test-";
/// The least that XFS takes is 300 MiB.
const POOL_MIB: u32 = 400;

/// A WRENN_DIR on a file system without reflinks, or made to look so by an image of its own.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: not root");
            return None;
        }
        clean_up_after_the_dead();
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(format!("/var/tmp/{PREFIX}{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Some(Self(path))
    }

    fn open(&self) -> Pool {
        Pool::open(&self.0, Some(POOL_MIB)).unwrap()
    }

    fn publish(&self, mib: u32, content: &str) {
        static EDITION: AtomicU32 = AtomicU32::new(0);
        let edition = EDITION.fetch_add(1, Ordering::Relaxed);
        let (tree, new) = (self.0.join("tree"), self.0.join("new"));
        for folder in [&tree, &new, &self.0.join("images/t")] {
            std::fs::create_dir_all(folder).unwrap();
        }
        std::fs::write(tree.join("content"), content).unwrap();
        run("mkfs.ext4", &["-q", "-d", text(&tree), text(&new.join("rootfs.ext4")), &format!("{mib}M")]);
        std::fs::write(new.join("digest"), format!("{edition:064x}\n")).unwrap();
        std::fs::remove_dir_all(self.0.join("images/t")).unwrap();
        std::fs::rename(&new, self.0.join("images/t")).unwrap();
    }

    fn bases(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.join("pool/images")).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn held(&self) -> (usize, usize) {
        let mounts = all_mounts().unwrap().into_iter().filter(|mount| mount.point.starts_with(&self.0)).count();
        (mounts, all_loops().unwrap().into_iter().filter(|(_, file)| file.starts_with(&self.0)).count())
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        clean_up(&self.0);
    }
}

/// What tests left that were killed.
fn clean_up_after_the_dead() {
    for entry in std::fs::read_dir("/var/tmp").unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            clean_up(&entry.path());
        }
    }
}

fn clean_up(dir: &Path) {
    while nix::mount::umount2(&dir.join("pool"), nix::mount::MntFlags::MNT_DETACH).is_ok() {}
    let _ = std::fs::remove_dir_all(dir);
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn name() -> TemplateName {
    "t".parse().unwrap()
}

/// What the file system in an image holds; read by a program, not by the kernel.
fn content(disk: &Path) -> String {
    run("debugfs", &["-R", "cat /content", text(disk)])
}

#[test]
fn held_in_another_mount_namespace_it_is_not_mounted_twice_and_says_so() {
    let Some(dir) = Dir::new() else { return };
    drop(dir.open());
    let mut other = Command::new("unshare")
        .args(["--mount", "sh", "-c", "echo ready; read -r _"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut word = String::new();
    std::io::BufReader::new(other.stdout.take().unwrap()).read_line(&mut word).unwrap();
    assert_eq!(word, "ready\n");
    nix::mount::umount(&dir.0.join("pool")).unwrap();

    let refused = Pool::open(&dir.0, Some(POOL_MIB)).err().unwrap();
    assert!(matches!(refused, PoolError::Elsewhere { .. }), "{refused}");
    assert!(refused.is_config());

    drop(other.stdin.take());
    other.wait().unwrap();
    // The kernel lets go of a namespace a moment after its last process.
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while dir.held().1 > 0 && std::time::Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(dir.open());
    assert_eq!(dir.held(), (1, 1));
}

#[test]
fn is_made_once_and_found_again() {
    let Some(dir) = Dir::new() else { return };
    // Of a maker that died.
    std::fs::write(dir.0.join("pool.img.tmp"), "half").unwrap();
    let pool = dir.open();
    assert!(!dir.0.join("pool.img.tmp").exists());
    assert_eq!(dir.held(), (1, 1), "{:?}", pool.notes());
    std::fs::write(pool.path().join("sandboxes/marker"), "x").unwrap();
    assert!(dir.0.join("sandboxes/marker").exists() && dir.0.join("snapshots").is_dir());
    // An agent that was killed leaves the mount.
    drop(pool);
    let pool = dir.open();
    assert_eq!(dir.held(), (1, 1));
    assert!(pool.path().join("sandboxes/marker").exists());
    // A reboot does not.
    nix::mount::umount(pool.path()).unwrap();
    drop(pool);
    let pool = dir.open();
    assert_eq!(dir.held(), (1, 1));
    assert!(pool.path().join("sandboxes/marker").exists());
    // It is made with its size once; blocks are there before they are needed.
    let image = std::fs::metadata(dir.0.join("pool.img")).unwrap();
    assert!(image.blocks() * 512 >= u64::from(POOL_MIB) << 20, "{} blocks", image.blocks());
    let pool = Pool::open(&dir.0, Some(POOL_MIB + 100)).unwrap();
    assert!(pool.notes().iter().any(|note| note.contains("stays so")), "{:?}", pool.notes());
    pool.close().unwrap();
    pool.close().unwrap();
    assert_eq!(dir.held(), (0, 0));
}

#[test]
fn is_a_plain_directory_where_reflinks_work() {
    let Some(dir) = Dir::new() else { return };
    let outer = dir.open();
    let inner = Dir(outer.path().join("inner"));
    std::fs::create_dir(&inner.0).unwrap();
    let pool = inner.open();
    assert!(pool.notes()[0].contains("directory"), "{:?}", pool.notes());
    assert!(!inner.0.join("pool.img").exists());
    inner.publish(64, "content");
    pool.make_disk(&Reflink, &name(), 64, &inner.0.join("pool/disk"), 0).unwrap();
    assert_eq!(content(&inner.0.join("pool/disk")), "content");
    pool.close().unwrap();
    drop(inner);
    outer.close().unwrap();
}

#[test]
fn what_an_operator_put_there_stays() {
    let Some(dir) = Dir::new() else { return };
    std::fs::create_dir_all(dir.0.join("sandboxes/of-somebody")).unwrap();
    std::fs::create_dir(dir.0.join("snapshots")).unwrap();
    let pool = dir.open();
    assert!(dir.0.join("sandboxes/of-somebody").is_dir());
    assert!(pool.notes().iter().any(|note| note.contains("left alone")), "{:?}", pool.notes());
    assert!(dir.0.join("snapshots").is_symlink());
    pool.close().unwrap();
}

#[test]
fn taking_down_makes_nothing() {
    let Some(dir) = Dir::new() else { return };
    let pool = Pool::open_to_close(&dir.0).unwrap();
    assert!(!dir.0.join("pool.img").exists());
    pool.close().unwrap();
    drop((pool, dir.open()));
    nix::mount::umount(&dir.0.join("pool")).unwrap();
    // After a reboot it has to look for what sandboxes left.
    let pool = Pool::open_to_close(&dir.0).unwrap();
    assert_eq!(dir.held(), (1, 1));
    pool.close().unwrap();
    assert_eq!(dir.held(), (0, 0));
}

/// Not a test of its own: what the children below do.
#[test]
fn opener() {
    if let Some(dir) = std::env::var_os("POOL_CHILD") {
        Pool::open(Path::new(&dir), Some(POOL_MIB)).unwrap();
    }
}

#[test]
fn is_whole_after_a_death_at_any_moment_of_its_making() {
    let Some(dir) = Dir::new() else { return };
    for delay in (0..10).map(|n| Duration::from_millis(n * 25)) {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "opener"])
            .env("POOL_CHILD", &dir.0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(delay);
        let _ = child.kill();
        child.wait().unwrap();
        let pool = dir.open();
        assert_eq!(dir.held(), (1, 1), "after {delay:?}");
        std::fs::write(pool.path().join("marker"), "x").unwrap();
        pool.close().unwrap();
        assert_eq!(dir.held(), (0, 0), "after {delay:?}");
        // Half of the time it is there already.
        if delay.as_millis() % 50 == 0 {
            std::fs::remove_file(dir.0.join("pool.img")).unwrap();
        }
    }
}

#[test]
fn says_when_there_is_no_room_for_it() {
    let Some(dir) = Dir::new() else { return };
    let refused = Pool::open(&dir.0, Some(1 << 30)).err().unwrap();
    assert!(matches!(refused, PoolError::NoSpace { .. }) && refused.is_config(), "{refused}");
    assert!(refused.to_string().contains("WRENN_POOL_MIB"));
    let left: Vec<_> = std::fs::read_dir(&dir.0).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn hides_nothing_and_takes_no_foreign_mount() {
    let Some(dir) = Dir::new() else { return };
    std::fs::create_dir_all(dir.0.join("pool/sandboxes/sb1")).unwrap();
    assert!(matches!(Pool::open(&dir.0, Some(POOL_MIB)), Err(PoolError::InTheWay { .. })));
    std::fs::remove_dir(dir.0.join("pool/sandboxes/sb1")).unwrap();
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("none"), &dir.0.join("pool"), Some("tmpfs"), flags, None::<&str>).unwrap();
    let refused = Pool::open(&dir.0, Some(POOL_MIB)).err().unwrap();
    assert!(refused.to_string().contains("tmpfs"), "{refused}");
    nix::mount::umount(&dir.0.join("pool")).unwrap();
    dir.open().close().unwrap();
}

#[test]
fn makes_a_base_once_and_disks_for_nothing() {
    let Some(dir) = Dir::new() else { return };
    let pool = dir.open();
    dir.publish(64, "first");
    let base = dir.0.join("pool/images").join(dir.edition());
    let free = pool.free_mib();
    let seen = std::thread::scope(|scope| {
        for n in 0..8 {
            let (pool, disk) = (&pool, dir.0.join(format!("pool/disk{n}")));
            scope.spawn(move || pool.make_disk(&Reflink, &name(), 64, &disk, 12345).unwrap());
        }
        // A second making would put another file into its place.
        let first = scope.spawn(|| {
            loop {
                if let Ok(meta) = std::fs::metadata(&base) {
                    return meta.ino();
                }
                std::thread::yield_now();
            }
        });
        first.join().unwrap()
    });
    assert_eq!(std::fs::metadata(&base).unwrap().ino(), seen);
    assert_eq!(dir.bases().len(), 1, "{:?}", dir.bases());
    for n in 0..8 {
        let disk = dir.0.join(format!("pool/disk{n}"));
        let meta = std::fs::metadata(&disk).unwrap();
        assert_eq!((meta.len(), meta.uid(), meta.mode() & 0o777), (64 << 20, 12345, 0o600));
        assert_eq!(content(&disk), "first");
    }
    assert!(free - pool.free_mib() < 80, "{free} MiB free before, {} after", pool.free_mib());
    // Writing into one disk changes neither base nor siblings.
    std::fs::write(dir.0.join("pool/disk0"), vec![0xff; 8 << 20]).unwrap();
    pool.make_disk(&Reflink, &name(), 64, &dir.0.join("pool/disk9"), 1).unwrap();
    assert_eq!(content(&dir.0.join("pool/disk9")), "first");
    assert_eq!(content(&dir.0.join("pool/disk1")), "first");
    pool.close().unwrap();
}

#[tokio::test]
async fn a_base_that_nobody_waits_for_is_made_all_the_same() {
    let Some(dir) = Dir::new() else { return };
    let pool = Arc::new(dir.open());
    dir.publish(64, "content");
    let makings = Makings::new(pool.clone());
    // Given up at once, as by a kill.
    let template = name();
    assert!(tokio::time::timeout(Duration::ZERO, makings.ensure(&template, 80)).await.is_err());
    let (one, two) = tokio::join!(makings.ensure(&template, 80), makings.ensure(&template, 80));
    assert!(one.is_ok() && two.is_ok(), "{one:?} {two:?}");
    assert_eq!(dir.bases().len(), 2, "{:?}", dir.bases());
    let refused = makings.ensure(&"unknown".parse().unwrap(), 64).await.unwrap_err();
    assert!(matches!(*refused, DiskError::NoTemplate(_)), "{refused:?}");
    pool.close().unwrap();
}

#[test]
fn grows_and_shrinks_the_pristine_image() {
    let Some(dir) = Dir::new() else { return };
    let pool = dir.open();
    dir.publish(64, "content");
    for mib in [32, 64, 200, 64] {
        let disk = dir.0.join("pool/disk");
        pool.make_disk(&Reflink, &name(), mib, &disk, 0).unwrap();
        assert_eq!(std::fs::metadata(&disk).unwrap().len(), u64::from(mib) << 20);
        run("e2fsck", &["-fn", text(&disk)]);
        let blocks = run("dumpe2fs", &["-h", text(&disk)]);
        let number = |name: &str| -> u64 {
            let line = blocks.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().last().unwrap().parse().unwrap()
        };
        assert_eq!(number("Block count:") * number("Block size:"), u64::from(mib) << 20);
        assert_eq!(content(&disk), "content");
    }
    assert_eq!(dir.bases().len(), 3, "{:?}", dir.bases());
    let refused = pool.make_disk(&Reflink, &name(), 1, &dir.0.join("pool/small"), 0).unwrap_err();
    assert!(matches!(refused, DiskError::TooSmall { mib: 1, .. }), "{refused:?}");
    assert!(!dir.0.join("pool/small").exists());
    assert_eq!(dir.bases().len(), 3, "{:?}", dir.bases());
    let unknown = pool.make_disk(&Reflink, &"unknown".parse().unwrap(), 64, &dir.0.join("pool/x"), 0).unwrap_err();
    assert!(matches!(unknown, DiskError::NoTemplate(_)), "{unknown:?}");
    pool.close().unwrap();
}

#[test]
fn a_new_edition_gives_new_disks_and_lets_the_old_base_go() {
    let Some(dir) = Dir::new() else { return };
    let pool = dir.open();
    dir.publish(64, "old");
    pool.make_disk(&Reflink, &name(), 64, &dir.0.join("pool/old"), 0).unwrap();
    pool.make_disk(&Reflink, &name(), 80, &dir.0.join("pool/old80"), 0).unwrap();
    dir.publish(64, "new");
    pool.make_disk(&Reflink, &name(), 64, &dir.0.join("pool/new"), 0).unwrap();
    assert_eq!(dir.bases().len(), 3);
    assert_eq!(pool.remove_unused_bases().unwrap(), 2);
    assert_eq!(pool.remove_unused_bases().unwrap(), 0);
    assert_eq!(dir.bases(), [dir.edition()]);
    assert_eq!((content(&dir.0.join("pool/old")), content(&dir.0.join("pool/new"))), ("old".into(), "new".into()));
    // An image that somebody put there by hand has no digest.
    std::fs::remove_file(dir.0.join("images/t/digest")).unwrap();
    pool.make_disk(&Reflink, &name(), 64, &dir.0.join("pool/hand"), 0).unwrap();
    assert_eq!(content(&dir.0.join("pool/hand")), "new");
    pool.close().unwrap();
}

#[test]
fn a_full_pool_is_said_and_leaves_no_halves() {
    let Some(dir) = Dir::new() else { return };
    let pool = dir.open();
    dir.publish(200, &"x".repeat(60 << 20));
    let filler = std::fs::File::create(dir.0.join("pool/filler")).unwrap();
    while rustix::fs::fallocate(&filler, FallocateFlags::empty(), filler.metadata().unwrap().len(), 4 << 20).is_ok() {}
    assert!(pool.free_mib() < 60, "{}", pool.free_mib());
    let refused = pool.make_disk(&Reflink, &name(), 200, &dir.0.join("pool/disk"), 0).unwrap_err();
    assert!(refused.is_full(), "{refused:?}");
    assert!(dir.bases().is_empty() && !dir.0.join("pool/disk").exists(), "{:?}", dir.bases());
    drop(filler);
    std::fs::remove_file(dir.0.join("pool/filler")).unwrap();
    pool.make_disk(&Reflink, &name(), 200, &dir.0.join("pool/disk"), 0).unwrap();
    pool.close().unwrap();
}

impl Dir {
    /// The name of the base of what is published now.
    fn edition(&self) -> String {
        format!("{}.ext4", std::fs::read_to_string(self.0.join("images/t/digest")).unwrap().trim())
    }
}
