//! What a machine holds: the kinds of objects that a platform makes, counted by listing the kernel and the file system.
//!
//! It counts objects that carry the tag of one agent, so that other platforms on the machine do not disturb.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

/// How many of each kind; kinds of which there are none are left out, so that an empty map says "nothing is left".
pub type Objects = BTreeMap<&'static str, usize>;

/// Everything below `dir` and everything in the kernel that bears `tag` (the agent's eight hex digits).
pub fn count(dir: &Path, tag: &str) -> Objects {
    let mut all = Objects::new();
    let mut note = |kind: &'static str, n: usize| {
        if n > 0 {
            all.insert(kind, n);
        }
    };
    note("namespaces", names_below("/run/netns").iter().filter(|name| name.contains(tag)).count());
    note("links", lines_with("ip", &["-o", "link"], tag));
    note("nft_tables", lines_with("nft", &["list", "tables"], tag));
    note("mounts", mounts_of(dir));
    note("loops", lines_with("losetup", &["-l", "-n", "-O", "BACK-FILE"], &dir.to_string_lossy()));
    note("disk_devices", disk_devices(tag));
    note("microvms", microvms(tag).len());
    note("cgroups", cgroups(Path::new("/sys/fs/cgroup"), tag, 0));
    note("sandbox_dirs", sandbox_dirs(dir));
    all
}

/// Devices of device-mapper.
fn disk_devices(tag: &str) -> usize {
    let name = |block: &String| fs::read_to_string(format!("/sys/block/{block}/dm/name")).unwrap_or_default();
    names_below("/sys/block").iter().filter(|block| name(block).contains(tag)).count()
}

/// The process ids of VMMs, whichever program they are: each runs as a user of its own, of a range that the tag gives and that is nobody
/// else's. Its name, its root and its command line are the jail's.
pub fn microvms(tag: &str) -> Vec<i32> {
    let users = users_of(tag);
    numbered("/proc").into_iter().filter(|pid| user_of(*pid).is_some_and(|user| users.contains(&user))).collect()
}

/// Those among them that have a file below `dir` open. A jailed one calls it by another name, so the files themselves are compared.
pub fn microvms_below(dir: &Path, tag: &str) -> Vec<i32> {
    let mut files = BTreeSet::new();
    note_files(dir, &mut files);
    let holds = |pid: &i32| {
        let open = numbered(&format!("/proc/{pid}/fd"));
        open.iter().any(|fd| fs::metadata(format!("/proc/{pid}/fd/{fd}")).is_ok_and(|it| files.contains(&file(&it))))
    };
    microvms(tag).into_iter().filter(holds).collect()
}

/// From 0x40000000 on: 16 bits of the tag, then 15 bits that tell the agent's sandboxes apart.
fn users_of(tag: &str) -> RangeInclusive<u32> {
    let first = 0x4000_0000 + (u32::from_str_radix(&tag[..4], 16).expect("a tag is hex digits") << 15);
    first..=first + 0x7fff
}

/// Of a process that lives: one that has ended waits to be collected.
fn user_of(pid: i32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let lives = !field("State:")?.starts_with(['Z', 'X']);
    field("Uid:")?.split_whitespace().next()?.parse().ok().filter(|_| lives)
}

fn note_files(dir: &Path, files: &mut BTreeSet<(u64, u64)>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(it) if it.is_dir() => note_files(&entry.path(), files),
            Ok(it) => _ = files.insert(file(&it)),
            // Gone meanwhile.
            Err(_) => {}
        }
    }
}

fn file(it: &fs::Metadata) -> (u64, u64) {
    (it.dev(), it.ino())
}

fn sandbox_dirs(dir: &Path) -> usize {
    // A tombstone is a small file; what counts is a directory with data: a disk, or a saved state, whole or not.
    let has_data = |entry: &fs::DirEntry| {
        let names = fs::read_dir(entry.path()).into_iter().flatten().flatten().map(|entry| entry.file_name());
        names.into_iter().any(|name| name == "disk" || name.to_string_lossy().starts_with("gen-"))
    };
    fs::read_dir(dir.join("pool/sandboxes")).map(|entries| entries.flatten().filter(has_data).count()).unwrap_or(0)
}

fn mounts_of(dir: &Path) -> usize {
    let dir = dir.to_string_lossy().into_owned();
    fs::read_to_string("/proc/self/mounts").unwrap_or_default().lines().filter(|line| line.contains(&dir)).count()
}

fn cgroups(at: &Path, tag: &str, depth: usize) -> usize {
    if depth > 8 {
        return 0;
    }
    let Ok(entries) = fs::read_dir(at) else { return 0 };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| {
            // A group of ours counts once, with all that is below it.
            if entry.file_name().to_string_lossy().contains(tag) { 1 } else { cgroups(&entry.path(), tag, depth + 1) }
        })
        .sum()
}

fn lines_with(program: &str, args: &[&str], needle: &str) -> usize {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program} {args:?}: {e}"));
    String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.contains(needle)).count()
}

fn names_below(dir: &str) -> Vec<String> {
    fs::read_dir(dir)
        .map(|entries| entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default()
}

fn numbered(dir: &str) -> Vec<i32> {
    names_below(dir).iter().filter_map(|name| name.parse().ok()).collect()
}
