//! The files that a VMM may open by itself: its program with its libraries and firmware, the random source, and what it was given. All
//! others are out of its reach, whoever may read them; so are new TCP connections, abstract sockets and signals to others.
//!
//! Raw system calls, because the rules are made before the fork and entered after it, where nothing may be allocated. A kernel without
//! Landlock gives no rules: user, seccomp, empty network and missing capabilities still hold there.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

// linux/landlock.h
const CREATE_RULESET_VERSION: libc::c_uint = 1;
const RULE_PATH_BENEATH: libc::c_int = 1;
const EXECUTE: u64 = 1 << 0;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
/// What can be asked of a device beside reading and writing it.
pub const IOCTL_DEV: u64 = 1 << 15;
const NET_BIND_AND_CONNECT_TCP: u64 = 3;
const SCOPE_ABSTRACT_UNIX_SOCKET_AND_SIGNAL: u64 = 3;

pub const READ: u64 = READ_FILE;
pub const READ_WRITE: u64 = READ_FILE | WRITE_FILE;

/// Where programs, libraries and firmware of a Linux system lie, and what its loader reads.
const SYSTEM: [&str; 4] = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache"];
const RANDOM: &str = "/dev/urandom";
const NULL: &str = "/dev/null";
pub const KVM: &str = "/dev/kvm";

#[repr(C)]
struct RulesetAttributes {
    handled_fs: u64,
    handled_net: u64,
    scoped: u64,
}

#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: i32,
}

/// Whether this kernel has it, switched on.
pub fn is_there() -> bool {
    version() >= 1
}

fn version() -> libc::c_long {
    // SAFETY: with that flag the call takes no memory and answers a number.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, CREATE_RULESET_VERSION) }
}

/// `binary` is the program's full path; `files` are what it was given, open, and how it may open them again.
pub fn rules(binary: &Path, files: &[(BorrowedFd<'_>, u64)], kvm: bool) -> io::Result<Option<OwnedFd>> {
    let version = version();
    if version < 1 {
        return Ok(None);
    }
    // Each version knows more rights; what a kernel does not know it must not be asked to handle.
    let rights = match version {
        1 => 13,
        2 => 14,
        3 | 4 => 15,
        _ => 16,
    };
    let attributes = RulesetAttributes {
        handled_fs: (1 << rights) - 1,
        handled_net: if version >= 4 { NET_BIND_AND_CONNECT_TCP } else { 0 },
        scoped: if version >= 6 { SCOPE_ABSTRACT_UNIX_SOCKET_AND_SIGNAL } else { 0 },
    };
    // SAFETY: the pointer is to a whole structure of that size. An older kernel accepts the larger one when what it does not know is zero.
    let ruleset = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            &raw const attributes,
            size_of::<RulesetAttributes>(),
            0 as libc::c_uint,
        )
    };
    let ruleset = RawFd::try_from(ruleset).map_err(io::Error::other)?;
    if ruleset < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and is owned by nothing else.
    let ruleset = unsafe { OwnedFd::from_raw_fd(ruleset) };
    let handled = attributes.handled_fs;
    let mut program = SYSTEM.map(Path::new).map(Path::to_owned).to_vec();
    // A VMM that was installed elsewhere has its parts beside it.
    if let Some(at) = binary.parent() {
        program.push(at.to_owned());
        program.extend(["lib", "lib64", "share", "libexec"].map(|part| at.join("..").join(part)));
    }
    for path in program {
        allow_path(&ruleset, &path, (EXECUTE | READ_FILE | READ_DIR) & handled)?;
    }
    allow_path(&ruleset, Path::new(RANDOM), READ_FILE)?;
    allow_path(&ruleset, Path::new(NULL), READ_WRITE)?;
    if kvm {
        allow_path(&ruleset, Path::new(KVM), (READ_WRITE | IOCTL_DEV) & handled)?;
    }
    for (file, rights) in files {
        allow(&ruleset, file.as_raw_fd(), rights & handled)?;
    }
    Ok(Some(ruleset))
}

/// What is not there needs no rule.
fn allow_path(ruleset: &OwnedFd, path: &Path, rights: u64) -> io::Result<()> {
    let Ok(place) = File::options().read(true).custom_flags(libc::O_PATH).open(path) else { return Ok(()) };
    let rights = if place.metadata()?.is_dir() { rights } else { rights & !READ_DIR };
    allow(ruleset, place.as_raw_fd(), rights)
}

fn allow(ruleset: &OwnedFd, place: RawFd, allowed: u64) -> io::Result<()> {
    let rule = PathBeneath { allowed, parent: place };
    // SAFETY: the pointer is to a whole structure of the kind that is named.
    let done = unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset.as_raw_fd(),
            RULE_PATH_BENEATH,
            &raw const rule,
            0 as libc::c_uint,
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Async-signal-safe. The caller can get no new privileges any more.
pub fn enter(ruleset: RawFd) -> io::Result<()> {
    // SAFETY: a plain system call on a descriptor.
    let done = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset, 0 as libc::c_uint) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::process::CommandExt as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn only_what_was_given_can_be_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (given, other) = (dir.path().join("given"), dir.path().join("other"));
        std::fs::write(&given, "given").unwrap();
        std::fs::write(&other, "other").unwrap();
        let file = File::open(&given).unwrap();
        let Some(rules) = rules(Path::new("/usr/bin/sh"), &[(file.as_fd(), READ)], false).unwrap() else {
            println!("SKIPPED: this kernel has no Landlock");
            return;
        };
        let number = rules.as_raw_fd();
        let works = |script: &str| {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", script, "sh"]).arg(&given).arg(&other).stdout(Stdio::null()).stderr(Stdio::null());
            // SAFETY: plain system calls between fork and exec.
            unsafe {
                command.pre_exec(move || {
                    libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
                    enter(number)
                })
            };
            command.status().unwrap().success()
        };
        assert!(works(r#"cat "$1" </dev/null && head -c 1 /dev/urandom"#));
        for forbidden in [
            r#"cat "$2""#,
            r#"echo x >"$1""#,
            r#": >"$1.new""#,
            "cat /etc/passwd",
            "cat /proc/self/environ",
            "ls /root",
            "head -c 0 /dev/zero",
        ] {
            assert!(!works(forbidden), "{forbidden} worked");
        }
    }
}
