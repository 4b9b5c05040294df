//! Where clusters of tests lie: `/tmp/wrenn-pg-<pid>-<start of that process>-<n>`. Short, because the path of a unix socket is, and open
//! to user `postgres`. Directories of processes that are gone are removed by whoever makes the next one.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result};
use nix::unistd::User;

const BASE: &str = "/tmp";
const PREFIX: &str = "wrenn-pg-";

/// An empty directory of this process, which `owner` alone may open.
pub fn make(owner: Option<&User>) -> Result<PathBuf> {
    static MADE: AtomicU64 = AtomicU64::new(0);
    let pid = std::process::id();
    let begin = beginning(pid).context("read when this process began")?;
    let dir = Path::new(BASE).join(format!("{PREFIX}{pid}-{begin}-{}", MADE.fetch_add(1, Ordering::Relaxed)));
    std::fs::DirBuilder::new().mode(0o700).create(&dir).with_context(|| format!("make {}", dir.display()))?;
    if let Some(user) = owner {
        std::os::unix::fs::chown(&dir, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
            .with_context(|| format!("give {} to {}", dir.display(), user.name))?;
    }
    Ok(dir)
}

/// Removes the directories of processes that are gone. What belongs to another user stays.
pub fn sweep() {
    for entry in std::fs::read_dir(BASE).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_abandoned = name.to_str().and_then(owner).is_some_and(|(pid, begin)| beginning(pid) != Some(begin));
        if is_abandoned {
            // Its server may still be ending; then the run after this one removes it.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn owner(name: &str) -> Option<(u32, u64)> {
    let mut parts = name.strip_prefix(PREFIX)?.split('-');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// In clock ticks since the boot: tells a process from a later one with the same number.
fn beginning(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in brackets and may hold blanks and brackets; field 22 is the twentieth after it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directories_of_the_dead_are_swept() {
        let alive = make(None).unwrap();
        let dead = Path::new(BASE).join(format!("{PREFIX}{}-1-0", std::process::id()));
        std::fs::create_dir_all(dead.join("data")).unwrap();
        sweep();
        assert_eq!((alive.exists(), dead.exists()), (true, false));
        std::fs::remove_dir(&alive).unwrap();
    }

    #[test]
    fn names_tell_their_owner() {
        assert_eq!(owner("wrenn-pg-12-3456-0"), Some((12, 3456)));
        assert_eq!((owner("wrenn-pg-x-1-0"), owner("wrenn-pg-12"), owner("other-12-3456-0")), (None, None, None));
    }
}
