//! CPU, memory and pids limits of the VMMs: one control group per sandbox and controller, `wrenn-<tag>/<sandbox id>`
//! (of a sandbox that was a standby before: by the standby's name, because groups of version 2 cannot be renamed).
//!
//! Version 2 when it has all three controllers, else those of version 1 that there are, else none, which is a stated state and no error.
//!
//! In version 2 a group with processes of its own cannot hand controllers down, and the agent's own group is such a one: a shell's session,
//! or a service's unit, into which no new agent could be started once it had limited children. So the groups lie beside it, at the top of
//! what is seen of the hierarchy (which on a plain machine is its root, where that rule does not hold), else below the nearest ancestor that
//! hands down; only where none does, as in a container of the agent's own, the agent moves aside and its own group is used.
//!
//! In version 1 the groups lie below the agent's own, so that limits put on the agent hold for its sandboxes too.
//!
//! Another start of the agent may be in another group: every place that was ever used is written down until it is gone, so that nothing is
//! lost sight of. (Under systemd the unit needs `KillMode=process`, because microVMs outlive the agent.)
//!
//! It ends no process of version 1 groups: whoever releases a group has ended what was in it.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::disk::{Mount, all_mounts};
use crate::durable;

const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// The kernel's own default; quotas are in parts of it.
const PERIOD_US: u64 = 100_000;
/// For the VMM's main loop beside its vCPUs (disk, network, console), as a part of a core.
const CPU_BESIDE_US: u64 = PERIOD_US / 2;
/// What a VMM takes beside its guest's memory: 64 MiB of translated code and about 50 MiB of its own measured; the rest is page cache of
/// the disk, which the kernel takes back when it must.
const MEMORY_BESIDE_MIB: u64 = 256;
/// QEMU has a thread per vCPU, a main loop and at most 64 for disk requests.
const PIDS_BESIDE: u64 = 96;
/// A group is busy until its last process has been collected by its parent.
const RELEASE_LIMIT: Duration = Duration::from_secs(10);
/// In WRENN_DIR: the directories `wrenn-<tag>` that were ever used.
const PLACES_FILE: &str = "agent-cgroups";
const PLACES_BYTES_MAX: u64 = 64 * 1024;
/// Into which the agent moves where nothing but its own group can hold the sandboxes'.
const OWN_LEAF: &str = "wrenn-agent";

/// What a sandbox may use.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub vcpus: u8,
    pub memory_mib: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// How the sandboxes' groups lie to the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stand {
    /// The agent is not in the parent of their subtree, or it may be.
    Aside,
    /// It is, and must go into a leaf of its own first.
    InTheWay,
}

/// One hierarchy in which sandboxes get groups.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Tree {
    version: Version,
    stand: Stand,
    /// `cpu` and so on; of version 2 all of them.
    controllers: Vec<&'static str>,
    /// `.../wrenn-<tag>`
    subtree: PathBuf,
}

pub struct Cgroups {
    trees: Vec<Tree>,
    notes: Vec<String>,
    places_file: PathBuf,
    /// All subtrees that may hold something, also those of earlier starts.
    places: Mutex<BTreeSet<PathBuf>>,
}

impl Cgroups {
    /// Finds out what this host has. Blocks.
    pub fn open(dir: &Path, tag: &str) -> Self {
        let mounts = all_mounts().unwrap_or_default();
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let (trees, mut notes) = choose(&mounts, &own, &format!("wrenn-{tag}"));
        let has = |wanted: &&&str| trees.iter().any(|tree| tree.controllers.contains(*wanted));
        let missing: Vec<&str> = CONTROLLERS.iter().filter(|wanted| !has(wanted)).copied().collect();
        if !missing.is_empty() {
            notes.push(format!(
                "Limits: sandboxes run without control groups for {}; one sandbox can slow down the others.",
                missing.join(", ")
            ));
        }
        let places_file = dir.join(PLACES_FILE);
        let known = durable::read(&places_file, PLACES_BYTES_MAX).unwrap_or_default();
        let known = String::from_utf8_lossy(&known).into_owned();
        let ours = |path: &Path| path.file_name().is_some_and(|name| name == format!("wrenn-{tag}").as_str());
        let mut places: BTreeSet<PathBuf> =
            known.lines().map(PathBuf::from).filter(|path| path.is_absolute() && ours(path) && path.exists()).collect();
        places.extend(trees.iter().map(|tree| tree.subtree.clone()));
        let cgroups = Self { trees, notes, places_file, places: Mutex::new(places) };
        cgroups.write_down();
        cgroups
    }

