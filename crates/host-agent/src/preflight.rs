//! What this machine must have before anything is done, each with a sentence that says what is missing and how to get it.

use std::path::{Path, PathBuf};

use tracing::warn;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    #[error(
        "wrenn-agent must run as root: it makes network namespaces, cgroups and mounts; start it with sudo or as a system service"
    )]
    Root,
    #[error("this kernel has no {what} ({path} is missing); {cure}")]
    Feature { what: &'static str, path: PathBuf, cure: &'static str },
}

const FEATURES: &[(&str, &str, &str)] = &[
    ("TAP devices", "/dev/net/tun", "load the module tun (modprobe tun), or let the container have /dev/net/tun"),
    ("network namespaces", "/proc/self/ns/net", "use a kernel with CONFIG_NET_NS"),
    ("mount namespaces", "/proc/self/ns/mnt", "use a kernel with CONFIG_NAMESPACES"),
    ("page maps", "/proc/self/pagemap", "use a kernel with CONFIG_PROC_PAGE_MONITOR"),
];

pub fn check() -> Result<(), Missing> {
    check_with(rustix::process::geteuid().is_root(), Path::new("/"))
}

/// Descriptors up to the hard limit: each stream, sandbox and connection takes some, and the usual soft limit of 1024 is for programs that
/// use `select`. Where it cannot be raised it stays, which is said.
pub fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        warn!(?current, ?maximum, "the number of open files stays limited: {error}");
    }
}

fn check_with(is_root: bool, root: &Path) -> Result<(), Missing> {
    if !is_root {
        return Err(Missing::Root);
    }
    for (what, path, cure) in FEATURES {
        if !root.join(path.trim_start_matches('/')).exists() {
            return Err(Missing::Feature { what, path: path.into(), cure });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_all_descriptors_there_are() {
        raise_descriptors();
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }

    #[test]
    fn says_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(check_with(false, dir.path()), Err(Missing::Root));
        let missing = check_with(true, dir.path()).unwrap_err();
        assert!(missing.to_string().contains("modprobe tun"), "{missing}");
    }
}
