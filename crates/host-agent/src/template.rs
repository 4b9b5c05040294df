//! The templates and guest kernels below WRENN_DIR. Read anew each time: they are published by moving a finished directory into place.

use std::path::{Path, PathBuf};

use model::shape::TemplateName;

/// What a guest boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    pub image: PathBuf,
    pub initramfs: Option<PathBuf>,
    pub version: String,
}

/// The newest `kernels/vmlinux-<semver>`, else `kernels/vmlinux`.
pub fn newest_kernel(dir: &Path) -> Option<Kernel> {
    let kernels = dir.join("kernels");
    let newest = std::fs::read_dir(&kernels)
        .ok()?
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let version = name.strip_prefix("vmlinux-")?.to_owned();
            Some((semver(&version)?, version))
        })
        .max();
    let (image, initramfs, version) = match newest {
        Some((_, version)) => {
            (kernels.join(format!("vmlinux-{version}")), kernels.join(format!("initramfs-{version}")), version)
        }
        None => (kernels.join("vmlinux"), kernels.join("initramfs"), "unknown".to_owned()),
    };
    image.is_file().then(|| Kernel { image, initramfs: Some(initramfs).filter(|path| path.is_file()), version })
}

/// Numbers before dashes, compared as numbers; a version with more after the same numbers is a later build of it.
fn semver(text: &str) -> Option<(Vec<u64>, String)> {
    let (numbers, rest) = text.split_once('-').unwrap_or((text, ""));
    let numbers = numbers.split('.').map(|part| part.parse().ok()).collect::<Option<Vec<u64>>>()?;
    Some((numbers, rest.to_owned()))
}

/// The root file system of a template.
pub fn rootfs(dir: &Path, name: &TemplateName) -> Option<PathBuf> {
    let path = dir.join("images").join(name.as_str()).join("rootfs.ext4");
    path.is_file().then_some(path)
}

pub fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir.join("images")) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.path().join("rootfs.ext4").is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.parse::<TemplateName>().is_ok())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_wins_by_number() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(newest_kernel(dir.path()), None);
        std::fs::create_dir(dir.path().join("kernels")).unwrap();
        let touch = |name: &str| std::fs::write(dir.path().join("kernels").join(name), "").unwrap();
        touch("vmlinux");
        assert_eq!(newest_kernel(dir.path()).unwrap().version, "unknown");
        for name in ["vmlinux-6.1.9", "vmlinux-6.1.192", "initramfs-6.1.192", "vmlinux-junk", "vmlinux-6.1.20"] {
            touch(name);
        }
        let kernel = newest_kernel(dir.path()).unwrap();
        assert_eq!(kernel.version, "6.1.192");
        assert!(kernel.initramfs.is_some());
        touch("vmlinux-6.2.0");
        assert_eq!(newest_kernel(dir.path()).unwrap().initramfs, None);
    }

    #[test]
    fn lists_what_has_a_root_file_system() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b", "a", ".tmp", "empty"] {
            std::fs::create_dir_all(dir.path().join("images").join(name)).unwrap();
        }
        for name in ["b", "a", ".tmp"] {
            std::fs::write(dir.path().join("images").join(name).join("rootfs.ext4"), "").unwrap();
        }
        assert_eq!(names(dir.path()), ["a", "b"]);
        assert!(rootfs(dir.path(), &"a".parse().unwrap()).is_some());
        assert!(rootfs(dir.path(), &"empty".parse().unwrap()).is_none());
    }
}
