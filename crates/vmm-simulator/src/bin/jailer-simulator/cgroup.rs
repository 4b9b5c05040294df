//! Limits by cgroups. The directories stay: nobody removes them but whoever started the jailer.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};

use crate::arguments::Arguments;

/// Under version 2 without values to write, an existing parent is entered as it is.
pub fn enter(arguments: &Arguments, program: &str) -> anyhow::Result<()> {
    let parent = arguments.parent_cgroup(program)?;
    if arguments.cgroup.is_empty() {
        if arguments.cgroup_version == 2 {
            let group = mount_of("cgroup2", None)?.join(parent);
            if group.is_dir() {
                attach(&group, "cgroup.procs")?;
            }
        }
        return Ok(());
    }
    let mut groups = Vec::new();
    for setting in &arguments.cgroup {
        let (file, value) =
            setting.split_once('=').with_context(|| format!("Invalid format for cgroups: {setting}"))?;
        ensure!(!value.is_empty() && !value.contains('='), "Invalid format for cgroups: {setting}");
        let (controller, _) = file.split_once('.').with_context(|| format!("Cgroup invalid file: {file}"))?;
        let (group, members) = if arguments.cgroup_version == 2 {
            (version_2(&parent, &arguments.id, controller)?, "cgroup.procs")
        } else {
            (mount_of("cgroup", Some(controller))?.join(&parent).join(&arguments.id), "tasks")
        };
        fs::create_dir_all(&group).with_context(|| format!("Failed to create directory {}", group.display()))?;
        let path = group.join(file);
        fs::write(&path, value).with_context(|| format!("Failed to write to {}", path.display()))?;
        groups.push((group, members));
    }
    // Some controllers take a member only once all their values are there.
    groups.iter().try_for_each(|(group, members)| attach(group, members))
}

/// The controller is handed down from the top, level by level.
fn version_2(parent: &Path, id: &str, controller: &str) -> anyhow::Result<PathBuf> {
    let mut group = mount_of("cgroup2", None)?;
    for part in parent.iter().chain([id.as_ref()]) {
        let control = group.join("cgroup.subtree_control");
        fs::write(&control, format!("+{controller}"))
            .with_context(|| format!("Failed to write to {}", control.display()))?;
        group.push(part);
        fs::create_dir_all(&group).with_context(|| format!("Failed to create directory {}", group.display()))?;
    }
    Ok(group)
}

fn attach(group: &Path, members: &str) -> anyhow::Result<()> {
    let path = group.join(members);
    fs::write(&path, std::process::id().to_string()).with_context(|| format!("Failed to write to {}", path.display()))
}

fn mount_of(kind: &str, controller: Option<&str>) -> anyhow::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("Failed to read /proc/mounts")?;
    mounts
        .lines()
        .find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (path, found, options) = (fields.next()?, fields.next()?, fields.next()?);
            let controls = controller.is_none_or(|wanted| options.split(',').any(|option| option == wanted));
            (found == kind && controls).then(|| PathBuf::from(path))
        })
        .with_context(|| format!("Cgroup hierarchy {} not found", controller.unwrap_or(kind)))
}