    /// `v2`, `v1 (cpu, memory, pids)`, `none`
    pub fn driver(&self) -> String {
        match self.trees.first() {
            None => "none".to_owned(),
            Some(tree) if tree.version == Version::V2 => "v2".to_owned(),
            Some(_) => {
                let names: Vec<&str> = self.trees.iter().flat_map(|tree| tree.controllers.iter().copied()).collect();
                format!("v1 ({})", names.join(", "))
            }
        }
    }

    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Makes the sandbox's groups and sets their limits. Repeatable. Blocks.
    pub fn ensure(&self, name: &str, limits: Limits) -> io::Result<()> {
        for tree in &self.trees {
            if !tree.subtree.exists() {
                prepare(tree)?;
            }
            let group = tree.subtree.join(name);
            match std::fs::create_dir(&group) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other?,
            }
            for (file, value) in settings(tree, limits) {
                set(&group.join(file), &value)?;
            }
        }
        Ok(())
    }

    /// The files by which a process enters the sandbox's groups.
    pub fn entrances(&self, name: &str) -> Vec<PathBuf> {
        self.trees.iter().map(|tree| tree.subtree.join(name).join("cgroup.procs")).collect()
    }

    /// Removes the sandbox's groups, waiting for what is just ending in them. Also for what is not there. Blocks.
    pub fn release(&self, name: &str) -> io::Result<()> {
        let end = Instant::now() + RELEASE_LIMIT;
        self.places().iter().try_for_each(|place| remove_group(&place.join(name), end))
    }

    /// Removes the empty groups of sandboxes that are not known; how many. Those with processes in them stay.
    pub fn remove_orphans(&self, is_known: impl Fn(&str) -> bool) -> usize {
        let mut removed = 0;
        // Listed first and asked then: a sandbox is known before it has a group.
        for group in self.groups() {
            let name = group.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if is_known(&name) {
                continue;
            }
            match remove_group(&group, Instant::now()) {
                Ok(()) => removed += 1,
                Err(error) => warn!("the control group {} of no sandbox stays: {error}", group.display()),
            }
        }
        if removed > 0 {
            info!("removed {removed} control groups of no sandbox");
        }
        removed
    }

    /// Every group of a sandbox, known or not.
    pub fn groups(&self) -> Vec<PathBuf> {
        let entries = self.places().into_iter().filter_map(|place| std::fs::read_dir(place).ok()).flatten().flatten();
        entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
    }

    /// Removes everything. Only when no sandbox is left.
    pub fn close(&self) -> io::Result<()> {
        let end = Instant::now() + RELEASE_LIMIT;
        self.groups().iter().try_for_each(|group| remove_group(group, end))?;
        self.places().iter().try_for_each(|place| remove_group(place, end))?;
        self.places.lock().unwrap_or_else(PoisonError::into_inner).clear();
        durable::remove(&self.places_file)
    }

    fn places(&self) -> BTreeSet<PathBuf> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn write_down(&self) {
        let text: String = self.places().iter().map(|place| format!("{}\n", place.display())).collect();
        if durable::read(&self.places_file, PLACES_BYTES_MAX).is_ok_and(|known| known == text.as_bytes()) {
            return;
        }
        if let Err(error) = durable::write(&self.places_file, text.as_bytes(), 0o644) {
            warn!("where the control groups lie was not written down: {error}");
        }
    }
}

