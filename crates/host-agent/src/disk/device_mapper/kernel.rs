//! Device-mapper as the kernel offers it, by `/dev/mapper/control` itself: a program in between could outlive an agent that is killed, and
//! suspend a device when the next agent has already looked for suspended ones. A call of our own ends before we do.
//!
//! udev is told to leave the devices alone: what is in them is a guest's, and nobody on the host looks for file systems there.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

const CONTROL: &str = "/dev/mapper/control";
/// Of sector counts.
pub const SECTOR_BYTES: u64 = 512;

/// One device, as the kernel says it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    pub name: String,
    /// `major:minor`
    pub number: String,
    pub is_suspended: bool,
}

// linux/dm-ioctl.h
const VERSION: [u32; 3] = [4, 0, 0];
const DEV_CREATE: libc::c_ulong = 3;
const DEV_REMOVE: libc::c_ulong = 4;
const DEV_SUSPEND: libc::c_ulong = 6;
const TABLE_LOAD: libc::c_ulong = 9;
const TABLE_STATUS: libc::c_ulong = 12;
const LIST_VERSIONS: libc::c_ulong = 13;
const SUSPEND_FLAG: u32 = 1 << 1;
const BUFFER_FULL_FLAG: u32 = 1 << 8;
/// No rules of device-mapper, of subsystems, of disks or others, and this event is device-mapper's own; in the upper half of the number.
const UDEV_FLAGS: u32 = (0x1 | 0x2 | 0x4 | 0x8 | 0x40) << 16;
const NAME_BYTES: usize = 128;
const BUFFER_BYTES: usize = 16 * 1024;
const HEAD_BYTES: usize = size_of::<Head>();

#[repr(C)]
#[derive(Clone, Copy)]
struct Head {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event: u32,
    padding: u32,
    device: u64,
    name: [u8; NAME_BYTES],
    uuid: [u8; 129],
    data: [u8; 7],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Target {
    begin: u64,
    sectors: u64,
    status: i32,
    next: u32,
    kind: [u8; 16],
}

/// What a call takes and gives: the head, and what follows it.
#[repr(C, align(8))]
struct Buffer([u8; BUFFER_BYTES]);

/// Whether this kernel has the snapshot target, or has it now that it was asked for.
pub fn has_snapshots() -> io::Result<bool> {
    let is_named = |answer: &Buffer| answer.0[HEAD_BYTES..].windows(9).any(|part| part == b"snapshot\0");
    if is_named(&*call(LIST_VERSIONS, "", 0, &[])?) {
        return Ok(true);
    }
    // The kernel loads it by itself only when a table names it.
    let _ = crate::tool::run("modprobe", &["-q", "dm-snapshot"], "");
    Ok(is_named(&*call(LIST_VERSIONS, "", 0, &[])?))
}

/// Every device whose name begins so. None where the kernel has no device-mapper.
pub fn all(prefix: &str) -> io::Result<Vec<Mapping>> {
    let about = |entry: std::fs::DirEntry| {
        let place = entry.path();
        let read = |name: &str| Some(std::fs::read_to_string(place.join(name)).ok()?.trim().to_owned());
        let name = read("dm/name").filter(|name| name.starts_with(prefix))?;
        Some(Mapping { name, number: read("dev")?, is_suspended: read("dm/suspended")? == "1" })
    };
    Ok(std::fs::read_dir("/sys/block")?.flatten().filter_map(about).collect())
}

/// A device of one target. What there is of it goes when that fails.
pub fn create(name: &str, disk_bytes: u64, kind: &str, parameters: &str) -> io::Result<Mapping> {
    let made = call(DEV_CREATE, name, 0, &[])?;
    let number = number(made.head().device);
    let mut target = Target { begin: 0, sectors: disk_bytes / SECTOR_BYTES, status: 0, next: 0, kind: [0; 16] };
    target.kind[..kind.len()].copy_from_slice(kind.as_bytes());
    // SAFETY: a Target is plain numbers and bytes without gaps.
    let bytes = unsafe { std::slice::from_raw_parts((&raw const target).cast::<u8>(), size_of::<Target>()) };
    let table = [bytes, parameters.as_bytes(), b"\0"].concat();
    match call(TABLE_LOAD, name, 0, &table).and_then(|_| call(DEV_SUSPEND, name, 0, &[])) {
        Ok(_) => Ok(Mapping { name: name.to_owned(), number, is_suspended: false }),
        Err(error) => {
            let _ = call(DEV_REMOVE, name, 0, &[]);
            Err(error)
        }
    }
}

/// What was written to the device is below it when this returns, and what is written from now on waits.
pub fn suspend(name: &str) -> io::Result<()> {
    call(DEV_SUSPEND, name, SUSPEND_FLAG, &[]).map(drop)
}

/// In the words of its target.
pub fn status(name: &str) -> io::Result<String> {
    let answer = call(TABLE_STATUS, name, 0, &[])?;
    let begin = usize::try_from(answer.head().data_start).unwrap_or(BUFFER_BYTES) + size_of::<Target>();
    let text = answer.0.get(begin..).unwrap_or_default();
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(0);
    Ok(String::from_utf8_lossy(&text[..end]).into_owned())
}

/// Also of one that is not suspended.
pub fn resume(name: &str) -> io::Result<()> {
    call(DEV_SUSPEND, name, 0, &[]).map(drop)
}

/// `ResourceBusy` while somebody has it open. One that is gone already is what was wanted.
pub fn remove(name: &str) -> io::Result<()> {
    match call(DEV_REMOVE, name, 0, &[]) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(()),
        other => other.map(drop),
    }
}

