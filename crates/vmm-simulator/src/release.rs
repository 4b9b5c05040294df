//! Which release the program says it is. Its file's name decides, so that a copy under another name is another release.

use std::fmt;
use std::path::Path;

/// Without a release in the name.
const DEFAULT: Release = Release { major: 1, minor: 17, patch: 0 };

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Release {
    major: u32,
    minor: u32,
    patch: u32,
}

impl Release {
    /// By its file's name: `firecracker-v1.16.1` is 1.16.1.
    pub fn of_program(program: &Path) -> Self {
        Self::of_name(&program.file_name().unwrap_or_default().to_string_lossy())
    }

    fn of_name(name: &str) -> Self {
        name.rsplit_once("-v").and_then(|(_, version)| Self::parse(version)).unwrap_or(DEFAULT)
    }

    /// The major version of its state files. One release in practice loads only its own: 1.17 writes 11, and the others follow that.
    pub fn snapshot_format(self) -> u32 {
        (11 + self.minor).saturating_sub(DEFAULT.minor)
    }

    fn parse(version: &str) -> Option<Self> {
        let mut numbers = version.split('.').map(|number| number.parse().ok());
        let release = Self { major: numbers.next()??, minor: numbers.next()??, patch: numbers.next()?? };
        numbers.next().is_none().then_some(release)
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_decides() {
        for (name, version, format) in [
            ("firecracker-simulator", "1.17.0", 11),
            ("firecracker-v1.16.1", "1.16.1", 10),
            ("firecracker-v1.17.0", "1.17.0", 11),
            ("firecracker-v1.17", "1.17.0", 11),
            ("firecracker-vx", "1.17.0", 11),
        ] {
            let release = Release::of_name(name);
            assert_eq!((release.to_string().as_str(), release.snapshot_format()), (version, format), "{name}");
        }
    }
}