/// The hierarchies to use, made ready, and why not better ones.
fn choose(mounts: &[Mount], own: &str, name: &str) -> (Vec<Tree>, Vec<String>) {
    let mut notes = Vec::new();
    let mut ready = |tree: &Tree| match prepare(tree) {
        Ok(()) => true,
        Err(error) => {
            notes.push(format!("Limits: no groups for {} ({error}).", tree.controllers.join(", ")));
            false
        }
    };
    let unified = mounts.iter().find(|mount| mount.kind == "cgroup2");
    let places = unified.zip(own_group(own, None)).map(|(mount, group)| places_of_v2(mount, &group, name));
    if let Some(tree) = places.into_iter().flatten().find(&mut ready) {
        // What was not to be had elsewhere is of no interest.
        return (vec![tree], Vec::new());
    }
    let tree = |controller: &'static str| {
        let has =
            |mount: &&Mount| mount.kind == "cgroup" && mount.options.split(',').any(|option| option == controller);
        let mount = mounts.iter().find(has)?;
        let parent = below(mount, &own_group(own, Some(controller))?);
        let (version, controllers, subtree) = (Version::V1, vec![controller], parent.join(name));
        Some(Tree { version, stand: Stand::Aside, controllers, subtree })
    };
    let trees = CONTROLLERS.into_iter().filter_map(tree).filter(&mut ready).collect();
    (trees, notes)
}

/// Where the groups may lie in version 2, best first: only places that have all controllers to give.
fn places_of_v2(mount: &Mount, group: &Path, name: &str) -> Vec<Tree> {
    let mut own = below(mount, group);
    if own.file_name().is_some_and(|last| last == OWN_LEAF) {
        own.pop();
    }
    let nearest =
        own.ancestors().skip(1).take_while(|ancestor| ancestor.starts_with(&mount.point) && *ancestor != mount.point);
    let beside = std::iter::once(mount.point.as_path()).chain(nearest).map(|parent| (parent, Stand::Aside));
    let all = beside.chain([(own.as_path(), Stand::InTheWay)]);
    let offers = |(parent, _): &(&Path, Stand)| {
        let offered = std::fs::read_to_string(parent.join("cgroup.controllers")).unwrap_or_default();
        CONTROLLERS.iter().all(|wanted| offered.split_whitespace().any(|one| one == *wanted))
    };
    all.filter(offers)
        .map(|(parent, stand)| {
            let (version, controllers, subtree) = (Version::V2, CONTROLLERS.to_vec(), parent.join(name));
            Tree { version, stand, controllers, subtree }
        })
        .collect()
}

/// The path of this process's group, from `/proc/self/cgroup`.
fn own_group(text: &str, controller: Option<&str>) -> Option<PathBuf> {
    text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let is_it = match controller {
            Some(controller) => controllers.split(',').any(|one| one == controller),
            None => number == "0" && controllers.is_empty(),
        };
        is_it.then(|| PathBuf::from(path))
    })
}

/// Where a group is seen through a mount. A group outside of what is mounted here: the topmost that is seen.
fn below(mount: &Mount, group: &Path) -> PathBuf {
    let seen = group.strip_prefix(&mount.root).map(|rest| mount.point.join(rest)).ok();
    seen.filter(|path| path.is_dir()).unwrap_or_else(|| mount.point.clone())
}

/// Makes the agent's part of a hierarchy; in version 2 it hands the controllers down.
fn prepare(tree: &Tree) -> io::Result<()> {
    if tree.version == Version::V1 {
        return std::fs::create_dir_all(&tree.subtree);
    }
    let parent = tree.subtree.parent().expect("a subtree lies in a group");
    match hand_down(parent) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy && tree.stand == Stand::InTheWay => {
            let leaf = parent.join(OWN_LEAF);
            std::fs::create_dir_all(&leaf)?;
            set(&leaf.join("cgroup.procs"), "0")?;
            hand_down(parent)?;
        }
        other => other?,
    }
    std::fs::create_dir_all(&tree.subtree)?;
    hand_down(&tree.subtree).inspect_err(|_| {
        // Empty, or of an earlier start and then it stays.
        let _ = std::fs::remove_dir(&tree.subtree);
    })
}