fn call(command: libc::c_ulong, name: &str, flags: u32, data: &[u8]) -> io::Result<Box<Buffer>> {
    let control = File::options().read(true).write(true).open(CONTROL)?;
    if name.len() >= NAME_BYTES || HEAD_BYTES + data.len() > BUFFER_BYTES {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut head = Head {
        version: VERSION,
        data_size: u32::try_from(BUFFER_BYTES).expect("some KiB"),
        data_start: u32::try_from(HEAD_BYTES).expect("some hundred bytes"),
        target_count: u32::from(!data.is_empty()),
        open_count: 0,
        flags,
        event: if command == LIST_VERSIONS { 0 } else { UDEV_FLAGS },
        padding: 0,
        device: 0,
        name: [0; NAME_BYTES],
        uuid: [0; 129],
        data: [0; 7],
    };
    head.name[..name.len()].copy_from_slice(name.as_bytes());
    let mut buffer = Box::new(Buffer([0; BUFFER_BYTES]));
    // SAFETY: the buffer is larger than a Head and aligned for one.
    unsafe { (&raw mut *buffer).cast::<Head>().write(head) };
    buffer.0[HEAD_BYTES..][..data.len()].copy_from_slice(data);
    // _IOWR(0xfd, command, struct dm_ioctl)
    let request = (3 << 30) | ((HEAD_BYTES as libc::c_ulong) << 16) | (0xfd << 8) | command;
    loop {
        // SAFETY: the buffer is as long as its head says.
        if unsafe { libc::ioctl(control.as_raw_fd(), request, &raw mut *buffer) } == 0 {
            break;
        }
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => {}
            error => return Err(error),
        }
    }
    if buffer.head().flags & BUFFER_FULL_FLAG != 0 {
        return Err(io::Error::other("device-mapper has more to say than there is room for"));
    }
    Ok(buffer)
}

impl Buffer {
    fn head(&self) -> Head {
        // SAFETY: as long as a Head, aligned for one, and all bytes may be anything.
        unsafe { (&raw const *self).cast::<Head>().read() }
    }
}

/// linux/kdev_t.h, `new_decode_dev`
fn number(device: u64) -> String {
    let (major, minor) = ((device & 0xf_ff00) >> 8, (device & 0xff) | ((device >> 12) & 0xf_ff00));
    format!("{major}:{minor}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_structures_have_their_size() {
        assert_eq!((size_of::<Head>(), size_of::<Target>()), (312, 40));
    }

    #[test]
    fn reads_the_kernels_numbers() {
        assert_eq!(number(0xfd00), "253:0");
        assert_eq!(number(0x10_fd02), "253:258");
    }
}
