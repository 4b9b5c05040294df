//! What a sandbox is made of: vCPUs, memory, disk, and the template it starts from. Bounds are checked once, here.

use std::fmt;
use std::str::FromStr;

/// A size in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mib(pub u32);

impl Mib {
    pub fn bytes(self) -> u64 {
        u64::from(self.0) * 1024 * 1024
    }
}

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0)
    }
}

/// Invariant: every field is within the bounds below.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    vcpus: u8,
    memory: Mib,
    disk: Mib,
}

/// A field of a shape is out of range. `min` and `max` are inclusive, in the unit of the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} must be from {min} to {max}{}", .step.map(|s| format!(" in steps of {s}")).unwrap_or_default())]
pub struct OutOfRange {
    pub field: &'static str,
    pub min: i64,
    pub max: i64,
    pub step: Option<i64>,
}

impl Shape {
    /// 32: what the guest kernel is built for (`NR_CPUS`).
    pub const VCPUS: (i64, i64) = (1, 32);
    /// 128 MiB is the least in which the minimal template boots; 1 TiB is what one microVM may ever ask for. A host may have less.
    pub const MEMORY_MIB: (i64, i64) = (128, 1 << 20);
    /// Both VMMs take whole megabytes; even numbers keep huge pages possible.
    pub const MEMORY_STEP_MIB: i64 = 2;
    /// The minimal template needs about 1 GiB; 1 TiB is the largest virtual disk.
    pub const DISK_MIB: (i64, i64) = (1024, 1 << 20);

    pub const DEFAULT_VCPUS: i64 = 1;
    pub const DEFAULT_MEMORY_MIB: i64 = 512;
    /// What published clients get.
    pub const DEFAULT_DISK_MIB: i64 = 5120;

    pub fn new(vcpus: i64, memory_mib: i64, disk_mib: i64) -> Result<Self, OutOfRange> {
        let vcpus = within("vcpus", vcpus, Self::VCPUS, None)?;
        let memory = within("memory_mb", memory_mib, Self::MEMORY_MIB, Some(Self::MEMORY_STEP_MIB))?;
        let disk = within("disk_size_mb", disk_mib, Self::DISK_MIB, None)?;
        Ok(Self {
            vcpus: u8::try_from(vcpus).expect("the range fits"),
            memory: Mib(u32::try_from(memory).expect("the range fits")),
            disk: Mib(u32::try_from(disk).expect("the range fits")),
        })
    }

    pub fn vcpus(&self) -> u8 {
        self.vcpus
    }

    pub fn memory(&self) -> Mib {
        self.memory
    }

    pub fn disk(&self) -> Mib {
        self.disk
    }
}

fn within(field: &'static str, value: i64, (min, max): (i64, i64), step: Option<i64>) -> Result<i64, OutOfRange> {
    let fits = (min..=max).contains(&value) && step.is_none_or(|step| value % step == 0);
    if fits { Ok(value) } else { Err(OutOfRange { field, min, max, step }) }
}

/// The name of a template or snapshot: `[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}`. Safe as a file name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TemplateName(String);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a template name has 1 to 64 letters, digits, dots, dashes or underscores and starts with a letter or digit")]
pub struct InvalidTemplateName;

impl TemplateName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TemplateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TemplateName {
    type Err = InvalidTemplateName;

    fn from_str(text: &str) -> Result<Self, InvalidTemplateName> {
        let first = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        let rest = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
        if first && rest && text.len() <= 64 { Ok(Self(text.to_owned())) } else { Err(InvalidTemplateName) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_inclusive_and_named() {
        assert!(Shape::new(1, 128, 1024).is_ok());
        assert!(Shape::new(32, 1 << 20, 1 << 20).is_ok());
        for (vcpus, memory, disk, field) in [
            (0, 512, 5120, "vcpus"),
            (-1, 512, 5120, "vcpus"),
            (33, 512, 5120, "vcpus"),
            (i64::MAX, 512, 5120, "vcpus"),
            (1, 0, 5120, "memory_mb"),
            (1, 513, 5120, "memory_mb"),
            (1, 10 << 20, 5120, "memory_mb"),
            (1, 512, 0, "disk_size_mb"),
            (1, 512, i64::MIN, "disk_size_mb"),
        ] {
            assert_eq!(Shape::new(vcpus, memory, disk).unwrap_err().field, field, "{vcpus} {memory} {disk}");
        }
    }

    #[test]
    fn template_names_are_safe_as_file_names() {
        for good in ["minimal", "a", "A.b_c-9", &"x".repeat(64)] {
            assert!(good.parse::<TemplateName>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-a", "a/b", "a b", "ä", "a\0", "a@b", &"x".repeat(65)] {
            assert!(bad.parse::<TemplateName>().is_err(), "{bad}");
        }
    }
}
