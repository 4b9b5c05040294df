//! What the platform of one directory holds on this machine, counted by listing the kernel's objects, not by asking the platform.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{layout, postgres, process};

/// How many of each kind; kinds of which there are none are absent.
pub type Objects = BTreeMap<String, u64>;

/// The agent's tag: all that it makes in the kernel bears it.
pub fn tag(dir: &Path) -> Option<String> {
    let text = std::fs::read_to_string(dir.join("agent-id")).ok()?;
    let tag: String = text.trim().chars().take(8).collect();
    (tag.len() == 8 && tag.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(tag)
}

/// What bears `tag` or lies below `dir`. Blocking: some short calls of `ip`, `nft` and `losetup`.
pub fn count(dir: &Path, tag: Option<&str>) -> Objects {
    let mut all = Objects::new();
    let mut note = |kind: &str, number: usize| {
        if number > 0 {
            all.insert(kind.to_owned(), number as u64);
        }
    };
    let path = dir.to_string_lossy();
    if let Some(tag) = tag {
        note("network_namespaces", names("/run/netns").iter().filter(|name| name.contains(tag)).count());
        note("links", lines("ip", &["-o", "link"], tag));
        note("nft_tables", lines("nft", &["list", "tables"], tag));
        note("cgroups", cgroups(Path::new("/sys/fs/cgroup"), tag, 0));
        note("disk_devices", disk_devices(tag).len());
    }
    note("mounts", mounts(&path));
    // Those of files in the pool go with the devices of disks.
    let of_disks = lines("losetup", &["-l", "-n", "-O", "BACK-FILE"], &format!("{path}/pool/"));
    note("loop_devices", lines("losetup", &["-l", "-n", "-O", "BACK-FILE"], &path).saturating_sub(of_disks));
    note("sandbox_dirs", directories(&dir.join("pool/sandboxes")));
    note("postgres_servers", postgres::servers(dir).len());
    let is_program =
        |pid: &i32| matches!(process::name(*pid).as_str(), "wrenn-cp" | "wrenn-agent") && process::works_for(*pid, dir);
    note("programs", process::all().into_iter().filter(is_program).count());
    note("microvms", tag.map_or(0, |tag| microvms(tag).len()));
    all
}

/// The same without what stands by for the creates that come: that comes and goes by itself.
pub fn count_used(dir: &Path, tag: Option<&str>) -> Objects {
    let standbys = dir.join("pool/standbys");
    // `standby-<slot>-<incarnation>`, and a namespace ends in its slot.
    let slots: Vec<u32> = names(&standbys.to_string_lossy())
        .iter()
        .filter_map(|name| name.strip_prefix("standby-")?.split_once('-')?.0.parse().ok())
        .collect();
    let mut all = count(dir, tag);
    let mut less = |kind: &str, number: usize| {
        if let Some(count) = all.get_mut(kind) {
            *count = count.saturating_sub(number as u64);
        }
    };
    let is_standby = |name: &&String| {
        slots.iter().any(|slot| name.ends_with(&format!("-{slot}"))) && tag.is_some_and(|tag| name.contains(tag))
    };
    less("network_namespaces", names("/run/netns").iter().filter(is_standby).count());
    let among = |all: Vec<u32>| all.iter().filter(|slot| slots.contains(slot)).count();
    less("microvms", among(tag.map(microvms).unwrap_or_default()));
    less("disk_devices", among(tag.map(disk_devices).unwrap_or_default()));
    all
}

/// The slots of devices of device-mapper: `wrenn-<tag>-<slot>`.
fn disk_devices(tag: &str) -> Vec<u32> {
    let slot = |block: String| {
        let name = std::fs::read_to_string(format!("/sys/block/{block}/dm/name")).ok()?;
        name.trim().strip_prefix(&format!("wrenn-{tag}-"))?.parse().ok()
    };
    names("/sys/block").into_iter().filter_map(slot).collect()
}

/// Kinds of which there are more than before, with how many more.
pub fn grown(before: &Objects, after: &Objects) -> Objects {
    after
        .iter()
        .map(|(kind, number)| (kind.clone(), number.saturating_sub(before.get(kind).copied().unwrap_or(0))))
        .filter(|(_, more)| *more > 0)
        .collect()
}

fn names(folder: &str) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn directories(folder: &Path) -> usize {
    std::fs::read_dir(folder).into_iter().flatten().flatten().filter(|entry| entry.path().join("disk").exists()).count()
}

fn lines(program: &str, arguments: &[&str], needle: &str) -> usize {
    let Some(program) = layout::system_program(program) else { return 0 };
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output();
    output
        .map(|output| String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.contains(needle)).count())
        .unwrap_or(0)
}

fn mounts(path: &str) -> usize {
    let below = format!("{path}/");
    let all = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    all.lines().filter(|line| line.split(' ').take(2).any(|place| place.starts_with(&below))).count()
}

fn cgroups(folder: &Path, tag: &str, depth: usize) -> usize {
    // Groups of containers are nested, but not this deeply.
    if depth > 8 {
        return 0;
    }
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(
            |entry| {
                if entry.file_name().to_string_lossy().contains(tag) {
                    1
                } else {
                    cgroups(&entry.path(), tag, depth + 1)
                }
            },
        )
        .sum()
}

/// The network slots of VMMs that run, whichever program they are: each runs as a user of its own, of a range that the tag gives and that
/// is nobody else's (16 bits of the tag, then 15 of the slot). Its name, its root and its command line are the jail's.
fn microvms(tag: &str) -> Vec<u32> {
    let Some(tag) = tag.get(..4).and_then(|digits| u32::from_str_radix(digits, 16).ok()) else { return Vec::new() };
    let first = 0x4000_0000 + (tag << 15);
    let slot = |pid| process::user(pid)?.checked_sub(first).filter(|slot| *slot < 1 << 15);
    process::all().into_iter().filter_map(slot).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_grown_is_a_leak() {
        let objects = |pairs: &[(&str, u64)]| {
            pairs.iter().map(|(kind, number)| ((*kind).to_owned(), *number)).collect::<Objects>()
        };
        let (before, after) =
            (objects(&[("links", 4), ("mounts", 1)]), objects(&[("links", 2), ("mounts", 3), ("microvms", 1)]));
        assert_eq!(grown(&before, &after), objects(&[("mounts", 2), ("microvms", 1)]));
    }

    #[test]
    fn a_vmm_is_known_by_its_user_and_not_by_its_name() {
        use std::os::unix::process::CommandExt as _;
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: only root runs programs as others");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("pool/standbys/standby-7-a")).unwrap();
        let number = std::process::id() & 0xffff;
        let tag = format!("{number:04x}0000");
        let mut children = [7, 0x7fff, 0x8000]
            .map(|slot| Command::new("sleep").arg("300").uid(0x4000_0000 + (number << 15) + slot).spawn().unwrap());
        let vmms = |all: Objects| all.get("microvms").copied();
        assert_eq!(vmms(count(dir.path(), Some(&tag))), Some(2), "the third is another agent's");
        assert_eq!(vmms(count_used(dir.path(), Some(&tag))), Some(1), "the first stands by");
        assert_eq!(vmms(count(dir.path(), None)), None);
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(vmms(count(dir.path(), Some(&tag))), None);
    }
}
