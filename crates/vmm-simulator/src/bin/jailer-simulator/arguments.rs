//! The real jailer's arguments, and what it refuses of them.

use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use clap::Parser;

const ID_LENGTH_MAX: usize = 64;
/// Of descriptors, when nothing else is said.
const FILES_DEFAULT: u64 = 2048;

#[derive(Debug, Parser)]
#[command(name = "jailer", disable_version_flag = true)]
pub struct Arguments {
    #[arg(long)]
    pub id: String,
    #[arg(long)]
    pub exec_file: PathBuf,
    #[arg(long)]
    pub uid: u32,
    #[arg(long)]
    pub gid: u32,
    #[arg(long, default_value = "/srv/jailer")]
    pub chroot_base_dir: PathBuf,
    #[arg(long)]
    pub netns: Option<PathBuf>,
    #[arg(long)]
    pub cgroup: Vec<String>,
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    pub cgroup_version: u8,
    #[arg(long)]
    pub parent_cgroup: Option<PathBuf>,
    #[arg(long)]
    pub resource_limit: Vec<String>,
    #[arg(long)]
    pub daemonize: bool,
    #[arg(long)]
    pub new_pid_ns: bool,
    #[arg(last = true)]
    pub extra: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub file_bytes: Option<u64>,
    pub files: u64,
}

impl Arguments {
    /// Asked for the version alone, for which nothing else is needed.
    pub fn only_version() -> bool {
        std::env::args().skip(1).take_while(|argument| argument != "--").any(|argument| argument == "--version")
    }

    pub fn check_id(&self) -> anyhow::Result<()> {
        let length = self.id.len();
        ensure!(
            (1..=ID_LENGTH_MAX).contains(&length),
            "Invalid instance ID: Invalid len ({length});  the length must be between 1 and {ID_LENGTH_MAX}"
        );
        if let Some(place) = self.id.find(|c: char| c != '-' && !c.is_alphanumeric()) {
            let wrong = self.id[place..].chars().next().unwrap_or_default();
            bail!("Invalid instance ID: Invalid char ({wrong}) at position {place}");
        }
        Ok(())
    }

    pub fn parent_cgroup(&self, program: &str) -> anyhow::Result<PathBuf> {
        let parent = self.parent_cgroup.clone().unwrap_or_else(|| PathBuf::from(program));
        let inside = |path: &Path| path.components().all(|part| matches!(part, Component::Normal(_)));
        ensure!(inside(&parent), "Parent cgroup path is invalid. Path should not be absolute or contain '..' or '.'");
        Ok(parent)
    }

    pub fn limits(&self) -> anyhow::Result<Limits> {
        let mut limits = Limits { file_bytes: None, files: FILES_DEFAULT };
        for argument in &self.resource_limit {
            let (name, value) =
                argument.split_once('=').with_context(|| format!("Invalid format for resources limits: {argument}"))?;
            let value = value.parse().with_context(|| format!("Invalid limit value for resource: {value}"))?;
            match name {
                "fsize" => limits.file_bytes = Some(value),
                "no-file" => limits.files = value,
                _ => bail!("Invalid resource argument: {name}"),
            }
        }
        Ok(limits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(more: &[&str]) -> Arguments {
        let given = ["jailer", "--id", "a-1", "--exec-file", "/firecracker", "--uid", "7", "--gid", "8"];
        Arguments::parse_from(given.iter().chain(more))
    }

    #[test]
    fn what_is_after_the_dashes_is_the_programs() {
        let arguments = parsed(&["--cgroup", "a=1", "--cgroup", "b=2", "--", "--api-sock", "/x"]);
        assert_eq!(arguments.extra, ["--api-sock", "/x"]);
        assert_eq!(arguments.cgroup, ["a=1", "b=2"]);
        assert_eq!(arguments.limits().unwrap(), Limits { file_bytes: None, files: 2048 });
    }

    #[test]
    fn refusals() {
        assert!(parsed(&["--resource-limit", "memory=1"]).limits().is_err());
        assert!(parsed(&["--resource-limit", "fsize"]).limits().is_err());
        for parent in ["/a", "../a", "./a/.."] {
            assert!(parsed(&["--parent-cgroup", parent]).parent_cgroup("firecracker").is_err(), "{parent}");
        }
        assert!(Arguments::try_parse_from(["jailer", "--id", "a"]).is_err());
    }
}
