//! Guest kernel and image of `make images`: in `WRENN_TEST_ARTIFACTS`, else `current` in the cache. What is missing is said.

use std::fs;
use std::path::{Path, PathBuf};

use microvm::KernelImage;

pub struct Artifacts {
    pub kernel: KernelImage,
    pub rootfs: PathBuf,
}

pub fn find() -> Option<Artifacts> {
    // SAFETY: geteuid has no effects.
    if unsafe { libc::geteuid() } != 0 {
        println!("SKIPPED: real microVMs need root");
        return None;
    }
    let cache = std::env::var_os("WRENN_CACHE")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/wrenn")))?;
    let place = std::env::var_os("WRENN_TEST_ARTIFACTS").map_or_else(|| cache.join("current"), PathBuf::from);
    let rootfs = place.join("images/minimal/rootfs.ext4");
    let Some(kernel) = kernel(&place.join("kernels")).filter(|_| rootfs.exists()) else {
        println!("SKIPPED: no guest kernel and image in {}: run `make images`", place.display());
        return None;
    };
    Some(Artifacts { kernel, rootfs })
}

/// One of those that there are, and always the same; what belongs to it has its version.
fn kernel(kernels: &Path) -> Option<KernelImage> {
    let names = fs::read_dir(kernels).ok()?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let version = names.filter_map(|name| Some(name.strip_prefix("vmlinux-")?.to_owned()));
    let version = version.filter(|version| !version.ends_with(".tmp")).max()?;
    let initramfs = kernels.join(format!("initramfs-{version}"));
    let vmlinux = kernels.join(format!("vmlinux-{version}"));
    Some(KernelImage { vmlinux, initramfs: Some(initramfs).filter(|path| path.exists()) })
}
