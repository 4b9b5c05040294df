//! Counts what this agent has on the machine, by kind: shown by `GetHost`, compared by tests before and after. Only what bears the agent's
//! tag or lies below its WRENN_DIR is counted, so two agents of one machine do not see each other.
//!
//! Slots and standbys that are made ahead, descriptors and threads that are the agent's own come and go; everything else is as before when a sandbox is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::cgroup::Cgroups;
use crate::disk::{self, Pool};
use crate::identity::Tag;
use crate::network::Census;
use crate::sandbox::journal::SANDBOXES;
use crate::sweep;

/// Users of VMMs; None where that cannot be told.
pub fn living(tag: &Tag) -> Option<BTreeSet<u32>> {
    sweep::living(tag.uids()).ok()
}

/// Names of control groups.
pub fn groups(cgroups: &Cgroups) -> Vec<String> {
    let name = |path: PathBuf| Some(path.file_name()?.to_string_lossy().into_owned());
    cgroups.groups().into_iter().filter_map(name).collect()
}

/// What cannot be counted is left out, so that nobody takes it for none.
pub fn count(pool: &Pool, network: Option<Census>) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    let mut add = |kind: &str, count: Option<usize>| {
        if let Some(count) = count {
            found.insert(kind.to_owned(), u64::try_from(count).unwrap_or(u64::MAX));
        }
    };
    let below = |path: &Path| path.starts_with(pool.dir());
    add("mounts", disk::all_mounts().ok().map(|all| all.iter().filter(|mount| below(&mount.point)).count()));
    // Those in the pool are disks', which go with their devices.
    let is_apart = |path: &Path| below(path) && !path.starts_with(pool.path());
    add("loops", disk::all_loops().ok().map(|all| all.iter().filter(|(_, file)| is_apart(file)).count()));
    let sandboxes = pool.path().join(SANDBOXES);
    add("sandbox_dirs", entries(&sandboxes));
    let runs = |sandbox: std::fs::DirEntry| entries(&sandbox.path().join("run")).unwrap_or(0);
    add("run_dirs", std::fs::read_dir(&sandboxes).ok().map(|all| all.flatten().map(runs).sum()));
    add("agent_fds", entries(Path::new("/proc/self/fd")));
    add("agent_threads", entries(Path::new("/proc/self/task")));
    if let Some(network) = network {
        let kinds = [
            ("namespaces", network.namespaces),
            ("links", network.links),
            ("taps", network.taps),
            ("nft_tables", network.nft_tables),
        ];
        found.extend(kinds.map(|(kind, count)| (kind.to_owned(), count)));
    }
    found
}

fn entries(directory: &Path) -> Option<usize> {
    std::fs::read_dir(directory).ok().map(|all| all.flatten().count())
}