fn hand_down(group: &Path) -> io::Result<()> {
    let file = group.join("cgroup.subtree_control");
    let present = std::fs::read_to_string(&file)?;
    let missing: Vec<String> = CONTROLLERS
        .iter()
        .filter(|wanted| !present.split_whitespace().any(|one| one == **wanted))
        .map(|wanted| format!("+{wanted}"))
        .collect();
    if missing.is_empty() { Ok(()) } else { set(&file, &missing.join(" ")) }
}

/// Control files are never made, only written.
fn set(file: &Path, value: &str) -> io::Result<()> {
    use io::Write as _;
    let written = std::fs::File::options().write(true).open(file).and_then(|mut file| file.write_all(value.as_bytes()));
    written.map_err(|error| io::Error::new(error.kind(), format!("write {value} to {}: {error}", file.display())))
}

fn settings(tree: &Tree, limits: Limits) -> Vec<(&'static str, String)> {
    let vcpus = u64::from(limits.vcpus);
    let quota = vcpus * PERIOD_US + CPU_BESIDE_US;
    let memory = (u64::from(limits.memory_mib) + MEMORY_BESIDE_MIB) << 20;
    let pids = vcpus + PIDS_BESIDE;
    let mut all = Vec::new();
    for controller in &tree.controllers {
        match (tree.version, *controller) {
            (Version::V1, "cpu") => all.extend([
                ("cpu.cfs_period_us", PERIOD_US.to_string()),
                ("cpu.cfs_quota_us", quota.to_string()),
                ("cpu.shares", (vcpus * 1024).to_string()),
            ]),
            (Version::V1, "memory") => all.push(("memory.limit_in_bytes", memory.to_string())),
            (Version::V2, "cpu") => {
                all.extend([("cpu.max", format!("{quota} {PERIOD_US}")), ("cpu.weight", (vcpus * 100).to_string())]);
            }
            // One VMM is the group: half of it is of no use to anybody.
            (Version::V2, "memory") => {
                all.extend([("memory.max", memory.to_string()), ("memory.oom.group", "1".to_owned())])
            }
            (_, "pids") => all.push(("pids.max", pids.to_string())),
            _ => {}
        }
    }
    all
}

