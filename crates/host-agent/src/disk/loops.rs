//! Loop devices: files as block devices. They let go of their file by themselves when the last user is gone, so a death between attaching
//! one and using it leaves nothing. Which there are is read from the kernel each time, never remembered.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// How often another program may be faster to take the free loop device that the kernel named.
const ATTACH_TRIES: u32 = 32;

/// How a file is shown.
#[derive(Debug, Clone, Copy)]
pub struct Attachment {
    pub is_read_only: bool,
    /// Past the page cache of the file. A disk that cannot do it is used without.
    pub is_direct: bool,
    /// The least that is read and written.
    pub block_bytes: u32,
    /// What of the file is left out at its begin.
    pub offset: u64,
    /// How much is shown; 0: up to the end.
    pub bytes: u64,
}

impl Default for Attachment {
    fn default() -> Self {
        Self { is_read_only: false, is_direct: false, block_bytes: 512, offset: 0, bytes: 0 }
    }
}

/// While this lives the device stays, used or not.
pub struct Device {
    pub path: PathBuf,
    /// `major:minor`
    pub number: String,
    _file: File,
}

// linux/loop.h
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LOOP_CLR_FD: libc::c_ulong = 0x4c01;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4c05;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const LOOP_MAJOR: u64 = 7;

#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

pub fn attach(image: &Path, wish: Attachment) -> io::Result<Device> {
    let file = File::options().read(true).write(!wish.is_read_only).open(image)?;
    let control = File::options().read(true).write(true).open("/dev/loop-control")?;
    for _ in 0..ATTACH_TRIES {
        // SAFETY: the call takes no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        let number = u64::try_from(number).map_err(|_| io::Error::last_os_error())?;
        let path = node(number);
        if !path.exists() {
            // A /dev that the kernel does not fill, as in containers.
            use nix::sys::stat::{Mode, SFlag, makedev, mknod};
            mknod(&path, SFlag::S_IFBLK, Mode::from_bits_truncate(0o600), makedev(LOOP_MAJOR, number))?;
        }
        let device = File::options().read(true).write(true).open(&path)?;
        // SAFETY: all fields may be zero.
        let mut config: LoopConfig = unsafe { std::mem::zeroed() };
        config.fd = u32::try_from(file.as_raw_fd()).expect("a descriptor is not negative");
        config.block_size = wish.block_bytes;
        config.info.flags = LO_FLAGS_AUTOCLEAR
            | if wish.is_direct { LO_FLAGS_DIRECT_IO } else { 0 }
            | if wish.is_read_only { LO_FLAGS_READ_ONLY } else { 0 };
        (config.info.offset, config.info.size_limit) = (wish.offset, wish.bytes);
        let name = image.as_os_str().as_encoded_bytes();
        let shown = name.len().min(config.info.file_name.len() - 1);
        config.info.file_name[..shown].copy_from_slice(&name[..shown]);
        // SAFETY: the argument is a whole loop_config.
        if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } == 0 {
            // The device's own word: where loops may have partitions, the number in its name is another.
            let rdev = device.metadata()?.rdev();
            let number = format!("{}:{}", nix::sys::stat::major(rdev), nix::sys::stat::minor(rdev));
            return Ok(Device { path, number, _file: device });
        }
        match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EBUSY) => {}
            error => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "no loop device could be had"))
}

/// One that shows this whole file for reading already, held: it cannot go while this lives.
pub fn find_read_only(image: &Path) -> io::Result<Option<Device>> {
    let about = std::fs::metadata(image)?;
    for (number, file) in all()? {
        if file != image {
            continue;
        }
        let Some(path) = node_of(&number) else { continue };
        let Ok(device) = File::open(&path) else { continue };
        // SAFETY: all fields may be zero.
        let mut info: LoopInfo = unsafe { std::mem::zeroed() };
        // Looked at again, now that it is held. SAFETY: the argument is a whole loop_info64.
        let is_there = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) } == 0;
        let is_of_file = (info.device, info.inode) == (about.dev(), about.ino());
        if is_there && is_of_file && info.flags & LO_FLAGS_READ_ONLY != 0 && (info.offset, info.size_limit) == (0, 0) {
            return Ok(Some(Device { path, number, _file: device }));
        }
    }
    Ok(None)
}

/// By `major:minor`. One that is gone already is what was wanted.
pub fn detach(device: &str) -> io::Result<()> {
    let Some(path) = node_of(device) else { return Ok(()) };
    let device = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    // SAFETY: the call takes no argument.
    if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENXIO) => Ok(()),
        error => Err(error),
    }
}

/// The file behind a block device, when that is a loop device.
pub fn backing_file(device: &str) -> Option<PathBuf> {
    let text = std::fs::read(format!("/sys/dev/block/{device}/loop/backing_file")).ok()?;
    let text = text.strip_suffix(b"\n").unwrap_or(&text);
    Some(PathBuf::from(OsString::from_vec(text.to_vec())))
}

/// Every loop device with its file, as `major:minor`.
pub fn all() -> io::Result<Vec<(String, PathBuf)>> {
    let number = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().ok().filter(|name| name.starts_with("loop"))?;
        let device = std::fs::read_to_string(format!("/sys/block/{name}/dev")).ok()?.trim().to_owned();
        let file = backing_file(&device)?;
        Some((device, file))
    };
    Ok(std::fs::read_dir("/sys/block")?.flatten().filter_map(number).collect())
}

/// Of what is there, by `major:minor`.
fn node_of(device: &str) -> Option<PathBuf> {
    let place = std::fs::read_link(format!("/sys/dev/block/{device}")).ok()?;
    Some(Path::new("/dev").join(place.file_name()?))
}

fn node(number: u64) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_structures_have_their_size() {
        assert_eq!((size_of::<LoopInfo>(), size_of::<LoopConfig>()), (232, 304));
    }
}
