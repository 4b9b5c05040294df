//! Which releases of Firecracker are run. Saved states are good for one release, so several may lie side by side: new microVMs are made by
//! the first, a saved state is loaded by the one that made it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::Error;

const VERSION_LIMIT: Duration = Duration::from_secs(10);

/// Releases with a known hole that matters to us, by the fixed release: everything before it is refused.
const HOLES: [Hole; 3] = [
    Hole {
        id: "CVE-2026-122192",
        fixed: [1, 16, 2],
        what: "a guest may reach the VMM's memory after a failed discard",
    },
    Hole { id: "CVE-2026-5747", fixed: [1, 14, 4], what: "a guest may write out of bounds by its virtio PCI queues" },
    Hole { id: "CVE-2026-1386", fixed: [1, 13, 2], what: "the jailer follows links in a prepared jail" },
];
/// Before it a load moved the guest's clocks by the time that it was away, so that what a guest measures jumped with them.
const OLDEST: [u32; 3] = [1, 16, 0];

struct Hole {
    id: &'static str,
    fixed: [u32; 3],
    what: &'static str,
}

/// As the program tells it: `1.17.0`, `1.17.0-dev`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    numbers: [u32; 3],
    text: String,
}

impl Version {
    /// From `Firecracker v1.17.0` or `v1.17.0-dev`.
    pub fn parse(text: &str) -> Option<Self> {
        let word = text.lines().next()?.split_whitespace().last()?;
        let text = word.strip_prefix('v').unwrap_or(word);
        let (numbers, _) = text.split_once(['-', '+']).unwrap_or((text, ""));
        let parts: Vec<u32> = numbers.split('.').map(|part| part.parse().ok()).collect::<Option<_>>()?;
        Some(Self { numbers: parts.try_into().ok()?, text: text.to_owned() })
    }

    /// Whether this release may run guests; a sentence when it may not. `allowed` are holes that the operator has put up with.
    pub fn check(&self, allowed: &[String]) -> Result<(), String> {
        let open = HOLES.iter().find(|hole| self.numbers < hole.fixed && !allowed.iter().any(|id| id == hole.id));
        if let Some(Hole { id, fixed: [major, minor, patch], what }) = open {
            return Err(format!("Firecracker {self} has {id} ({what}); take {major}.{minor}.{patch} or later"));
        }
        if self.numbers < OLDEST {
            let [major, minor, _] = OLDEST;
            return Err(format!("Firecracker {self} moves a guest's clocks at a load; take {major}.{minor} or later"));
        }
        Ok(())
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// One release on this machine: the VMM and its jailer, which belong together.
#[derive(Debug, Clone)]
pub struct Release {
    pub firecracker: PathBuf,
    pub jailer: PathBuf,
    pub version: Version,
}

impl Release {
    /// Asks both programs. They are resolved to files, so that a link that is turned meanwhile changes nothing.
    pub async fn find(firecracker: &Path, jailer: &Path) -> Result<Self, Error> {
        let found = |path: &Path| {
            path.canonicalize().map_err(|cause| Error::Start { reason: format!("find {}", path.display()), cause })
        };
        let (firecracker, jailer) = (found(firecracker)?, found(jailer)?);
        let version = ask(&firecracker).await?;
        let jailers = ask(&jailer).await?;
        if jailers != version {
            let said =
                format!("{} is {version} and its jailer is {jailers}: they belong together", firecracker.display());
            return Err(Error::Stillborn(said));
        }
        // The jailer's own rule, told before the first sandbox fails by it.
        if !firecracker.file_name().is_some_and(|name| name.to_string_lossy().contains("firecracker")) {
            let said = format!("the jailer runs only what is named firecracker, not {}", firecracker.display());
            return Err(Error::Stillborn(said));
        }
        Ok(Self { firecracker, jailer, version })
    }
}

async fn ask(program: &Path) -> Result<Version, Error> {
    let mut command = Command::new(program);
    command.arg("--version").env_clear().stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(VERSION_LIMIT, command.output())
        .await
        .map_err(|_| Error::Silent { command: "--version", limit: VERSION_LIMIT })?
        .map_err(|cause| Error::Start { reason: format!("run {}", program.display()), cause })?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Version::parse(&text).ok_or_else(|| Error::Stillborn(format!("{} --version printed no version", program.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_program_prints() {
        let printed = "Firecracker v1.17.0-dev\n\n2026-11-01T10:00:00 [anonymous-instance:main] Firecracker exiting\n";
        assert_eq!(Version::parse(printed).unwrap().to_string(), "1.17.0-dev");
        assert_eq!(Version::parse("Jailer v1.16.2").unwrap().numbers, [1, 16, 2]);
        for none in ["", "bash: no such file", "Firecracker v1.17", "Firecracker v1.x.0"] {
            assert_eq!(Version::parse(none), None, "{none:?}");
        }
    }

    #[test]
    fn releases_with_known_holes_are_refused_by_name() {
        let check = |text: &str, allowed: &[&str]| {
            let allowed: Vec<String> = allowed.iter().map(|id| (*id).to_owned()).collect();
            Version::parse(text).unwrap().check(&allowed).err().unwrap_or_default()
        };
        for good in ["v1.16.2", "v1.17.0", "v1.17.0-dev", "v2.0.0"] {
            assert_eq!(check(good, &[]), "");
        }
        assert!(check("v1.16.1", &[]).contains("CVE-2026-122192"));
        assert_eq!(check("v1.16.1", &["CVE-2026-122192"]), "");
        assert!(check("v1.14.3", &["CVE-2026-122192"]).contains("CVE-2026-5747"));
        assert!(check("v1.14.0", &["CVE-2026-122192"]).contains("CVE-2026-5747"));
        let all = ["CVE-2026-122192", "CVE-2026-5747", "CVE-2026-1386"];
        assert!(check("v1.13.0", &all).contains("1.16 or later"), "what it does to clocks nobody can put up with");
    }
}
