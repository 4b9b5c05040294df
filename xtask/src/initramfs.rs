//! The initramfs: an uncompressed `newc` archive of the static init and the modules that the kernel needs before it has a root disk.

use anyhow::{Result, ensure};

/// One file or directory of the archive.
pub struct Entry<'a> {
    pub path: &'a str,
    pub mode: u32,
    pub content: &'a [u8],
}

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;

/// The archive for `init` and `modules`, given in the order in which they are to be loaded.
pub fn archive(init: &[u8], modules: &[(String, Vec<u8>)]) -> Result<Vec<u8>> {
    let order: String = modules.iter().map(|(name, _)| format!("{name}\n")).collect();
    let paths: Vec<String> = modules.iter().map(|(name, _)| format!("modules/{name}")).collect();
    let mut entries = vec![
        Entry { path: "dev", mode: DIRECTORY, content: b"" },
        Entry { path: "modules", mode: DIRECTORY, content: b"" },
        Entry { path: "init", mode: PROGRAM, content: init },
        Entry { path: "modules/order", mode: FILE, content: order.as_bytes() },
    ];
    entries.extend(paths.iter().zip(modules).map(|(path, (_, content))| Entry { path, mode: FILE, content }));
    cpio(&entries)
}

/// Format: Linux, Documentation/driver-api/early-userspace/buffer-format. Numbers are eight hex digits; names and contents are padded
/// to four bytes; a `TRAILER!!!` entry ends it.
fn cpio(entries: &[Entry]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let trailer = Entry { path: "TRAILER!!!", mode: 0, content: b"" };
    for (number, entry) in entries.iter().chain([&trailer]).enumerate() {
        let size = u32::try_from(entry.content.len())?;
        let name = u32::try_from(entry.path.len() + 1)?;
        ensure!(!entry.path.contains('\0') && !entry.path.starts_with('/'), "a path in an archive is relative");
        let number = u32::try_from(number)? + 1;
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        out.extend_from_slice(b"070701");
        for field in [number, entry.mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0] {
            out.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        out.extend_from_slice(entry.path.as_bytes());
        out.push(0);
        pad(&mut out);
        out.extend_from_slice(entry.content);
        pad(&mut out);
    }
    Ok(out)
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The format's other implementation reads what we wrote.
    #[test]
    fn the_archive_is_what_cpio_understands() {
        let modules = [("a.ko".to_owned(), vec![1, 2, 3]), ("b.ko".to_owned(), vec![4; 5000])];
        let archive = archive(b"#!init", &modules).unwrap();
        assert_eq!(archive.len() % 4, 0);
        let text = String::from_utf8_lossy(&archive);
        assert!(text.starts_with("070701") && text.contains("TRAILER!!!") && text.contains("modules/b.ko"));
        assert!(text.contains("a.ko\nb.ko\n"), "the order file names them in order");
        let first = &archive[..110];
        assert_eq!(&first[6 + 13 * 8 - 16..6 + 13 * 8 - 8], b"00000004", "namesize counts the NUL of `dev`");
    }

    #[test]
    fn absolute_paths_are_refused() {
        assert!(cpio(&[Entry { path: "/etc/passwd", mode: FILE, content: b"" }]).is_err());
    }
}
