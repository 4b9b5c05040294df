//! The guest kernel: Debian's cloud kernel, unpacked to an uncompressed ELF, with an initramfs of the modules it needs.
//!
//! Nothing is compiled but the small init. What is compiled, when somebody asks for it, is in `own.rs`.

pub mod lab;
pub mod own;
mod package;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use crate::artifact::{self, Key};
use crate::initramfs;
use package::{Meta, Package, find};

const META: Meta = Meta { name: "linux-image-cloud-amd64", prefix: "linux-image-", kind: "kernel" };
/// Raised when the recipe below changes what comes out.
const RECIPE: &str = "kernel-3";

/// In the order of loading. Without the first seven there is neither root disk nor network; the others are what a guest cannot load
/// later because its image has no module tree.
const MODULES: [&str; 14] = [
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "rng-core",
    "virtio-rng",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "ptp",
    "ptp_kvm",
];
/// Must be there, as a module or built in.
const NEEDED: [&str; 3] = ["virtio_mmio", "virtio_blk", "virtio_net"];

/// Directory with `vmlinux-<semver>` and `initramfs-<semver>`.
pub fn build() -> Result<PathBuf> {
    let init = build_init()?;
    package::with(META, |package| {
        let version = format!("{} {}", package.name, package.file_version);
        let key = Key::default().text(RECIPE).text(&version).text(&MODULES.join(" ")).file(&init)?;
        artifact::get(META.kind, key, |dir| make(package, &init, dir))
    })
}

fn build_init() -> Result<PathBuf> {
    crate::images::static_build("initramfs", "initramfs")
}

fn make(package: &Package, init: &Path, out: &Path) -> Result<()> {
    let scratch = tempfile::tempdir_in(out)?;
    let tree = package.fetch(scratch.path())?;
    let version = package.semver()?;

    let image =
        find(&tree.join("boot"), |name| name.starts_with("vmlinuz-"))?.context("the package holds no kernel")?;
    let elf = unpack(&fs::read(image)?)?;
    fs::write(out.join(format!("vmlinux-{version}")), elf)?;

    let below = find(&tree.join("lib/modules"), |_| true)?.context("the package holds no modules")?;
    let builtin = fs::read_to_string(below.join("modules.builtin")).unwrap_or_default();
    let mut found = Vec::new();
    collect(&below.join("kernel"), &mut found)?;
    let mut modules = Vec::new();
    for name in MODULES {
        let file = format!("{name}.ko");
        match found.iter().find(|path| path.file_name().is_some_and(|it| it == file.as_str())) {
            Some(path) => modules.push((file, fs::read(path)?)),
            None if builtin.contains(&format!("/{file}")) || !NEEDED.contains(&name) => {}
            None => bail!("the package has no module {name} and its kernel has it not built in"),
        }
    }
    fs::write(out.join(format!("initramfs-{version}")), initramfs::archive(&fs::read(init)?, &modules)?)?;
    Ok(())
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), found)?;
        } else {
            found.push(entry.path());
        }
    }
    Ok(())
}

/// The ELF inside a bzImage (Linux, Documentation/arch/x86/boot.rst): `payload_offset` and `payload_length` of the header, of boot
/// protocol 2.08 and later, point at the compressed kernel.
fn unpack(image: &[u8]) -> Result<Vec<u8>> {
    let word = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("the kernel image is cut off")?;
        Ok(u32::from_le_bytes(bytes.try_into().expect("four bytes")) as usize)
    };
    ensure!(image.get(0x202..0x206) == Some(b"HdrS"), "not a bzImage");
    let setup_sectors = match image[0x1f1] {
        0 => 4,
        n => usize::from(n),
    };
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    let payload = start
        .checked_add(word(0x24c)?)
        .and_then(|end| image.get(start..end))
        .context("the payload lies outside the image")?;
    let elf = match payload {
        [0x02, 0x21, 0x4c, 0x18, ..] => lz4_legacy(payload)?,
        [0x1f, 0x8b, ..] => bail!("a gzip kernel payload is not supported"),
        [0xfd, b'7', b'z', ..] => bail!("an xz kernel payload is not supported"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => bail!("a zstd kernel payload is not supported"),
        _ => bail!("unknown compression of the kernel payload"),
    };
    ensure!(elf.starts_with(b"\x7fELF"), "the payload is no ELF");
    Ok(elf)
}

/// LZ4's legacy frame: the magic, then blocks of (length, raw block); the last four bytes are the unpacked size, which the kernel's
/// build adds.
fn lz4_legacy(payload: &[u8]) -> Result<Vec<u8>> {
    /// What the format lets one block unpack to at most.
    const BLOCK_MAX: usize = 8 << 20;
    /// A kernel beyond this is no kernel of ours; it bounds what a broken file can make us allocate.
    const KERNEL_MAX: usize = 256 << 20;
    let (body, size) = payload.split_last_chunk::<4>().context("the payload is cut off")?;
    let size = u32::from_le_bytes(*size) as usize;
    ensure!(size <= KERNEL_MAX, "a kernel of {size} bytes is too large");
    let mut rest = &body[4..];
    let mut out = Vec::with_capacity(size);
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let block = after.get(..length).context("a block is cut off")?;
        let begin = out.len();
        ensure!(begin < KERNEL_MAX, "the payload is too large");
        out.resize(begin + BLOCK_MAX, 0);
        let got = lz4_flex::block::decompress_into(block, &mut out[begin..]).context("a block is damaged")?;
        out.truncate(begin + got);
        rest = &after[length..];
    }
    ensure!(out.len() == size, "unpacked {} bytes instead of {size}", out.len());
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(content: &[u8]) -> Vec<u8> {
        let block = lz4_flex::block::compress(content);
        let mut out = vec![0x02, 0x21, 0x4c, 0x18];
        out.extend((block.len() as u32).to_le_bytes());
        out.extend(block);
        out.extend((content.len() as u32).to_le_bytes());
        out
    }

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut out = vec![0; 1024];
        out[0x1f1] = 1;
        out[0x202..0x206].copy_from_slice(b"HdrS");
        out[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        out[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        out.extend([0; 16]);
        out.extend(payload);
        out
    }

    #[test]
    fn unpacks_what_was_packed() {
        let elf = [b"\x7fELF".as_slice(), &[7; 100_000]].concat();
        assert_eq!(unpack(&image(&frame(&elf))).unwrap(), elf);
    }

    #[test]
    fn refuses_damage_at_every_place() {
        let whole = image(&frame(&[b"\x7fELF".as_slice(), &[7; 1000]].concat()));
        for length in 0..whole.len() {
            assert!(unpack(&whole[..length]).is_err(), "cut at {length}");
        }
        for payload in [&[0x1f, 0x8b, 0, 0][..], &[0x28, 0xb5, 0x2f, 0xfd], b"what", &frame(b"no elf")] {
            assert!(unpack(&image(payload)).is_err());
        }
        let mut huge = whole.clone();
        huge[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(unpack(&huge).is_err());
    }
}