/// Only directories can be removed in a hierarchy; the files in them go with them.
fn remove_group(group: &Path, end: Instant) -> io::Result<()> {
    loop {
        match std::fs::remove_dir(group) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(io::Error::new(error.kind(), format!("remove {}: {error}", group.display()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "5:pids:/\n4:memory:/a/b\n1:cpu,cpuacct:/\n0::/\n";

    fn mount(point: &Path, kind: &str, options: &str) -> Mount {
        Mount {
            device: "0:1".to_owned(),
            root: "/".into(),
            point: point.to_owned(),
            kind: kind.to_owned(),
            options: options.to_owned(),
        }
    }

    #[test]
    fn takes_version_2_only_when_it_has_all_controllers() {
        let dir = tempfile::tempdir().unwrap();
        let (v2, cpu, memory) = (dir.path().join("unified"), dir.path().join("cpu"), dir.path().join("memory"));
        for path in [&v2, &cpu, &memory.join("a/b")] {
            std::fs::create_dir_all(path).unwrap();
        }
        let mounts = [
            mount(&v2, "cgroup2", "rw"),
            mount(&cpu, "cgroup", "rw,cpu,cpuacct"),
            mount(&memory, "cgroup", "rw,memory"),
        ];
        std::fs::write(v2.join("cgroup.controllers"), "hugetlb\n").unwrap();
        let (trees, _) = choose(&mounts, HYBRID, "wrenn-t");
        let subtrees: Vec<_> = trees.iter().map(|tree| tree.subtree.clone()).collect();
        assert_eq!(subtrees, [cpu.join("wrenn-t"), memory.join("a/b/wrenn-t")]);
        for group in [v2.clone(), v2.join("wrenn-t")] {
            hierarchy_group(&group);
        }
        let (trees, _) = choose(&mounts, HYBRID, "wrenn-t");
        assert_eq!((trees.len(), trees[0].version), (1, Version::V2));
        let (trees, _) = choose(&[], HYBRID, "wrenn-t");
        assert!(trees.is_empty());
    }

    /// The files that the kernel makes in every group.
    fn hierarchy_group(path: &Path) {
        std::fs::create_dir_all(path).unwrap();
        std::fs::write(path.join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
        std::fs::write(path.join("cgroup.subtree_control"), "").unwrap();
    }

    /// A group that hands nothing down, whatever it has: the file cannot be written.
    fn closed_group(path: &Path) {
        hierarchy_group(path);
        std::fs::remove_file(path.join("cgroup.subtree_control")).unwrap();
        std::fs::create_dir(path.join("cgroup.subtree_control")).unwrap();
    }

    #[test]
    fn sandboxes_lie_beside_the_agent_and_not_below_it() {
        const SERVICE: &str = "0::/system.slice/wrenn-agent.service\n";
        const SHELL: &str = "0::/user.slice/user-0.slice/session-1.scope\n";
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        let slices = ["system.slice", "user.slice/user-0.slice"].map(|slice| root.join(slice));
        let groups = ["system.slice/wrenn-agent.service", "user.slice/user-0.slice/session-1.scope"];
        for group in ["", "system.slice", "user.slice", "user.slice/user-0.slice"].iter().chain(&groups) {
            for path in [root.join(group), root.join(group).join("wrenn-t")] {
                hierarchy_group(&path);
            }
        }
        let mounts = [mount(&root, "cgroup2", "rw")];
        let chosen = |own| {
            let (trees, _) = choose(&mounts, own, "wrenn-t");
            trees.first().map(|tree| (tree.subtree.clone(), tree.stand))
        };
        // A service and a shell of a plain machine.
        for own in [SERVICE, SHELL] {
            assert_eq!(chosen(own), Some((root.join("wrenn-t"), Stand::Aside)));
        }
        let handed = std::fs::read_to_string(root.join("wrenn-t/cgroup.subtree_control")).unwrap();
        assert_eq!(handed, "+cpu +memory +pids");
        // The top is another's, as in a container: the nearest that hands down.
        closed_group(&root);
        for (own, slice) in [SERVICE, SHELL].iter().zip(&slices) {
            assert_eq!(chosen(own), Some((slice.join("wrenn-t"), Stand::Aside)));
        }
        closed_group(&slices[1]);
        assert_eq!(chosen(SHELL), Some((root.join("user.slice/wrenn-t"), Stand::Aside)));
        // No other is left than the agent's own.
        closed_group(&root.join("user.slice"));
        assert_eq!(chosen(SHELL), Some((root.join(groups[1]).join("wrenn-t"), Stand::InTheWay)));
        closed_group(&root.join(groups[1]));
        assert_eq!(chosen(SHELL), None);
    }

    #[test]
    fn limits_are_the_shape_and_what_the_vmm_needs_beside_it() {
        let (version, stand) = (Version::V2, Stand::Aside);
        let tree = Tree { version, stand, controllers: CONTROLLERS.to_vec(), subtree: "/x".into() };
        let all = settings(&tree, Limits { vcpus: 2, memory_mib: 512 });
        assert!(all.contains(&("cpu.max", "250000 100000".to_owned())), "{all:?}");
        assert!(all.contains(&("memory.max", (768_u64 << 20).to_string())), "{all:?}");
        assert!(all.contains(&("pids.max", "98".to_owned())), "{all:?}");
    }
}
